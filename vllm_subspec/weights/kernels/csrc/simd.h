// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-subspec authors
//
// Vectors of the level that this file is compiled for: 16 lanes of 32 bits with AVX-512, otherwise 8
// with AVX2. Everything here has one meaning at every level.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "table.h"

#define SUBSPEC_INLINE inline __attribute__((always_inline))

namespace subspec {
namespace {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

#ifdef __AVX512F__

using Floats = __m512;
using Ints = __m512i;
constexpr int64_t kLanes = 16;

SUBSPEC_INLINE Floats zero_floats() { return _mm512_setzero_ps(); }
SUBSPEC_INLINE Floats all(float value) { return _mm512_set1_ps(value); }
SUBSPEC_INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
SUBSPEC_INLINE void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
SUBSPEC_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
SUBSPEC_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
SUBSPEC_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return _mm512_fmadd_ps(a, b, c);
}
SUBSPEC_INLINE Floats max_magnitude(Floats a, Floats b) {
  return _mm512_max_ps(a, _mm512_abs_ps(b));
}
SUBSPEC_INLINE Floats as_floats(Ints bits) { return _mm512_castsi512_ps(bits); }
SUBSPEC_INLINE Floats to_floats(Ints values) { return _mm512_cvtepi32_ps(values); }
SUBSPEC_INLINE Ints round_to_ints(Floats values) { return _mm512_cvtps_epi32(values); }

SUBSPEC_INLINE Ints zero_ints() { return _mm512_setzero_si512(); }
SUBSPEC_INLINE Ints all_ints(int32_t value) { return _mm512_set1_epi32(value); }
SUBSPEC_INLINE Ints all_bytes(int8_t value) { return _mm512_set1_epi8(value); }
SUBSPEC_INLINE Ints load_ints(const void* from) { return _mm512_loadu_si512(from); }
SUBSPEC_INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
SUBSPEC_INLINE Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
template <int kBits>
SUBSPEC_INLINE Ints up(Ints a) { return _mm512_slli_epi32(a, kBits); }
template <int kBits>
SUBSPEC_INLINE Ints down(Ints a) { return _mm512_srli_epi32(a, kBits); }
SUBSPEC_INLINE Ints upper_halves(Ints a) { return both(a, all_ints(int32_t(0xffff0000u))); }
// One byte, or one 16-bit word, for each lane.
SUBSPEC_INLINE Ints widen_bytes(const uint8_t* from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
SUBSPEC_INLINE Ints widen_words(const void* from) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
SUBSPEC_INLINE Floats widen_halves(const void* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
SUBSPEC_INLINE void store_halves(void* to, Floats values) {
  const __m256i halves = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(static_cast<__m256i*>(to), halves);
}
// The low byte, or 16-bit word, of each lane.
SUBSPEC_INLINE void store_bytes(int8_t* to, Ints values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(values));
}
SUBSPEC_INLINE void store_words(void* to, Ints values) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(values));
}
SUBSPEC_INLINE Ints where_nan(Floats values, Ints if_nan, Ints otherwise) {
  return _mm512_mask_mov_epi32(otherwise, _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), if_nan);
}
SUBSPEC_INLINE __m256 half_sum(Floats values) {
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(values), 1));
  return _mm256_add_ps(_mm512_castps512_ps256(values), upper);
}
// Sums of pairs of signed 16-bit products.
SUBSPEC_INLINE Ints multiply_pairs(Ints a, Ints b) { return _mm512_madd_epi16(a, b); }
SUBSPEC_INLINE float largest(Floats values) { return _mm512_reduce_max_ps(values); }
SUBSPEC_INLINE int32_t sum(Ints values) { return _mm512_reduce_add_epi32(values); }

#else

using Floats = __m256;
using Ints = __m256i;
constexpr int64_t kLanes = 8;

SUBSPEC_INLINE Floats zero_floats() { return _mm256_setzero_ps(); }
SUBSPEC_INLINE Floats all(float value) { return _mm256_set1_ps(value); }
SUBSPEC_INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
SUBSPEC_INLINE void store(float* to, Floats values) { _mm256_storeu_ps(to, values); }
SUBSPEC_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
SUBSPEC_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
SUBSPEC_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return _mm256_fmadd_ps(a, b, c);
}
SUBSPEC_INLINE Floats max_magnitude(Floats a, Floats b) {
  return _mm256_max_ps(a, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), b));
}
SUBSPEC_INLINE Floats as_floats(Ints bits) { return _mm256_castsi256_ps(bits); }
SUBSPEC_INLINE Floats to_floats(Ints values) { return _mm256_cvtepi32_ps(values); }
SUBSPEC_INLINE Ints round_to_ints(Floats values) { return _mm256_cvtps_epi32(values); }

SUBSPEC_INLINE Ints zero_ints() { return _mm256_setzero_si256(); }
SUBSPEC_INLINE Ints all_ints(int32_t value) { return _mm256_set1_epi32(value); }
SUBSPEC_INLINE Ints all_bytes(int8_t value) { return _mm256_set1_epi8(value); }
SUBSPEC_INLINE Ints load_ints(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
SUBSPEC_INLINE Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
SUBSPEC_INLINE Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
template <int kBits>
SUBSPEC_INLINE Ints up(Ints a) { return _mm256_slli_epi32(a, kBits); }
template <int kBits>
SUBSPEC_INLINE Ints down(Ints a) { return _mm256_srli_epi32(a, kBits); }
// The mask stays in memory: kept in a register by the compiler, it would push a sum out of one.
SUBSPEC_INLINE Ints upper_halves(Ints a) {
  alignas(32) static constexpr uint32_t mask[8] = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
                                                   0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};
  Ints out;
  asm("vpand %2, %1, %0" : "=x"(out) : "x"(a), "m"(mask));
  return out;
}
// One byte, or one 16-bit word, for each lane.
SUBSPEC_INLINE Ints widen_bytes(const uint8_t* from) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
SUBSPEC_INLINE Ints widen_words(const void* from) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
SUBSPEC_INLINE Floats widen_halves(const void* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
SUBSPEC_INLINE void store_halves(void* to, Floats values) {
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}
// The low 16-bit word of each lane, side by side.
SUBSPEC_INLINE __m128i low_words(Ints values) {
  const __m256i words = _mm256_and_si256(values, _mm256_set1_epi32(0xffff));
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
// The low byte, or 16-bit word, of each lane.
SUBSPEC_INLINE void store_bytes(int8_t* to, Ints values) {
  const __m128i bytes = _mm_and_si128(low_words(values), _mm_set1_epi16(0xff));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(bytes, bytes));
}
SUBSPEC_INLINE void store_words(void* to, Ints values) {
  _mm_storeu_si128(static_cast<__m128i*>(to), low_words(values));
}
SUBSPEC_INLINE Ints where_nan(Floats values, Ints if_nan, Ints otherwise) {
  const __m256 nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(otherwise, if_nan, _mm256_castps_si256(nan));
}
SUBSPEC_INLINE __m256 half_sum(Floats values) { return values; }
// Sums of pairs of signed 16-bit products.
SUBSPEC_INLINE Ints multiply_pairs(Ints a, Ints b) { return _mm256_madd_epi16(a, b); }
SUBSPEC_INLINE float largest(Floats values) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
SUBSPEC_INLINE int32_t sum(Ints values) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0b01001110));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0b10110001)));
}

#endif

SUBSPEC_INLINE float sum(Floats values) {
  const __m256 eight = half_sum(values);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

SUBSPEC_INLINE Floats load(const BFloat16* from) { return as_floats(up<16>(widen_words(from))); }
SUBSPEC_INLINE Floats load(const Float16* from) { return widen_halves(from); }

SUBSPEC_INLINE void store(Float16* to, Floats values) { store_halves(to, values); }

// Rounds to nearest even; not a number stays one.
SUBSPEC_INLINE void store(BFloat16* to, Floats values) {
#ifdef __AVX512F__
  const Ints bits = _mm512_castps_si512(values);
#else
  const Ints bits = _mm256_castps_si256(values);
#endif
  const Ints odd = both(down<16>(bits), all_ints(1));
  const Ints rounded = add_ints(bits, add_ints(odd, all_ints(0x7fff)));
  store_words(to, down<16>(where_nan(values, all_ints(0x7fc00000), rounded)));
}

// The first `count` lanes; the others are zero, or left alone.
template <typename T>
SUBSPEC_INLINE Floats load_some(const T* from, int64_t count) {
  T whole[kLanes] = {};
  std::memcpy(whole, from, count * sizeof(T));
  return load(whole);
}

template <typename T>
SUBSPEC_INLINE void store_some(T* to, Floats values, int64_t count) {
  T whole[kLanes];
  store(whole, values);
  std::memcpy(to, whole, count * sizeof(T));
}

// Calls `call` with a null pointer of the type.
template <typename Call>
SUBSPEC_INLINE void with_type(Type type, Call call) {
  switch (type) {
    case Type::kFloat32: return call(static_cast<float*>(nullptr));
    case Type::kBFloat16: return call(static_cast<BFloat16*>(nullptr));
    case Type::kFloat16: return call(static_cast<Float16*>(nullptr));
  }
}

template <typename Call>
void parallel(ParallelFor parallel_for, int64_t end, int64_t grain, const Call& call) {
  const auto body = [](int64_t first, int64_t last, void* context) {
    (*static_cast<const Call*>(context))(first, last);
  };
  parallel_for(end, grain, body, const_cast<void*>(static_cast<const void*>(&call)));
}

// y[token][first .. first + count) = sums[token][...] + bias, in y's type.
template <typename T>
SUBSPEC_INLINE void write_rows(const float* sums, const T* bias, T* y, int64_t count) {
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes) {
    const Floats value = load(sums + n);
    store(y + n, bias ? add(value, load(bias + n)) : value);
  }
  if (n < count) {
    const Floats value = load_some(sums + n, count - n);
    store_some(y + n, bias ? add(value, load_some(bias + n, count - n)) : value, count - n);
  }
}

}  // namespace
}  // namespace subspec
