// SPDX-License-Identifier: MIT
// The end of a layer on CUDA: out[t] = sum_k weights[t, k] rows[row_map[t, k]], or without weights.
#pragma once

#include "permute/permute.h"

namespace kimi::experts {

template <class Params>
Status sum_rows(const Params& p, const void* rows, const float* weights, void* out, void* stream) {
  UnpermuteParams sum{};
  sum.y = rows;
  sum.row_map = p.row_map;
  sum.weights = weights;
  sum.x = out;
  sum.num_tokens = p.num_tokens;
  sum.hidden = p.hidden;
  sum.y_stride = p.hidden;
  sum.top_k = p.top_k;
  sum.dtype = p.dtype;
  return unpermute_cuda(sum, stream);
}

}  // namespace kimi::experts
