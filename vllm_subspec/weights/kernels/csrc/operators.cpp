// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-subspec authors
//
// torch's operators over the kernels of one level. Only torch's stable interface is used, so that
// one build serves later versions of torch, too.

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <optional>
#include <string>

#include "table.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::atomic<const subspec::Table*> current{nullptr};

const subspec::Table& table() {
  const subspec::Table* found = current;
  STD_TORCH_CHECK(found != nullptr, "vllm_subspec: no kernels have been loaded");
  return *found;
}

// Computes with the kernels of a library from now on.
void use_kernels(std::string library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  STD_TORCH_CHECK(handle != nullptr, dlerror());
  using Get = const subspec::Table* (*)();
  const auto get = reinterpret_cast<Get>(dlsym(handle, "subspec_table"));
  STD_TORCH_CHECK(get != nullptr, library, " is not a library of kernels");
  current = get();
}

void parallel_for(int64_t end, int64_t grain, subspec::Body body, void* context) {
  if (end <= grain) {
    if (end > 0) body(0, end, context);
    return;
  }
  torch::stable::parallel_for(0, end, grain, [&](int64_t first, int64_t last) {
    body(first, last, context);
  });
}

subspec::Type type_of(ScalarType type, const char* what) {
  switch (type) {
    case ScalarType::Float: return subspec::Type::kFloat32;
    case ScalarType::BFloat16: return subspec::Type::kBFloat16;
    case ScalarType::Half: return subspec::Type::kFloat16;
    default: STD_TORCH_CHECK(false, "vllm_subspec: ", what, " is not float32, bfloat16 or float16");
  }
}

// Rows of `x` that each lie in one piece: what the last dimension does not say is kept.
Tensor rows_in_pieces(const Tensor& x) {
  return x.stride(1) == 1 || x.size(1) == 1 ? x : torch::stable::contiguous(x);
}

Tensor bytes(int64_t count, const Tensor& like) {
  return torch::stable::new_empty(like, {count + 64}, ScalarType::Byte);
}

void* aligned(const Tensor& memory) {
  const auto at = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  return reinterpret_cast<void*>((at + 63) / 64 * 64);
}

Tensor linear(Tensor x, Tensor w, std::optional<Tensor> bias) {
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1),
                  "vllm_subspec::linear: x [M, K] and w [N, K]");
  STD_TORCH_CHECK(x.scalar_type() == w.scalar_type() &&
                      (!bias || bias->scalar_type() == w.scalar_type()),
                  "vllm_subspec::linear: x, w and bias are of one type");
  STD_TORCH_CHECK(w.is_contiguous() && (!bias || bias->is_contiguous()),
                  "vllm_subspec::linear: w and bias are contiguous");
  const Tensor dense = rows_in_pieces(x);
  const int64_t tokens = x.size(0), rows = w.size(0), columns = w.size(1);
  STD_TORCH_CHECK(!bias || bias->numel() == rows, "vllm_subspec::linear: bias [N]");
  Tensor y = torch::stable::new_empty(x, {tokens, rows});
  if (tokens == 0 || rows == 0) return y;
  const subspec::FullLinear job = {
      dense.const_data_ptr(),
      dense.stride(0),
      w.const_data_ptr(),
      bias ? bias->const_data_ptr() : nullptr,
      y.mutable_data_ptr(),
      tokens,
      rows,
      columns,
      type_of(w.scalar_type(), "w"),
  };
  const subspec::Table& kernels = table();
  const Tensor scratch = bytes(kernels.full_scratch(job), x);
  kernels.full_linear(job, aligned(scratch), parallel_for);
  return y;
}

Tensor low_bit_linear(Tensor x, Tensor codes, Tensor scales, std::optional<Tensor> zeros,
                      std::optional<Tensor> bias, int64_t rows, int64_t bits, ScalarType dtype) {
  STD_TORCH_CHECK(bits == 4 || bits == 8, "vllm_subspec::low_bit_linear: bits ", bits);
  STD_TORCH_CHECK((bits == 4) == zeros.has_value(),
                  "vllm_subspec::low_bit_linear: only 4-bit codes have zero points");
  STD_TORCH_CHECK(x.dim() == 2, "vllm_subspec::low_bit_linear: x [M, K]");
  const int64_t tokens = x.size(0), columns = x.size(1), blocks = (rows + 15) / 16;
  const int64_t filled = (columns + 15) / 16 * 16;
  const int64_t groups = bits == 4 ? scales.size(1) : 1;
  STD_TORCH_CHECK(codes.is_contiguous() && scales.is_contiguous() &&
                      codes.scalar_type() == ScalarType::Byte &&
                      scales.scalar_type() == (bits == 4 ? ScalarType::BFloat16 : ScalarType::Float),
                  "vllm_subspec::low_bit_linear: the weight is not as it was packed");
  STD_TORCH_CHECK(codes.numel() == blocks * 16 * filled * bits / 8 &&
                      scales.numel() == blocks * groups * 16 &&
                      (!zeros || (zeros->is_contiguous() && zeros->numel() == scales.numel() &&
                                  zeros->scalar_type() == ScalarType::Byte)),
                  "vllm_subspec::low_bit_linear: ", columns, " columns of x and ", rows,
                  " rows do not match the packed weight");
  STD_TORCH_CHECK(bits == 8 || (groups > 0 && columns % groups == 0 &&
                                columns / groups % 32 == 0 && columns / groups <= 256),
                  "vllm_subspec::low_bit_linear: ", groups, " groups of ", columns, " columns");
  STD_TORCH_CHECK(!bias || bias->numel() == rows, "vllm_subspec::low_bit_linear: bias [N]");
  Tensor y = torch::stable::new_empty(x, {tokens, rows}, dtype);
  if (tokens == 0 || rows == 0) return y;
  const Tensor dense = torch::stable::contiguous(x);
  std::optional<Tensor> offset;
  if (bias) offset = torch::stable::contiguous(torch::stable::to(*bias, dtype));
  const subspec::LowBitLinear job = {
      dense.const_data_ptr(),
      type_of(x.scalar_type(), "x"),
      static_cast<const uint8_t*>(codes.const_data_ptr()),
      scales.const_data_ptr(),
      zeros ? static_cast<const uint8_t*>(zeros->const_data_ptr()) : nullptr,
      offset ? offset->const_data_ptr() : nullptr,
      y.mutable_data_ptr(),
      type_of(dtype, "dtype"),
      tokens,
      rows,
      columns,
      groups,
      int32_t(bits),
  };
  const subspec::Table& kernels = table();
  const Tensor scratch = bytes(kernels.low_bit_scratch(job), x);
  kernels.low_bit_linear(job, aligned(scratch), parallel_for);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_subspec, library) {
  library.def("use_kernels(str library) -> ()");
  library.def("linear(Tensor x, Tensor w, Tensor? bias) -> Tensor");
  library.def(
      "low_bit_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int rows, "
      "int bits, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_subspec, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("low_bit_linear", TORCH_BOX(&low_bit_linear));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_subspec, CompositeExplicitAutograd, library) {
  library.impl("use_kernels", TORCH_BOX(&use_kernels));
}
