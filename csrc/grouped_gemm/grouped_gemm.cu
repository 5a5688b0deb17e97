// SPDX-License-Identifier: MIT
// grouped_gemm on CUDA: a call as a product of groups, and the kernel that takes it.
//
//   compute capability 9.x, 16-bit operands that TMA can read    wgmma       gemm/sm90
//   everything else                                              mma.sync    gemm/sm80
//
// The choice depends on addresses, strides, dtypes and sizes, never on values: no host sync.
#include <algorithm>

#include "common/dtype.h"
#include "device/launch.cuh"
#include "gemm/product.h"
#include "grouped_gemm/grouped_gemm.h"

namespace kimi {
namespace {

// 16 bytes divide the address and the distance of rows, in elements of `dtype`.
bool divides(const void* address, int64_t stride, kimi_dtype dtype) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && stride * size_of(dtype) % 16 == 0;
}

bool is_wide(const grouped::Product& p) {
  if (p.epilogue == grouped::Epilogue::kStore)
    return divides(p.out, p.out_row_stride, p.out_dtype) &&
           divides(p.bias, p.bias ? p.cols : 0, p.dtype) &&
           (p.ragged == grouped::Ragged::kRows || divides(p.out, p.out_group_stride, p.out_dtype));
  return divides(p.gate_up, p.cols, p.dtype) && divides(p.grad_gate_up, p.cols, p.dtype) &&
         divides(p.hidden, p.cols, p.dtype);
}

}  // namespace

namespace grouped {

Status product_cuda(const Product& product, void* stream) {
  Product p = product;
  if (p.cols == 0 || p.num_groups == 0) return Status::ok();
  if (p.ragged == Ragged::kRows ? p.num_rows == 0 : p.rows == 0) return Status::ok();
  p.wide_out = is_wide(p);
  int sm = 0;
  KIMI_RETURN_IF_ERROR(device_sm(sm));
  if (sm / 10 == 9 && serves_sm90(p)) return product_sm90(p, stream);
  if (sm < kMinSm)
    return error(KIMI_UNSUPPORTED, "grouped_gemm: device: expected compute capability ",
                 kMinSm / 10, ".", kMinSm % 10, " or above, got ", sm / 10, ".", sm % 10);
  return product_sm80(p, stream);
}

}  // namespace grouped

Status grouped_gemm_cuda(const GroupedGemmParams& p, void* stream) {
  grouped::Product product{};
  product.ragged = grouped::Ragged::kRows;
  product.epilogue = grouped::Epilogue::kStore;
  product.dtype = p.dtype;
  product.p = {p.a, p.a_row_stride, p.k == 1 ? 1 : p.a_k_stride, 0, nullptr, 1};
  product.q = {p.b, p.b_n_stride, p.k == 1 ? 1 : p.b_k_stride, p.b_expert_stride, nullptr, 1};
  product.offsets = p.offsets;
  product.num_rows = p.num_rows;
  product.depth = p.k;
  product.cols = p.n;
  product.num_groups = p.num_experts;
  product.out = p.out;
  product.out_row_stride = p.n;
  product.out_dtype = p.out_dtype;
  product.bias = p.bias;
  return grouped::product_cuda(product, stream);
}

Status grouped_gemm_wgrad_cuda(const GroupedGemmWgradParams& p, void* stream) {
  // Columns of C are those elements of out that lie side by side.
  const bool n_contiguous = p.out_n_stride == 1 || p.n == 1;
  const grouped::Matrix a = {p.a, p.a_k_stride, p.a_row_stride, 0, nullptr, 1};
  const grouped::Matrix dc = {p.dc, p.dc_n_stride, p.dc_row_stride, 0, nullptr, 1};
  grouped::Product product{};
  product.ragged = grouped::Ragged::kDepth;
  product.epilogue = grouped::Epilogue::kStore;
  product.dtype = p.dtype;
  product.p = n_contiguous ? a : dc;
  product.q = n_contiguous ? dc : a;
  product.offsets = p.offsets;
  product.num_rows = p.num_rows;
  product.rows = n_contiguous ? p.k : p.n;
  product.cols = n_contiguous ? p.n : p.k;
  product.num_groups = p.num_experts;
  product.out = p.out;
  product.out_row_stride = n_contiguous ? p.out_k_stride : p.out_n_stride;
  product.out_group_stride = p.out_expert_stride;
  product.out_dtype = p.out_dtype;
  product.accumulate = p.accumulate != 0;
  return grouped::product_cuda(product, stream);
}

}  // namespace kimi
