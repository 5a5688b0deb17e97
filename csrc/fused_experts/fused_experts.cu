// SPDX-License-Identifier: MIT
// fused_experts on CUDA: one launch a product, and the sum of a token's rows as a pass of its own.
//
//   forward   x --gather or permute--> [g; u] --act--> h [R, F] --w_down--> rows [R, H] --unpermute--> y
//   backward  dy --gather--> c --dact--> d[g; u] [R, 2F], weight times h [R, F], partial <c, h>
//             dw_down, dw_gate_up: products over the rows of a group, dy and x gathered by row
//             db_gate_up, db_down: sums of the rows of a group, a thread a column, not tuned
//             d[g; u] --w_gate_up--> rows [R, H] --unpermute--> dx
//
// A second activation never exists in memory. Rows are in the dtype of x: a token's K rows are
// rounded before they are summed in fp32, as in torch; 2 R H bytes written and read.
//
// On Hopper wide experts with many rows get their tokens permuted, through the same [R, H], for TMA
// loads them faster than threads gather: a pass of 0.84 ps x R H, measured on an H100, against 4 R H F
// operations at 520 TFLOP/s gathered and 700 by TMA pays from a width of 425 on. Few rows are
// gathered: a launch would cost more.
//
// 48 experts of K2 (T 4096, K 8, H 7168, F 2048, bf16, 683 rows an expert): 1.92 + 0.96 TFLOP. An
// H100 takes 5.8 ms, 501 TFLOP/s: the gathering product keeps 63 % of the tensor pipe busy, the
// second one 77 % (predicted for an H200: 4.9 ms). With all 384 experts (85 rows each) the 33.8 GB
// of their weights are the limit.
#include <algorithm>
#include <utility>

#include "common/dtype.h"
#include "common/workspace.h"
#include "device/launch.cuh"
#include "fused_experts/activate_fp8.h"
#include "fused_experts/activate_product.h"
#include "fused_experts/fused_experts.h"
#include "fused_experts/small_gradients.h"
#include "fused_experts/sum_rows.h"
#include "gemm/sm90/job.h"
#include "permute/permute.h"

namespace kimi {
namespace {

using experts::ActivateParams;
using experts::Pass;
using gemm::Grouping;
using gemm::Matrix;
using gemm::Product;

constexpr int64_t kAlign = 256;  // of the pieces of a workspace

int64_t partials(int64_t width) { return ceil_div(width, experts::kPartial); }

template <class Params>
Product product_of(const Params& p, Grouping grouping, const Matrix& a, const Matrix& b) {
  Product product{};
  product.grouping = grouping;
  product.dtype = p.dtype;
  product.a = a;
  product.b = b;
  product.groups = {p.offsets, p.num_tokens * p.top_k, p.num_experts};
  product.overlaps = true;
  return product;
}
template <class Params>
ActivateParams activate_of(const Params& p, void* gate_up, void* hidden, const float* weights) {
  ActivateParams activate{};
  activate.activation = experts::Activation::of(p);
  activate.gate_up = gate_up;
  activate.hidden = hidden;
  activate.source = p.source;
  activate.weights = weights;
  return activate;
}

template <class Params>
Matrix tokens(const Params& p, const void* x, int64_t stride) {
  return {x, stride, 1, 0, p.source, p.top_k};
}
// The same with tokens as depth.
Matrix as_depth(Matrix m) {
  std::swap(m.outer_stride, m.depth_stride);
  return m;
}
Matrix rows(const void* x, int64_t width) { return {x, width, 1}; }
Matrix columns(const void* x, int64_t width) { return {x, 1, width}; }
// w[e] as B: its rows, or its columns, are columns of C.
Matrix weights_of(const kimi_expert_weights& w) {
  return {w.data, w.row_stride, w.column_stride, w.expert_stride};
}
Matrix transposed(const kimi_expert_weights& w) {
  return {w.data, w.column_stride, w.row_stride, w.expert_stride};
}

// The tokens of the experts' rows: to be gathered, or permuted into `room`, [R, H].
template <class Params>
Status expert_rows(const Params& p, const void* x, int64_t stride, void* room, Matrix* out,
                   void* stream) {
  const gemm::sm90::Trial& limits = gemm::sm90::trial();
  bool hopper = false;
  KIMI_RETURN_IF_ERROR(gemm::is_hopper("fused_experts", &hopper));
  *out = tokens(p, x, stride);
  const int64_t pairs = p.num_tokens * p.top_k, size = size_of(p.dtype);
  if (!hopper || size != 2 || pairs <= limits.gather || p.width < limits.permute)
    return Status::ok();
  *out = rows(room, p.hidden);
  PermuteParams permute{};
  permute.x = x;
  permute.row_map = p.row_map;
  permute.source = p.source;
  permute.y = room;
  permute.num_tokens = p.num_tokens;
  permute.num_rows = pairs;
  permute.row_bytes = p.hidden * size;
  permute.x_stride_bytes = stride * size;
  permute.top_k = p.top_k;
  return permute_cuda(permute, stream);
}

// [g; u] of the tokens, and h, times `weights` unless those are nullptr: both, or one of them.
// `room`: of expert_rows.
template <class Params>
Status gate_up(const Params& p, void* room, void* saved, void* hidden, const float* weights,
               void* stream) {
  Matrix x;
  KIMI_RETURN_IF_ERROR(expert_rows(p, p.x, p.x_stride, room, &x, stream));
  Product product = product_of(p, Grouping::kM, x, weights_of(p.w_gate_up));
  product.groups.older = x.data == room;  // the kernel before has written these rows alone
  product.depth = p.hidden;
  product.cols = p.width;
  ActivateParams activate = activate_of(p, saved, hidden, weights);
  activate.bias = p.b_gate_up;
  return activate_product(product, activate, Pass::kForward, stream);
}

// out[t] = sum_k weights[t, k] (A[row] B[e]^T + bias[e]), or without weights or bias, through rows
// [R, H]. `after_a`: the last kernel launched writes A and nothing else that is read here.
template <class Params>
Status sum_of_products(const Params& p, Matrix left, Matrix right, int64_t depth,
                       const float* weights, const void* bias, void* rows_of_product, void* out,
                       bool after_a, void* stream) {
  Product product = product_of(p, Grouping::kM, left, right);
  product.groups.older = after_a;
  product.depth = depth;
  product.cols = p.hidden;
  KIMI_RETURN_IF_ERROR(product_cuda("fused_experts", product,
                                    {rows_of_product, p.hidden, 0, p.dtype, bias}, stream));
  return experts::sum_rows(p, rows_of_product, weights, out, stream);
}

// out[e] = left[rows of e]^T right[rows of e], [rows, cols]
Status outer_products(const FusedExpertsBackwardParams& p, Matrix left, int64_t rows, Matrix right,
                      int64_t cols, void* out, void* stream) {
  Product product = product_of(p, Grouping::kK, left, right);
  product.rows = rows;
  product.cols = cols;
  return product_cuda("fused_experts", product, {out, cols, rows * cols, p.dtype}, stream);
}

struct ForwardWorkspace {
  Pieces pieces;
  char *hidden, *rows;  // [R, F], [R, H]

  ForwardWorkspace(const FusedExpertsParams& p, void* workspace) : pieces(workspace, kAlign) {
    const int64_t pairs = p.num_tokens * p.top_k, bytes = size_of(p.dtype);
    hidden = pieces.take(pairs, p.width, bytes);
    rows = pieces.take(pairs, p.hidden, bytes);
  }
};

struct BackwardWorkspace {
  Pieces pieces;
  char *grad_gate_up, *hidden, *rows, *gate_up;  // [R, 2F], [R, F], [R, H], [R, 2F] or none
  float* partial;                                // [R, partials]

  BackwardWorkspace(const FusedExpertsBackwardParams& p, void* workspace)
      : pieces(workspace, kAlign) {
    const int64_t pairs = p.num_tokens * p.top_k, bytes = size_of(p.dtype);
    grad_gate_up = pieces.take(pairs, 2, p.width, bytes);
    hidden = pieces.take(pairs, p.width, bytes);
    partial = pieces.take<float>(pairs, partials(p.width));
    rows = pieces.take(pairs, p.hidden, bytes);
    gate_up = pieces.take(p.gate_up ? 0 : pairs, 2, p.width, bytes);
  }
};

}  // namespace

size_t fused_experts_workspace_bytes_cuda(const FusedExpertsParams& p) {
  if (experts::is_fp8(p)) return experts::fp8_workspace_bytes(p);
  return static_cast<size_t>(ForwardWorkspace(p, nullptr).pieces.bytes());
}

Status fused_experts_cuda(const FusedExpertsParams& p, void* stream) {
  if (p.num_tokens == 0) return Status::ok();
  if (experts::is_fp8(p)) return p.hidden > 0 ? experts::fp8_forward(p, stream) : Status::ok();
  const ForwardWorkspace workspace(p, p.workspace);
  KIMI_RETURN_IF_ERROR(gate_up(p, workspace.rows, p.gate_up, workspace.hidden,
                               p.weights_first ? p.weights : nullptr, stream));
  if (p.hidden == 0) return Status::ok();  // [g; u] alone: the biases
  return sum_of_products(p, rows(workspace.hidden, p.width), weights_of(p.w_down), p.width,
                         p.weights_first ? nullptr : p.weights, p.b_down, workspace.rows, p.y,
                         p.num_tokens * p.width > 0, stream);
}

size_t fused_experts_backward_workspace_bytes_cuda(const FusedExpertsBackwardParams& p) {
  return static_cast<size_t>(BackwardWorkspace(p, nullptr).pieces.bytes());
}

Status fused_experts_backward_cuda(const FusedExpertsBackwardParams& p, void* stream) {
  const BackwardWorkspace workspace(p, p.workspace);
  const void* saved = p.gate_up;
  if (!saved) {
    KIMI_RETURN_IF_ERROR(gate_up(p, workspace.rows, workspace.gate_up, nullptr, nullptr, stream));
    saved = workspace.gate_up;
  }
  Matrix dy, x;
  KIMI_RETURN_IF_ERROR(expert_rows(p, p.dy, p.dy_stride, workspace.rows, &dy, stream));
  Product product = product_of(p, Grouping::kM, dy, transposed(p.w_down));
  product.groups.older = dy.data == workspace.rows;
  product.depth = p.hidden;
  product.cols = p.width;
  ActivateParams activate = activate_of(p, const_cast<void*>(saved), workspace.hidden, p.weights);
  activate.grad_gate_up = workspace.grad_gate_up;
  activate.partial = workspace.partial;
  KIMI_RETURN_IF_ERROR(activate_product(product, activate, Pass::kBackward, stream));
  if (p.grad_weights)
    KIMI_RETURN_IF_ERROR(experts::grad_weights_cuda(p, workspace.partial, stream));
  if (p.grad_b_gate_up)
    KIMI_RETURN_IF_ERROR(
        experts::row_sums_cuda(p, workspace.grad_gate_up, 2 * p.width, p.grad_b_gate_up, stream));
  if (p.grad_b_down)
    KIMI_RETURN_IF_ERROR(experts::weighted_token_sums_cuda(p, p.grad_b_down, stream));
  if (p.grad_w_down)
    KIMI_RETURN_IF_ERROR(outer_products(p, as_depth(dy), p.hidden,
                                        columns(workspace.hidden, p.width), p.width, p.grad_w_down,
                                        stream));
  if (p.grad_w_gate_up) {
    KIMI_RETURN_IF_ERROR(expert_rows(p, p.x, p.x_stride, workspace.rows, &x, stream));
    KIMI_RETURN_IF_ERROR(outer_products(p, columns(workspace.grad_gate_up, 2 * p.width),
                                        2 * p.width, as_depth(x), p.hidden, p.grad_w_gate_up,
                                        stream));
  }
  if (!p.dx || p.num_tokens == 0 || p.hidden == 0) return Status::ok();
  return sum_of_products(p, rows(workspace.grad_gate_up, 2 * p.width), transposed(p.w_gate_up),
                         2 * p.width, nullptr, nullptr, workspace.rows, p.dx, false, stream);
}

}  // namespace kimi
