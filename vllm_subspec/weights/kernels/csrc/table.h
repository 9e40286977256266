// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-subspec authors
//
// What a library of kernels offers. There is one for each level of instruction sets, compiled from
// the same source (level.cpp). They know nothing of torch; operators.cpp calls them through this
// table, so only that file depends on torch, and only on its stable interface.

#pragma once

#include <cstdint>

namespace subspec {

enum class Type : int32_t { kFloat32, kBFloat16, kFloat16 };

inline int64_t bytes_of(Type type) { return type == Type::kFloat32 ? 4 : 2; }

// Calls `body(begin, end, context)` for parts of [0, end) of at least `grain`, from many threads.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t end, int64_t grain, Body body, void* context);

// y[tokens][rows] = x[tokens][columns] times the transpose of w[rows][columns], plus bias[rows].
// x, w, bias and y are of one type and contiguous, but for rows of x, which may lie apart.
struct FullLinear {
  const void* x;
  int64_t x_stride;  // elements from one token to the next
  const void* w;
  const void* bias;  // null for none
  void* y;
  int64_t tokens;
  int64_t rows;
  int64_t columns;
  Type type;
};

// The same with a weight of 4- or 8-bit codes, packed as low_bit_linear.h says.
struct LowBitLinear {
  const void* x;
  Type x_type;
  const uint8_t* codes;
  const void* scales;
  const uint8_t* zeros;  // of 4-bit codes
  const void* bias;      // of y's type, null for none
  void* y;
  Type y_type;
  int64_t tokens;
  int64_t rows;
  int64_t columns;
  int64_t groups;  // of 4-bit codes
  int32_t bits;
};

struct Table {
  int64_t (*full_scratch)(const FullLinear&);  // bytes, aligned to 64, that the call needs
  void (*full_linear)(const FullLinear&, void* scratch, ParallelFor);
  int64_t (*low_bit_scratch)(const LowBitLinear&);
  void (*low_bit_linear)(const LowBitLinear&, void* scratch, ParallelFor);
};

}  // namespace subspec

// The one symbol of a library of kernels.
extern "C" const subspec::Table* subspec_table();
