// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-subspec authors
//
// 4- and 8-bit weights times dynamically quantized 8-bit activations.
//
// A weight W[n][k] = (q - z) * s has codes q and zero points z. Each token's activations are rounded
// to signed 8-bit codes a with one scale t per group of columns, so that
//
//     y[n] = sum over groups of s * t * (sum over the group of q * a  -  z * sum of a)
//
// where the parenthesis is exact in 32-bit integers. Floating-point sums run over the groups in
// order, however many tokens there are: a token's result does not depend on its batch, nor on the
// level of instruction sets.
//
// 4 bits: one z and one s for each row and group. 8 bits: z is 128 and s is the row's, which
// multiplies last; activations have groups of kActivationGroup columns, the last may be smaller.
//
// Packed for blocks of 16 output rows, the 32-bit lanes of one or two vectors, each read front to
// back:
//     4-bit codes  [blocks][columns / 8][16 rows][4]  low nibble: columns 0..3 of 8, high: 4..7
//           scales [blocks][groups][16 rows]          bfloat16
//           zeros  [blocks][groups][16 rows]          bytes
//     8-bit codes  [blocks][columns / 4][16 rows][4]  columns filled up to a multiple of 16
//           scales [blocks][16 rows]                  float32

#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "simd.h"

namespace subspec {
namespace {

constexpr int64_t kRows = 16;              // output rows of a block
constexpr int64_t kColumns = 16;           // quantized and multiplied in one step
constexpr int64_t kActivationGroup = 128;  // columns that share a scale with 8-bit weights
// Bytes ahead of the codes in use: hardware prefetchers stop at the end of a 4 KiB page.
constexpr int64_t kPrefetch = 2048;
// Less is not worth waking a thread.
constexpr int64_t kBytesPerThread = 1 << 16;   // of codes
constexpr int64_t kValuesPerThread = 1 << 15;  // of activations to quantize
// Smaller activations count as zero: 127 / kTiny must not overflow.
constexpr float kTiny = 1e-36f;

// Sums of products of unsigned weight codes and signed activation codes, four columns a lane.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

constexpr bool kProductsOfBytes = true;

struct Products {
  Ints sums;

  static SUBSPEC_INLINE Products from(Ints sums) { return {sums}; }

  SUBSPEC_INLINE void add(Ints w, const int8_t* x) {
#ifdef __AVX512VNNI__
    // GCC does not fold the broadcast into the instruction by itself; loaded apart it costs a
    // quarter of the speed.
    asm("vpdpbusd %2%{1to16%}, %1, %0"
        : "+v"(sums)
        : "v"(w), "m"(*reinterpret_cast<const int8_t(*)[4]>(x)));
#else
    int32_t four;
    std::memcpy(&four, x, 4);
    sums = _mm256_dpbusd_avx_epi32(sums, w, all_ints(four));
#endif
  }
  SUBSPEC_INLINE void carry() {}
};

#else

// Pairs of products are summed in 16 bits, which saturate: 15 * 127 * 2 fits eight times, so codes
// have 4 bits here and `carry` comes after at most eight sums.
constexpr bool kProductsOfBytes = false;

struct Products {
  Ints sums;
  Ints pairs;

  static SUBSPEC_INLINE Products from(Ints sums) { return {sums, zero_ints()}; }

  SUBSPEC_INLINE void add(Ints w, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    // The compiler would keep all products and add them later, in memory: each sum is to be made.
#ifdef __AVX512F__
    pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(w, all_ints(four)));
    asm("" : "+v"(pairs));
#else
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w, all_ints(four)));
    asm("" : "+x"(pairs));
#endif
  }
  SUBSPEC_INLINE void carry() {
#ifdef __AVX512F__
    sums = add_ints(sums, multiply_pairs(pairs, _mm512_set1_epi16(1)));
#else
    sums = add_ints(sums, multiply_pairs(pairs, _mm256_set1_epi16(1)));
#endif
    pairs = zero_ints();
  }
};

#endif

// Tokens that share one unpacking of the codes: as many as have their sums in registers.
#if defined(__AVX512VNNI__)
constexpr int max_tile(int bits) { return 16; }
#elif defined(__AVX512F__)
constexpr int max_tile(int bits) { return bits == 4 ? 12 : 6; }
#elif defined(__AVXVNNI__)
constexpr int max_tile(int bits) { return 8; }
#else
constexpr int max_tile(int bits) { return bits == 4 ? 8 : 4; }
#endif

// Quantized activations of `count` tokens, those of one step or group side by side.
struct Tile8 {
  int8_t* codes;     // [columns / kColumns][count][kColumns]
  float* scales;     // [groups][count]
  int32_t* negated;  // [groups][count], minus the sum of the group's codes
  int64_t count;
};

struct Activations {
  uint8_t* memory;
  int64_t tokens;
  int64_t columns;  // filled up to a multiple of kColumns
  int64_t group;    // columns
  int64_t groups;
  int64_t max_tile;

  static Activations of(const LowBitLinear& job, void* memory) {
    const int64_t columns = (job.columns + kColumns - 1) / kColumns * kColumns;
    const int64_t group = job.bits == 8 ? kActivationGroup : columns / job.groups;
    return {static_cast<uint8_t*>(memory), job.tokens, columns, group,
            (columns + group - 1) / group, subspec::max_tile(job.bits)};
  }

  int64_t bytes_per_token() const {
    return columns + groups * int64_t(sizeof(float) + sizeof(int32_t));
  }

  // Tiles of nearly equal size, because the cost of unpacking is shared by the tokens of one.
  int64_t tiles() const { return (tokens + max_tile - 1) / max_tile; }

  int64_t first_token(int64_t tile) const { return tokens * tile / tiles(); }

  Tile8 operator[](int64_t tile) const {
    const int64_t first = first_token(tile), size = first_token(tile + 1) - first;
    auto* codes = reinterpret_cast<int8_t*>(memory) + first * bytes_per_token();
    auto* scales = reinterpret_cast<float*>(codes + size * columns);
    auto* negated = reinterpret_cast<int32_t*>(scales + size * groups);
    return {codes, scales, negated, size};
  }
};

// Rounds `present` columns of one group of one token to 8-bit codes; `place` is the token's place in
// its tile, `filled` the columns with those that are filled with zeros.
template <typename T>
void quantize_group(const T* x, int64_t present, int64_t filled, int64_t begin, int64_t group,
                    const Tile8& tile, int64_t place) {
  const auto values = [&](int64_t k) {
    return k + kLanes <= present ? load(x + k) : load_some(x + k, std::max<int64_t>(0, present - k));
  };
  Floats bounds = zero_floats();
  for (int64_t k = 0; k < present; k += kLanes) bounds = max_magnitude(bounds, values(k));
  const float bound = largest(bounds);
  const Floats steps = all(bound < kTiny ? 0.0f : 127.0f / bound);
  Ints total = zero_ints();
  int8_t* to = tile.codes + begin * tile.count + place * kColumns;
  for (int64_t k = 0; k < filled; k += kColumns) {
    for (int64_t part = 0; part < kColumns; part += kLanes) {
      const Ints codes = round_to_ints(multiply(values(k + part), steps));
      total = add_ints(total, codes);
      store_bytes(to + part, codes);
    }
    to += tile.count * kColumns;
  }
  tile.scales[group * tile.count + place] = bound * (1.0f / 127.0f);
  tile.negated[group * tile.count + place] = -sum(total);
}

template <typename T>
void quantize(const LowBitLinear& job, const Activations& to, ParallelFor parallel_for) {
  const int64_t grain = std::max<int64_t>(1, kValuesPerThread / to.columns);
  for (int64_t t = 0; t < to.tiles(); ++t) {
    const Tile8 tile = to[t];
    const T* first = static_cast<const T*>(job.x) + to.first_token(t) * job.columns;
    parallel(parallel_for, tile.count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const T* x = first + m * job.columns;
        for (int64_t g = 0; g < to.groups; ++g) {
          const int64_t k = g * to.group;
          quantize_group(x + k, std::min(to.group, job.columns - k),
                         std::min(to.group, to.columns - k), k, g, tile, m);
        }
      }
    });
  }
}

// Loops over the tokens of a tile, unrolled early enough for their sums to stay in registers; over
// the vectors that are computed side by side.
#define FOR_EACH_TOKEN _Pragma("GCC unroll 16") for (int m = 0; m < M; ++m)
#define FOR_EACH_VECTOR _Pragma("GCC unroll 2") for (int v = 0; v < V; ++v)

constexpr int64_t kVectors = kRows / kLanes;  // of a block

// Few tokens need more sums each, or vectors side by side, to have enough products in flight.
constexpr int sums_for(int tokens) { return kProductsOfBytes && tokens <= 4 ? 2 : 1; }
constexpr int vectors_for(int tokens) { return tokens <= 2 ? int(kVectors) : 1; }

// One step of kColumns of V vectors of rows. Codes of 8 bits are two nibbles where products of
// bytes would saturate: `high` sums the upper ones.
template <int kBits, int M, int V>
SUBSPEC_INLINE void add_step(const uint8_t* codes, const int8_t* x,
                             Products (&sums)[V][sums_for(M)][M], Products (&high)[V][M]) {
  constexpr int S = sums_for(M) - 1;
  const Ints nibble = all_bytes(0x0f);
  if constexpr (kBits == 4) {
    _Pragma("GCC unroll 2") for (int64_t half = 0; half < 2; ++half) {
      FOR_EACH_VECTOR {
        const Ints packed = load_ints(codes + (half * kVectors + v) * kLanes * 4);
        const Ints first = both(packed, nibble), second = both(down<4>(packed), nibble);
        const int8_t* at = x + half * 8;
        FOR_EACH_TOKEN sums[v][0][m].add(first, at + m * kColumns);
        FOR_EACH_TOKEN sums[v][S][m].add(second, at + m * kColumns + 4);
      }
    }
  } else {
    _Pragma("GCC unroll 4") for (int64_t quarter = 0; quarter < 4; ++quarter) {
      FOR_EACH_VECTOR {
        const Ints packed = load_ints(codes + (quarter * kVectors + v) * kLanes * 4);
        const int8_t* at = x + quarter * 4;
        if constexpr (kProductsOfBytes) {
          FOR_EACH_TOKEN sums[v][quarter & S][m].add(packed, at + m * kColumns);
        } else {
          const Ints low = both(packed, nibble), up = both(down<4>(packed), nibble);
          FOR_EACH_TOKEN sums[v][0][m].add(low, at + m * kColumns);
          FOR_EACH_TOKEN high[v][m].add(up, at + m * kColumns);
        }
      }
    }
  }
}

struct Block {
  const uint8_t* codes;
  const uint8_t* zeros;
  const void* scales;
};

// A block of rows, or the vector `vector` of it, times the M tokens of a tile: out[token][row].
template <int kBits, int M, int V>
void multiply(const Block& block, const Activations& shape, const Tile8& tile, int64_t vector,
              float (*out)[kRows]) {
  constexpr int S = sums_for(M) - 1;
  constexpr int64_t kStepBytes = kRows * kColumns * kBits / 8;
  const int64_t lane = vector * kLanes;
  const uint8_t* codes = block.codes + lane * 4;
  const int8_t* x = tile.codes;
  const float* x_scales = tile.scales;
  const int32_t* x_negated = tile.negated;
  Floats total[V][M];
  FOR_EACH_VECTOR FOR_EACH_TOKEN total[v][m] = zero_floats();
  for (int64_t g = 0; g < shape.groups; ++g) {
    Products sums[V][S + 1][M], high[V][M];
    FOR_EACH_VECTOR {
      const int64_t row = g * kRows + lane + v * kLanes;
      const Ints zero = kBits == 4 ? widen_bytes(block.zeros + row) : all_ints(128);
      FOR_EACH_TOKEN {
        // Of each pair of 16-bit products the upper one is zero, as a zero point is one byte.
        sums[v][0][m] = Products::from(multiply_pairs(zero, all_ints(x_negated[m])));
        if (S) sums[v][S][m] = Products::from(zero_ints());
        high[v][m] = Products::from(zero_ints());
      }
    }
    const int64_t columns = std::min(shape.group, shape.columns - g * shape.group);
    const auto step = [&] {
      _Pragma("GCC unroll 4") for (int64_t line = 0; line < kStepBytes; line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetch + line), _MM_HINT_T0);
      }
      add_step<kBits, M, V>(codes, x, sums, high);
      codes += kStepBytes;
      x += M * kColumns;
    };
    const auto carry = [&] {
      FOR_EACH_VECTOR FOR_EACH_TOKEN {
        sums[v][0][m].carry();
        if (kBits == 8) high[v][m].carry();
      }
    };
    int64_t k = 0;
    for (; k + 2 * kColumns <= columns; k += 2 * kColumns) {
      step();
      step();
      carry();
    }
    if (k < columns) {
      step();
      carry();
    }
    FOR_EACH_VECTOR {
      Floats scale = all(1.0f);
      if constexpr (kBits == 4) {
        const auto* scales = static_cast<const BFloat16*>(block.scales);
        scale = load(scales + g * kRows + lane + v * kLanes);
      }
      FOR_EACH_TOKEN {
        Ints whole = sums[v][0][m].sums;
        if (S) whole = add_ints(whole, sums[v][S][m].sums);
        if (kBits == 8 && !kProductsOfBytes) whole = add_ints(whole, up<4>(high[v][m].sums));
        const Floats factor = multiply(scale, all(x_scales[m]));
        total[v][m] = multiply_add(to_floats(whole), factor, total[v][m]);
      }
    }
    x_scales += M;
    x_negated += M;
  }
  FOR_EACH_VECTOR {
    const int64_t row = lane + v * kLanes;
    Floats scale = all(1.0f);
    if constexpr (kBits == 8) scale = load(static_cast<const float*>(block.scales) + row);
    FOR_EACH_TOKEN {
      store(out[m] + row, kBits == 8 ? multiply(total[v][m], scale) : total[v][m]);
    }
  }
}

template <int kBits, int M>
void multiply_block(const Block& block, const Activations& shape, const Tile8& tile,
                    float (*out)[kRows]) {
  constexpr int V = vectors_for(M);
  for (int64_t vector = 0; vector < kVectors; vector += V) {
    multiply<kBits, M, V>(block, shape, tile, vector, out);
  }
}

using Multiply = void (*)(const Block&, const Activations&, const Tile8&, float (*)[kRows]);

template <int kBits, int... M>
constexpr std::array<Multiply, sizeof...(M)> multiply_table(std::integer_sequence<int, M...>) {
  return {multiply_block<kBits, M + 1>...};
}

// By tokens in the tile, less one.
template <int kBits>
constexpr auto kMultiply = multiply_table<kBits>(std::make_integer_sequence<int, max_tile(kBits)>());

template <int kBits, typename T>
void multiply_rows(const LowBitLinear& job, const Activations& x, ParallelFor parallel_for) {
  const int64_t blocks = (job.rows + kRows - 1) / kRows;
  const int64_t bytes = kRows * x.columns * kBits / 8;
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / bytes);
  parallel(parallel_for, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t row = b * kRows, present = std::min(kRows, job.rows - row);
      const int64_t scales = kBits == 4 ? b * x.groups * kRows * 2 : b * kRows * 4;
      const Block block = {job.codes + b * bytes,
                           kBits == 4 ? job.zeros + b * x.groups * kRows : nullptr,
                           static_cast<const char*>(job.scales) + scales};
      const T* bias = job.bias ? static_cast<const T*>(job.bias) + row : nullptr;
      for (int64_t t = 0; t < x.tiles(); ++t) {
        const Tile8 tile = x[t];
        float sums[max_tile(kBits)][kRows];
        kMultiply<kBits>[tile.count - 1](block, x, tile, sums);
        T* y = static_cast<T*>(job.y) + x.first_token(t) * job.rows + row;
        for (int64_t m = 0; m < tile.count; ++m) write_rows(sums[m], bias, y + m * job.rows, present);
      }
    }
  });
}

inline int64_t low_bit_scratch(const LowBitLinear& job) {
  return job.tokens * Activations::of(job, nullptr).bytes_per_token();
}

inline void low_bit_linear(const LowBitLinear& job, void* scratch, ParallelFor parallel_for) {
  const Activations x = Activations::of(job, scratch);
  with_type(job.x_type, [&](auto* type) {
    quantize<std::remove_pointer_t<decltype(type)>>(job, x, parallel_for);
  });
  with_type(job.y_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (job.bits == 4) {
      multiply_rows<4, T>(job, x, parallel_for);
    } else {
      multiply_rows<8, T>(job, x, parallel_for);
    }
  });
}

}  // namespace
}  // namespace subspec
