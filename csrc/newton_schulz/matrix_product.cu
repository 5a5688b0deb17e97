// SPDX-License-Identifier: MIT
// matrix_product on CUDA: a batch of one matrix (gemm/product.h).
#include "gemm/product.h"
#include "newton_schulz/newton_schulz.h"

namespace kimi {

Status matrix_product_cuda(const MatrixProductParams& p, void* stream) {
  gemm::Product product{};
  product.grouping = gemm::Grouping::kBatch;
  product.dtype = p.dtype;
  product.a = {p.a, p.a_row_stride, p.depth == 1 ? 1 : p.a_col_stride};
  product.b = {p.b, p.b_col_stride, p.depth == 1 ? 1 : p.b_row_stride};
  product.groups = {nullptr, 0, 1};
  product.rows = p.rows;
  product.depth = p.depth;
  product.cols = p.cols;
  product.lower = p.symmetric != 0;
  gemm::AffineParams out{p.d, p.d_stride, 0, p.dtype};
  out.c = p.c;
  out.c_row_stride = p.c_stride;
  out.alpha = p.alpha;
  out.beta = p.beta;
  out.delta = p.delta;
  return gemm::affine_cuda("matrix_product", product, out, stream);
}

}  // namespace kimi
