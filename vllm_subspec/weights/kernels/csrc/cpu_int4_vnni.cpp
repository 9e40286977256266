// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-subspec authors
//
// 4-bit weights times dynamically quantised 8-bit activations, for x86 CPUs with AVX512-VNNI.
//
// A weight W[n][k] = (q - z) * s has codes q and zero points z in 0..15 and one z and s per row and
// group of columns. Each token's activations are rounded to signed 8-bit codes a with one scale t
// per group of the same columns, so that
//
//     y[n] = sum over groups of s * t * (sum over the group of q * a  -  z * sum of a)
//
// where the parenthesis is exact in 32-bit integers. Floating-point sums run over the groups in
// order, however many tokens there are: a token's result does not depend on its batch.
//
// Packed for blocks of 16 output rows, the 32-bit lanes of a vector, each read front to back:
//     codes  [blocks][columns / 8][16 rows][4]   low nibble: columns 0..3 of 8, high nibble: 4..7
//     scales [blocks][groups][16 rows]           bfloat16
//     zeros  [blocks][groups][16 rows]           bytes

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <utility>

namespace {

constexpr int64_t kRows = 16;      // output rows of a block
constexpr int64_t kStep = 16;      // columns quantised and multiplied in one step
constexpr int64_t kHalf = 8;       // columns in one 64-byte vector of codes
constexpr int64_t kMaxTile = 16;   // tokens that share one unpacking of the codes
constexpr int64_t kMaxGroup = 256;  // columns whose sum of 8-bit codes fits into 16 bits
// Bytes ahead of the codes in use: hardware prefetchers stop at the end of a 4 KiB page.
constexpr int64_t kPrefetch = 2048;
constexpr int64_t kMinBytesPerThread = 1 << 16;  // of codes: less is not worth waking a thread
constexpr int64_t kMinValuesPerThread = 1 << 15;  // of activations to quantise, likewise
// Smaller activations count as zero: 127 / kTiny must not overflow.
constexpr float kTiny = 1e-36f;

struct Weight {
  const uint8_t* codes;
  const c10::BFloat16* scales;
  const uint8_t* zeros;
  int64_t columns;
  int64_t groups;
};

// Quantised activations of `count` tokens, those of one step or group side by side.
struct Tile {
  int8_t* codes;     // [columns / kStep][count][kStep]
  float* scales;     // [groups][count]
  int32_t* negated;  // [groups][count], minus the sum of the group's codes
  int64_t count;
};

struct Tiles {
  uint8_t* memory;
  int64_t tokens;
  int64_t columns;
  int64_t groups;

  static int64_t bytes_per_token(int64_t columns, int64_t groups) {
    return columns + groups * int64_t(sizeof(float) + sizeof(int32_t));
  }

  // Tiles of nearly equal size, because the cost of unpacking is shared by the tokens of one.
  int64_t count() const { return (tokens + kMaxTile - 1) / kMaxTile; }

  int64_t first_token(int64_t tile) const { return tokens * tile / count(); }

  Tile operator[](int64_t tile) const {
    const int64_t first = first_token(tile), size = first_token(tile + 1) - first;
    auto* codes = reinterpret_cast<int8_t*>(memory) + first * bytes_per_token(columns, groups);
    auto* scales = reinterpret_cast<float*>(codes + size * columns);
    auto* negated = reinterpret_cast<int32_t*>(scales + size * groups);
    return {codes, scales, negated, size};
  }
};

inline __m512 widen(__m256i bfloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16), 16));
}

inline __m512 load16(const float* from, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, from);
}

inline __m512 load16(const c10::BFloat16* from, __mmask16 mask) {
  return widen(_mm256_maskz_loadu_epi16(mask, from));
}

inline __m512 load16(const c10::Half* from, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from));
}

inline void store16(float* to, __m512 values, __mmask16 mask) {
  _mm512_mask_storeu_ps(to, mask, values);
}

inline void store16(c10::Half* to, __m512 values, __mmask16 mask) {
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

// Rounds to nearest even; not a number stays one.
inline void store16(c10::BFloat16* to, __m512 values, __mmask16 mask) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_mov_epi32(
      _mm512_add_epi32(bits, half), nan, _mm512_set1_epi32(0x7fc00000));
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// Rounds one group of one token to 8-bit codes; `place` is the token's place in its tile.
template <typename T>
void quantize_group(const T* x, int64_t group, int64_t columns, const Tile& tile, int64_t place) {
  constexpr __mmask16 all = 0xffff;
  x += group * columns;
  __m512 largest = _mm512_setzero_ps();
  for (int64_t k = 0; k < columns; k += kStep) {
    largest = _mm512_max_ps(largest, _mm512_abs_ps(load16(x + k, all)));
  }
  const float bound = _mm512_reduce_max_ps(largest);
  const __m512 steps = _mm512_set1_ps(bound < kTiny ? 0.0f : 127.0f / bound);
  int8_t* to = tile.codes + group * columns * tile.count + place * kStep;
  __m128i sum = _mm_setzero_si128();
  for (int64_t k = 0; k < columns; k += kStep) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load16(x + k, all), steps));
    const __m128i codes = _mm512_cvtsepi32_epi8(rounded);
    sum = _mm_dpbusd_epi32(sum, _mm_set1_epi8(1), codes);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), codes);
    to += tile.count * kStep;
  }
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0b01001110));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0b10110001));
  tile.scales[group * tile.count + place] = bound * (1.0f / 127.0f);
  tile.negated[group * tile.count + place] = -_mm_cvtsi128_si32(sum);
}

template <typename T>
void quantize(const T* x, const Tiles& tiles) {
  const int64_t grain = std::max<int64_t>(1, kMinValuesPerThread / tiles.columns);
  for (int64_t t = 0; t < tiles.count(); ++t) {
    const Tile tile = tiles[t];
    const T* first = x + tiles.first_token(t) * tiles.columns;
    at::parallel_for(0, tile.count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        for (int64_t g = 0; g < tiles.groups; ++g) {
          quantize_group(first + m * tiles.columns, g, tiles.columns / tiles.groups, tile, m);
        }
      }
    });
  }
}

// s + the dot product of four unsigned codes `w` and the four signed codes at `x`, in each lane.
// GCC does not fold the broadcast into the instruction by itself; loaded apart it costs a quarter
// of the speed.
inline __m512i dot(__m512i s, __m512i w, const int8_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(s)
      : "v"(w), "m"(*reinterpret_cast<const int8_t(*)[4]>(x)));
  return s;
}

// Loops over the tokens of a tile, unrolled early enough for their sums to stay in registers.
#define FOR_EACH_TOKEN _Pragma("GCC unroll 16") for (int m = 0; m < M; ++m)

// One block of rows times the M tokens of a tile: out[token][row].
template <int M>
void multiply(const Weight& weight, int64_t block, const Tile& tile, float (*out)[kRows]) {
  // A product takes five cycles: few tokens need two sums each to have enough of them in flight.
  constexpr int kSums = M <= 4 ? 2 : 1;
  const __m512i nibble = _mm512_set1_epi8(0x0f);
  const int64_t groups = weight.groups, group = weight.columns / groups;
  const uint8_t* codes = weight.codes + block * weight.columns / 2 * kRows;
  const uint8_t* zeros = weight.zeros + block * groups * kRows;
  const c10::BFloat16* scales = weight.scales + block * groups * kRows;
  const int8_t* x = tile.codes;
  const float* x_scales = tile.scales;
  const int32_t* x_negated = tile.negated;
  __m512 total[M];
  FOR_EACH_TOKEN total[m] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    const __m512i zero =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
    __m512i sum[kSums][M];
    FOR_EACH_TOKEN {
      // Of each pair of 16-bit products the upper one is zero, as a zero point is one byte.
      const __m512i negated = _mm512_set1_epi32(x_negated[m]);
      sum[0][m] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), zero, negated);
      if (kSums > 1) sum[kSums - 1][m] = _mm512_setzero_si512();
    }
    for (int64_t k = 0; k < group; k += kStep) {
      _Pragma("GCC unroll 2") for (int64_t half = 0; half < kStep; half += kHalf) {
        const __m512i packed = _mm512_loadu_si512(codes);
        _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetch), _MM_HINT_T0);
        const __m512i low = _mm512_and_si512(packed, nibble);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
        const int8_t* at = x + half;
        FOR_EACH_TOKEN sum[0][m] = dot(sum[0][m], low, at + m * kStep);
        FOR_EACH_TOKEN sum[kSums - 1][m] = dot(sum[kSums - 1][m], high, at + m * kStep + 4);
        codes += kRows * kHalf / 2;
      }
      x += M * kStep;
    }
    const __m512 scale = load16(scales, 0xffff);
    FOR_EACH_TOKEN {
      if (kSums > 1) sum[0][m] = _mm512_add_epi32(sum[0][m], sum[kSums - 1][m]);
      total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[0][m]),
                                 _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[m])), total[m]);
    }
    zeros += kRows;
    scales += kRows;
    x_scales += M;
    x_negated += M;
  }
  FOR_EACH_TOKEN _mm512_storeu_ps(out[m], total[m]);
}

using Multiply = void (*)(const Weight&, int64_t, const Tile&, float (*)[kRows]);

template <int... M>
constexpr std::array<Multiply, sizeof...(M)> multiply_table(std::integer_sequence<int, M...>) {
  return {multiply<M + 1>...};
}

// By tokens in the tile, less one.
constexpr auto kMultiply = multiply_table(std::make_integer_sequence<int, kMaxTile>());

template <typename T>
void linear(const Weight& weight, int64_t rows, const Tiles& tiles, const T* bias, T* out) {
  const int64_t blocks = (rows + kRows - 1) / kRows;
  const int64_t grain = std::max<int64_t>(1, kMinBytesPerThread * 2 / (kRows * weight.columns));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * kRows, present = std::min(kRows, rows - row);
      const __mmask16 mask = (1u << present) - 1;
      const __m512 offset = bias ? load16(bias + row, mask) : _mm512_setzero_ps();
      for (int64_t t = 0; t < tiles.count(); ++t) {
        const Tile tile = tiles[t];
        float sums[kMaxTile][kRows];
        kMultiply[tile.count - 1](weight, block, tile, sums);
        T* to = out + tiles.first_token(t) * rows + row;
        for (int64_t m = 0; m < tile.count; ++m, to += rows) {
          store16(to, _mm512_add_ps(_mm512_loadu_ps(sums[m]), offset), mask);
        }
      }
    }
  });
}

template <typename Call>
void with_type(at::ScalarType type, Call call) {
  switch (type) {
    case at::kFloat: return call(float());
    case at::kBFloat16: return call(c10::BFloat16());
    case at::kHalf: return call(c10::Half());
    default: TORCH_CHECK(false, "int4_vnni: no kernel for ", type);
  }
}

void check(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales,
           const at::Tensor& zeros, int64_t rows) {
  const int64_t blocks = (rows + kRows - 1) / kRows;
  TORCH_CHECK(x.dim() == 2 && codes.dim() == 3 && scales.dim() == 3, "int4_vnni: dimensions");
  const int64_t columns = x.size(1), groups = scales.size(1);
  TORCH_CHECK(codes.is_contiguous() && scales.is_contiguous() && zeros.is_contiguous() &&
                  codes.scalar_type() == at::kByte && zeros.scalar_type() == at::kByte &&
                  scales.scalar_type() == at::kBFloat16,
              "int4_vnni: the weight is not as it was packed");
  TORCH_CHECK(codes.numel() == blocks * kRows * columns / 2 &&
                  scales.numel() == blocks * groups * kRows && zeros.numel() == scales.numel(),
              "int4_vnni: ", columns, " columns of x and ", rows,
              " rows do not match the packed weight");
  TORCH_CHECK(groups > 0 && columns % groups == 0 && columns / groups % kStep == 0 &&
                  columns / groups <= kMaxGroup,
              "int4_vnni: ", groups, " groups of ", columns, " columns");
}

at::Tensor int4_linear(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales,
                       const at::Tensor& zeros, const std::optional<at::Tensor>& bias, int64_t rows,
                       at::ScalarType dtype) {
  check(x, codes, scales, zeros, rows);
  const int64_t tokens = x.size(0), columns = x.size(1), groups = scales.size(1);
  at::Tensor out = at::empty({tokens, rows}, x.options().dtype(dtype));
  if (tokens == 0) return out;
  const at::Tensor dense = x.contiguous();
  const int64_t bytes = tokens * Tiles::bytes_per_token(columns, groups);
  const at::Tensor memory = at::empty({bytes}, at::kByte);
  const Tiles tiles{memory.mutable_data_ptr<uint8_t>(), tokens, columns, groups};
  with_type(x.scalar_type(), [&](auto type) {
    quantize(dense.const_data_ptr<decltype(type)>(), tiles);
  });
  const Weight weight{codes.const_data_ptr<uint8_t>(), scales.const_data_ptr<c10::BFloat16>(),
                      zeros.const_data_ptr<uint8_t>(), columns, groups};
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    at::Tensor offset;
    if (bias) {
      TORCH_CHECK(bias->numel() == rows, "int4_vnni: bias of ", bias->numel(), " for ", rows);
      offset = bias->to(dtype).contiguous();
    }
    const T* start = bias ? offset.const_data_ptr<T>() : nullptr;
    linear(weight, rows, tiles, start, out.mutable_data_ptr<T>());
  });
  return out;
}

at::Tensor int4_linear_meta(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales,
                            const at::Tensor& zeros, const std::optional<at::Tensor>& bias,
                            int64_t rows, at::ScalarType dtype) {
  return at::empty_symint({x.sym_size(0), rows}, x.options().dtype(dtype));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_subspec, library) {
  library.def(
      "int4_vnni_linear(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor? bias, "
      "int rows, ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(vllm_subspec, CPU, library) { library.impl("int4_vnni_linear", &int4_linear); }

TORCH_LIBRARY_IMPL(vllm_subspec, Meta, library) {
  library.impl("int4_vnni_linear", &int4_linear_meta);
}
