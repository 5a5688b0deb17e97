// SPDX-License-Identifier: MIT
// qk_clip: the largest attention logit of each head, and the scaling of weight rows by head.
//
//   S[h] = scale * max over batch b, query i, visible key j of q[b, h, i] . k[b, h / group, j]
//          causal: j <= i + keys - queries. NaN where a visible logit is NaN, -inf where there is
//          none. Plain maximum, not of magnitudes. Products in fp32 as in gemm/cpu/block.h.
//
//            keys, strips of 32 ->
//   queries  [##][##][# ]            a task: one block of queries of one head against its keys; a
//   block    [##][##][##][# ]        maximum where a product would be stored, so the scores are
//            above the diagonal:     never in memory; strips beyond the last visible key are not
//            not computed            multiplied
//
// Cost: 2 B heads Sq Sk D operations, half of them with causal; q is read once, k once for each
// block of queries. Maxima do not depend on order, their NaNs and the blocks not on threads.
//
//   clip_rows   gamma[h] = min(1, tau / S[h]), 1 for S that are not finite or not positive; the
//               smallest of a group where a layer has groups. Of each head's block of a weight the
//               `shared` first rows take gamma^power, the `whole` next ones gamma, rounded once;
//               rows whose factor is 1 are not written, and of heads whose gamma is 1 nothing is
//               read. All layers, their weights, biases and copies in one call: one launch on
//               CUDA. gamma^power is exp(power log gamma) in fp64, rounded once.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/dtype.h"
#include "common/status.h"
#include "cpu/engines.h"

namespace kimi {

using AttentionMaxLogitsParams = kimi_attention_max_logits_params;
using ClipRowsParams = kimi_clip_rows_params;

size_t attention_max_logits_workspace_bytes(const AttentionMaxLogitsParams& p, kimi_device device);
Status attention_max_logits(const AttentionMaxLogitsParams& p, kimi_device device, void* stream);
Status clip_rows(const ClipRowsParams& p, kimi_device device, void* stream);

// Queued on a CUDA stream; the arguments have been checked.
Status attention_max_logits_cuda(const AttentionMaxLogitsParams& p, void* stream);
Status clip_rows_cuda(const ClipRowsParams& p, void* stream);

// gamma of head `head` of a layer whose maxima these are.
KIMI_HOST_DEVICE float gamma_of(const float* max_logits, int64_t head, int32_t members, float tau) {
  float gamma = 1.0f;
  const float* const group = max_logits + head / members * members;
  for (int32_t i = 0; i < members; ++i)
    if (group[i] > tau && group[i] <= FLT_MAX) {
      const float own = tau / group[i];
      if (own < gamma) gamma = own;
    }
  return gamma;
}

KIMI_HOST_DEVICE float power_of(float gamma, float power) {
  if (power == 0.0f || power == 1.0f) return power == 0.0f ? 1.0f : gamma;
  return static_cast<float>(exp(double{power} * log(double{gamma})));
}

namespace qk_clip_cpu {

struct CpuEngine {
  // Largest of the sums [rows, 32], of which row i has the first min(cols, visible + i). NaN if any
  // is, -inf for none.
  float (*largest)(const float* sums, int64_t rows, int64_t cols, int64_t visible);
  void (*scale)(void* x, kimi_dtype dtype, int64_t n, float factor);
};
KIMI_CPU_ENGINES(CpuEngine);

}  // namespace qk_clip_cpu
}  // namespace kimi
