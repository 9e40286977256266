// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-subspec authors
//
// All kernels of one level of instruction sets. Which one is said by the compiler's flags.

#include "full_linear.h"
#include "low_bit_linear.h"

extern "C" __attribute__((visibility("default"))) const subspec::Table* subspec_table() {
  static constexpr subspec::Table table = {subspec::full_scratch, subspec::full_linear,
                                           subspec::low_bit_scratch, subspec::low_bit_linear};
  return &table;
}
