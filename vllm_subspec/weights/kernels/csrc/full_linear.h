// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-subspec authors
//
// Full-precision linears over a plain weight [rows][columns], as a checkpoint has it: it may lie in
// a buffer that is refilled. 16-bit weights are widened in registers, products are summed in
// float32.
//
// Each sum runs over blocks of kBlock columns in order; within a block lane i adds the columns that
// fall to it in order, then the lanes are added in a fixed tree. Neither tiles nor threads change
// that: a token's result does not depend on its batch, bit for bit.
//
// For one tile of tokens a weight is read once, a few rows side by side; for one token, which waits
// for memory, row after row with a few blocks side by side, where a row is a number of those. For more
// tokens, a block of rows and columns stays in the second-level cache while tile after tile of tokens
// passes, whose activations stay in the first-level cache.

#pragma once

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace subspec {
namespace {

constexpr int64_t kBlock = 1024;  // columns summed before the lanes are
constexpr int64_t kAhead = 1024;  // bytes of a row: prefetchers stop at the end of a page
constexpr int64_t kMaxTokens = 240;  // whose sums one thread holds
// Less is not worth waking a thread.
constexpr int64_t kFullBytesPerThread = 1 << 16;  // of weights
constexpr int64_t kFullValuesPerThread = 1 << 15;  // of activations to pack

// How a step of columns of a weight is multiplied. Activations are packed into steps once a call.
//   kStep: columns; kPhases: vectors of them; Packed: an activation; pack: of a step of columns

// Weights widened to float32. Of 32-bit words with two bfloat16 each, the lower halves are the even
// columns, so a step of them is multiplied as its even and its odd columns.
template <typename T>
struct WidenedProducts {
  using Element = T;
  using Packed = float;
  static constexpr int64_t kStep = 2 * kLanes;
  static constexpr int kPhases = 2;

  template <int kPhase>
  static SUBSPEC_INLINE Floats weight(const Element* w) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      const Ints words = load_ints(w);
      return as_floats(kPhase == 0 ? up<16>(words) : upper_halves(words));
    } else {
      return load(w + kPhase * kLanes);
    }
  }
  static SUBSPEC_INLINE Floats activation(const Packed* x) { return load(x); }
  static SUBSPEC_INLINE Floats multiply_add(Floats w, Floats x, Floats sum) {
    return subspec::multiply_add(w, x, sum);
  }
  static SUBSPEC_INLINE void pack(const Element* x, Packed* to) {
    store(to, weight<0>(x));
    store(to + kLanes, weight<1>(x));
  }
};

#ifdef __AVX512BF16__

// Both products of a word at once.
struct BFloat16Pairs {
  using Element = BFloat16;
  using Packed = BFloat16;
  static constexpr int64_t kStep = 2 * kLanes;
  static constexpr int kPhases = 1;

  template <int kPhase>
  static SUBSPEC_INLINE Ints weight(const Element* w) { return load_ints(w); }
  static SUBSPEC_INLINE Ints activation(const Packed* x) { return load_ints(x); }
  static SUBSPEC_INLINE Floats multiply_add(Ints w, Ints x, Floats sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
  }
  static SUBSPEC_INLINE void pack(const Element* x, Packed* to) {
    _mm512_storeu_si512(to, load_ints(x));
  }
};

#endif

// Rows of a tile of some tokens: their sums and a column of weights fill the registers, and enough
// sums are in the making that none waits for the one before.
// Rows of a unit: what one thread takes at least, whole tiles and whole vectors of results.
#ifdef __AVX512F__
constexpr int rows_for(int tokens) { return tokens <= 2 ? 8 : 4; }
constexpr int64_t kTileTokens = 6, kUnitRows = 16, kRowsInCache = 64;
#else
constexpr int rows_for(int tokens) { return tokens == 1 ? 6 : tokens == 2 ? 4 : 3; }
constexpr int64_t kTileTokens = 4, kUnitRows = 24, kRowsInCache = 72;
#endif

constexpr int kAbreast = 4;  // blocks of a row; alone, each product would wait for the one before

struct Part {
  int64_t columns;  // of the block, a multiple of the step
  int64_t tail;     // columns beyond them
  bool first;       // of the blocks
};

#define EACH_ROW _Pragma("GCC unroll 8") for (int r = 0; r < R; ++r)
#define EACH_TOKEN _Pragma("GCC unroll 6") for (int t = 0; t < T; ++t)

template <typename P, int kPhase, int R, int T>
SUBSPEC_INLINE void step(const typename P::Element* w, int64_t w_stride,
                         const typename P::Packed* x, int64_t x_stride, Floats (&sums)[R][T]) {
  decltype(P::template weight<kPhase>(w)) weights[R];
  EACH_ROW weights[r] = P::template weight<kPhase>(w + r * w_stride);
  EACH_TOKEN {
    const auto activation = P::activation(x + t * x_stride + kPhase * kLanes);
    EACH_ROW sums[r][t] = P::multiply_add(weights[r], activation, sums[r][t]);
  }
}

// Adds a part of R rows times T tokens to out[token][row].
template <typename P, int R, int T>
void tile(const typename P::Element* w, int64_t w_stride, int64_t behind,
          const typename P::Packed* x, int64_t x_stride, const Part& part, float* out) {
  using Element = typename P::Element;
  constexpr int64_t kAheadColumns = kAhead / sizeof(Element);
  Floats sums[R][T];
  EACH_ROW EACH_TOKEN sums[r][t] = zero_floats();
  for (int64_t k = 0; k < part.columns; k += P::kStep) {
    const int64_t ahead = k + kAheadColumns + (k + kAheadColumns < part.columns ? 0 : behind);
    EACH_ROW _mm_prefetch(reinterpret_cast<const char*>(w + r * w_stride + ahead), _MM_HINT_T0);
    step<P, 0>(w + k, w_stride, x + k, x_stride, sums);
    if constexpr (P::kPhases == 2) step<P, 1>(w + k, w_stride, x + k, x_stride, sums);
  }
  if (part.tail) {
    Element rest[R][P::kStep] = {};
    EACH_ROW std::memcpy(rest[r], w + r * w_stride + part.columns, part.tail * sizeof(Element));
    step<P, 0>(rest[0], P::kStep, x + part.columns, x_stride, sums);
    if constexpr (P::kPhases == 2) {
      step<P, 1>(rest[0], P::kStep, x + part.columns, x_stride, sums);
    }
  }
  EACH_TOKEN EACH_ROW {
    float* to = out + t * kRowsInCache + r;
    *to = part.first ? sum(sums[r][t]) : *to + sum(sums[r][t]);
  }
}

#define EACH_BLOCK _Pragma("GCC unroll 4") for (int b = 0; b < kAbreast; ++b)

// Adds a few whole blocks of one row, side by side, to *out. What comes after them in memory is read
// next.
template <typename P>
void blocks(const typename P::Element* w, const typename P::Packed* x, bool first, float* out) {
  Floats sums[kAbreast][1][1];
  EACH_BLOCK sums[b][0][0] = zero_floats();
  for (int64_t k = 0; k < kBlock; k += P::kStep) {
    EACH_BLOCK {
      const int64_t at = b * kBlock + k;
      _mm_prefetch(reinterpret_cast<const char*>(w + kAbreast * kBlock + at), _MM_HINT_T0);
      step<P, 0>(w + at, 0, x + at, 0, sums[b]);
      if constexpr (P::kPhases == 2) step<P, 1>(w + at, 0, x + at, 0, sums[b]);
    }
  }
  EACH_BLOCK *out = first && b == 0 ? sum(sums[b][0][0]) : *out + sum(sums[b][0][0]);
}

template <typename P>
struct Tile {
  using Call = void (*)(const typename P::Element*, int64_t, int64_t, const typename P::Packed*,
                        int64_t, const Part&, float*);
  int64_t rows;
  Call call;    // of so many rows
  Call single;  // of one
};

template <typename P, int... T>
constexpr std::array<Tile<P>, sizeof...(T)> tiles_of(std::integer_sequence<int, T...>) {
  return {Tile<P>{rows_for(T + 1), tile<P, rows_for(T + 1), T + 1>, tile<P, 1, T + 1>}...};
}

// By tokens of the tile, less one.
template <typename P>
constexpr auto kTiles = tiles_of<P>(std::make_integer_sequence<int, kTileTokens>());

template <typename P>
struct Full {
  using Element = typename P::Element;
  using Packed = typename P::Packed;

  const FullLinear& job;
  Packed* packed;  // [tokens][padded]
  int64_t padded;

  static int64_t padded_columns(int64_t columns) {
    return (columns + P::kStep - 1) / P::kStep * P::kStep;
  }
  static int64_t scratch(const FullLinear& job) {
    return job.tokens * padded_columns(job.columns) * int64_t(sizeof(Packed));
  }

  // Tiles of nearly equal size.
  int64_t tiles() const { return (job.tokens + kTileTokens - 1) / kTileTokens; }
  int64_t first_token(int64_t t) const { return job.tokens * t / tiles(); }

  const Element* weight(int64_t row) const {
    return static_cast<const Element*>(job.w) + row * job.columns;
  }

  void pack(int64_t token) const {
    const Element* x = static_cast<const Element*>(job.x) + token * job.x_stride;
    Packed* to = packed + token * padded;
    int64_t k = 0;
    for (; k + P::kStep <= job.columns; k += P::kStep) P::pack(x + k, to + k);
    if (k < job.columns) {
      Element rest[P::kStep] = {};
      std::memcpy(rest, x + k, (job.columns - k) * sizeof(Element));
      P::pack(rest, to + k);
    }
  }

  Part part(int64_t begin) const {
    const int64_t columns = std::min(kBlock, job.columns - begin);
    const int64_t whole = columns / P::kStep * P::kStep;
    return {whole, columns - whole, begin == 0};
  }

  // One block of columns of `rows` rows, for one tile of tokens.
  void multiply(int64_t row, int64_t rows, int64_t begin, int64_t t, float* sums) const {
    const int64_t first = first_token(t), count = first_token(t + 1) - first;
    const Tile<P>& tile = kTiles<P>[count - 1];
    const Part part = this->part(begin);
    const Packed* x = packed + first * padded + begin;
    float* out = sums + first * kRowsInCache;
    // How far behind the end of this block the one lies that is read for the first time after it.
    const bool along_row = tiles() == 1 && begin + kBlock < job.columns;
    const int64_t behind = along_row ? 0
                           : tiles() == 1 ? (tile.rows - 1) * job.columns
                                          : tile.rows * job.columns - part.columns;
    int64_t r = 0;
    for (; r + tile.rows <= rows; r += tile.rows) {
      tile.call(weight(row + r) + begin, job.columns, behind, x, padded, part, out + r);
    }
    for (; r < rows; ++r) {
      tile.single(weight(row + r) + begin, job.columns, 0, x, padded, part, out + r);
    }
  }

  // Rows [row, row + rows), at most kRowsInCache; sums: [tokens][kRowsInCache].
  void compute(int64_t row, int64_t rows, float* sums) const {
    if (job.tokens == 1 && job.columns % (kAbreast * kBlock) == 0) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t k = 0; k < job.columns; k += kAbreast * kBlock) {
          blocks<P>(weight(row + r) + k, packed + k, k == 0, sums + r);
        }
      }
    } else {
      // Of one tile of tokens, whole rows after each other; otherwise a block of columns of all.
      const int64_t together = tiles() == 1 ? kTiles<P>[job.tokens - 1].rows : rows;
      for (int64_t r = 0; r < rows; r += together) {
        for (int64_t k = 0; k < job.columns; k += kBlock) {
          for (int64_t t = 0; t < tiles(); ++t) {
            multiply(row + r, std::min(together, rows - r), k, t, sums + r);
          }
        }
      }
    }
    const Element* bias = job.bias ? static_cast<const Element*>(job.bias) + row : nullptr;
    for (int64_t m = 0; m < job.tokens; ++m) {
      Element* y = static_cast<Element*>(job.y) + m * job.rows + row;
      write_rows(sums + m * kRowsInCache, bias, y, rows);
    }
  }

  void run(ParallelFor parallel_for) const {
    const int64_t per_token = std::max<int64_t>(1, kFullValuesPerThread / job.columns);
    parallel(parallel_for, job.tokens, per_token, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) pack(m);
    });
    const int64_t unit = tiles() == 1 ? kUnitRows : kRowsInCache;
    const int64_t bytes = unit * job.columns * int64_t(sizeof(Element));
    const int64_t units = (job.rows + unit - 1) / unit;
    const int64_t grain = std::max<int64_t>(1, kFullBytesPerThread / bytes);
    parallel(parallel_for, units, grain, [&](int64_t begin, int64_t end) {
      alignas(64) float sums[kMaxTokens * kRowsInCache];
      for (int64_t u = begin; u < end; ++u) {
        compute(u * unit, std::min(unit, job.rows - u * unit), sums);
      }
    });
  }
};

template <typename Call>
SUBSPEC_INLINE void with_products(Type type, Call call) {
  switch (type) {
    case Type::kFloat32: return call(static_cast<WidenedProducts<float>*>(nullptr));
    case Type::kFloat16: return call(static_cast<WidenedProducts<Float16>*>(nullptr));
#ifdef __AVX512BF16__
    case Type::kBFloat16: return call(static_cast<BFloat16Pairs*>(nullptr));
#else
    case Type::kBFloat16: return call(static_cast<WidenedProducts<BFloat16>*>(nullptr));
#endif
  }
}

inline FullLinear some_tokens(const FullLinear& job, int64_t first) {
  const int64_t size = bytes_of(job.type);
  FullLinear part = job;
  part.x = static_cast<const char*>(job.x) + first * job.x_stride * size;
  part.y = static_cast<char*>(job.y) + first * job.rows * size;
  part.tokens = std::min(kMaxTokens, job.tokens - first);
  return part;
}

inline int64_t full_scratch(const FullLinear& job) {
  const FullLinear part = some_tokens(job, 0);
  int64_t bytes = 0;
  with_products(job.type, [&](auto* products) {
    bytes = Full<std::remove_pointer_t<decltype(products)>>::scratch(part);
  });
  return bytes;
}

inline void full_linear(const FullLinear& job, void* scratch, ParallelFor parallel_for) {
  with_products(job.type, [&](auto* products) {
    using P = std::remove_pointer_t<decltype(products)>;
    for (int64_t first = 0; first < job.tokens; first += kMaxTokens) {
      const FullLinear part = some_tokens(job, first);
      const int64_t padded = Full<P>::padded_columns(job.columns);
      Full<P>{part, static_cast<typename P::Packed*>(scratch), padded}.run(parallel_for);
    }
  });
}

}  // namespace
}  // namespace subspec
