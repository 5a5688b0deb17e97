// SPDX-License-Identifier: MIT
// Argument checks that forward and backward share.
#pragma once

#include <cmath>
#include <limits>

#include "common/dtype.h"
#include "common/engine.h"
#include "common/strides.h"
#include "fused_experts/fused_experts.h"
#include "grouped_gemm/check.h"
#include "grouped_gemm/grouped_gemm.h"

namespace kimi::experts {

template <class Params>
bool sizes_are_good(const Params& p) {
  return p.num_tokens >= 0 && p.hidden >= 0 && p.width >= 0 && p.num_experts >= 1 && p.top_k >= 1 &&
         is_dtype(p.dtype) && double(p.num_tokens) * p.top_k <= std::numeric_limits<int32_t>::max();
}

template <class Params>
Status check_activation(const char* op, const Params& p) {
  const kimi_activation_numbers& n = p.numbers;
  const auto above_zero = [&](const char* name, float x, bool may_be_infinite) {
    if (x > 0 && (may_be_infinite || x < INFINITY)) return Status::ok();
    return invalid(op, ": activation: expected ", name, " above 0",
                   may_be_infinite ? ", infinity for none" : " and finite", ", got ", x,
                   "; set the numbers of this activation");
  };
  switch (p.activation) {
    case KIMI_ACTIVATION_SILU:
    case KIMI_ACTIVATION_GELU:
    case KIMI_ACTIVATION_GELU_TANH:
    case KIMI_ACTIVATION_RELU2:
      return Status::ok();
    case KIMI_ACTIVATION_SITU:
      KIMI_RETURN_IF_ERROR(above_zero("gate_bound", n.gate_bound, false));
      return above_zero("up_bound", n.up_bound, true);
    case KIMI_ACTIVATION_SWIGLU:
      KIMI_RETURN_IF_ERROR(above_zero("gate_limit", n.gate_limit, true));
      KIMI_RETURN_IF_ERROR(above_zero("silu_limit", n.silu_limit, true));
      KIMI_RETURN_IF_ERROR(above_zero("up_limit", n.up_limit, true));
      if (std::isfinite(n.alpha) && std::isfinite(n.shift)) return Status::ok();
      return invalid(op, ": activation: expected a finite alpha and shift, got ", n.alpha, " and ",
                     n.shift, "; set the numbers of this activation");
  }
  return invalid(op, ": activation: expected a kimi_activation (0..5), got ", int(p.activation),
                 "; choose one of these");
}

// `workspace_bytes`: that the op asks for; on a GPU none where there are no tokens.
template <class Params>
Status check_sizes(const char* op, const Params& p, kimi_device device, size_t workspace_bytes) {
  if (!sizes_are_good(p))
    return invalid(op,
                   ": T, H, F, E, K, dtype: expected sizes of 0 or more (E, K: 1 or more), T K "
                   "below 2^31 and a kimi_dtype (0..2), got ",
                   p.num_tokens, ", ", p.hidden, ", ", p.width, ", ", p.num_experts, ", ", p.top_k,
                   ", ", int(p.dtype), "; split the tokens or convert them");
  KIMI_RETURN_IF_ERROR(check_activation(op, p));
  if (!p.offsets || (!p.workspace && workspace_bytes > 0) ||
      (p.num_tokens > 0 && (!p.source || !p.row_map || !p.weights)))
    return invalid(
        op,
        ": weights, row_map, source, offsets, workspace: expected pointers, got NULL; "
        "pass kimi_permute_plan's outputs and the memory that _workspace_bytes() asks for");
  // A plan on a GPU is not read here: no operation waits for the device.
  if (device == KIMI_DEVICE_CUDA) return Status::ok();
  KIMI_RETURN_IF_ERROR(
      check_offsets(op, p.offsets, p.num_experts, p.num_tokens * int64_t(p.top_k)));
  // The maps are indices into memory: a plan of other sizes must not lead out of it.
  const int64_t rows = p.offsets[p.num_experts - 1], pairs = p.num_tokens * p.top_k;
  for (int64_t row = 0; row < rows; ++row)
    if (p.source[row] < 0 || p.source[row] >= pairs)
      return invalid(op, ": source[", row, "]: expected 0..", pairs - 1, ", got ", p.source[row],
                     "; pass the plan of these ids, with align 1");
  for (int64_t pair = 0; pair < pairs; ++pair)
    if (p.row_map[pair] < -1 || p.row_map[pair] >= rows)
      return invalid(op, ": row_map[", pair, "]: expected -1..", rows - 1, ", got ",
                     p.row_map[pair], "; pass the plan of these ids, with align 1");
  return Status::ok();
}

// `empty`: there is no element, and may be no memory.
inline Status check_weights(const char* op, const char* name, const kimi_expert_weights& w,
                            kimi_dtype dtype, bool may_be_quantised, bool empty) {
  const bool quantised =
      w.storage == KIMI_STORAGE_FP8_BLOCK || w.storage == KIMI_STORAGE_INT4_GROUP;
  if (int(w.storage) != int(dtype) && !(quantised && may_be_quantised))
    return invalid(op, ": ", name, ": expected the dtype of x",
                   may_be_quantised ? " or a quantised storage" : "", ", got storage ",
                   int(w.storage),
                   may_be_quantised ? "; convert it" : "; convert or dequantise it");
  if (!w.data && !empty)
    return invalid(op, ": ", name, ": expected a pointer, got NULL; only an empty one may be NULL");
  if (quantised && ((!w.scale && !empty) || w.column_stride != 1))
    return invalid(op, ": ", name,
                   ": expected a scale and contiguous columns beside quantised weights,"
                   " got ",
                   w.scale ? "a column stride of " : "no scale and a column stride of ",
                   w.column_stride, "; pass the weight as it was quantised");
  if (w.storage == KIMI_STORAGE_INT4_GROUP && (w.row_stride % 2 || w.expert_stride % 2))
    return invalid(op, ": ", name,
                   ": expected rows of int4 weights to begin at a byte, got strides of ",
                   w.expert_stride, " and ", w.row_stride, " elements; pad the columns to 8");
  return Status::ok();
}

// None left zero.
template <class Params>
Status check_layer_strides(const char* op, const Params& p) {
  const auto of_weights = [&](const char* name, const kimi_expert_weights& w, int64_t rows,
                              int64_t columns) {
    return check_strides(
        op, name,
        {{p.num_experts, w.expert_stride}, {rows, w.row_stride}, {columns, w.column_stride}});
  };
  KIMI_RETURN_IF_ERROR(of_weights("w_gate_up: strides", p.w_gate_up, 2 * p.width, p.hidden));
  KIMI_RETURN_IF_ERROR(of_weights("w_down: strides", p.w_down, p.hidden, p.width));
  return p.hidden > 0 ? check_strides(op, "x_stride", {{p.num_tokens, p.x_stride}}) : Status::ok();
}

}  // namespace kimi::experts
