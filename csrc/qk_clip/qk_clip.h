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
//   scale_rows  rows first..last-1 of each head's block of a weight times factor[h], rounded once;
//               heads with a factor of 1 are not written
#pragma once

#include <cstdint>

#include "common/status.h"
#include "cpu/engines.h"

namespace kimi {

using AttentionMaxLogitsParams = kimi_attention_max_logits_params;
using ScaleRowsParams = kimi_scale_rows_params;

size_t attention_max_logits_workspace_bytes(const AttentionMaxLogitsParams& p, kimi_device device);
Status attention_max_logits(const AttentionMaxLogitsParams& p, kimi_device device, void* stream);
Status scale_rows(const ScaleRowsParams& p, kimi_device device, void* stream);

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
