// SPDX-License-Identifier: MIT
// grouped_gemm on CUDA: a call as a product of groups (gemm/product.h).
#include "common/dtype.h"
#include "gemm/product.h"
#include "grouped_gemm/grouped_gemm.h"

namespace kimi {

Status grouped_gemm_cuda(const GroupedGemmParams& p, void* stream) {
  gemm::Product product{};
  product.grouping = gemm::Grouping::kM;
  product.dtype = p.dtype;
  product.a = {p.a, p.a_row_stride, p.k == 1 ? 1 : p.a_k_stride};
  product.b = {p.b, p.b_n_stride, p.k == 1 ? 1 : p.b_k_stride, p.b_expert_stride};
  product.groups = {p.offsets, p.num_rows, p.num_experts, false, p.starts};
  product.depth = p.k;
  product.cols = p.n;
  gemm::StoreParams out{};
  out.out = p.out;
  out.row_stride = p.n;
  out.dtype = p.out_dtype;
  out.bias = p.bias;
  out.accumulate = p.accumulate != 0;
  return gemm::product_cuda("grouped_gemm", product, out, stream);
}

Status grouped_gemm_wgrad_cuda(const GroupedGemmWgradParams& p, void* stream) {
  // Columns of C are those elements of out that lie side by side.
  const bool n_contiguous = p.out_n_stride == 1 || p.n == 1;
  const gemm::Matrix a = {p.a, p.a_k_stride, p.a_row_stride};
  const gemm::Matrix dc = {p.dc, p.dc_n_stride, p.dc_row_stride};
  gemm::Product product{};
  product.grouping = gemm::Grouping::kK;
  product.dtype = p.dtype;
  product.a = n_contiguous ? a : dc;
  product.b = n_contiguous ? dc : a;
  product.groups = {p.offsets, p.num_rows, p.num_experts, false, p.starts};
  product.rows = n_contiguous ? p.k : p.n;
  product.cols = n_contiguous ? p.n : p.k;
  gemm::StoreParams out{};
  out.out = p.out;
  out.row_stride = n_contiguous ? p.out_k_stride : p.out_n_stride;
  out.group_stride = p.out_expert_stride;
  out.dtype = p.out_dtype;
  out.accumulate = p.accumulate != 0;
  return gemm::product_cuda("grouped_gemm_wgrad", product, out, stream);
}

}  // namespace kimi
