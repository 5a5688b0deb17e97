// SPDX-License-Identifier: MIT
// permute: token rows sorted by expert, and the weighted way back.
//
//   plan      pairs (t, k) with 0 <= id < E are rows, in the order (expert, token, slot); the
//             group of expert e starts at offsets[e-1] and is padded to a multiple of align:
//             offsets[e] = offsets[e-1] + ceil(n_e / align) * align
//             row_map[t,k] = row of the pair, -1 dropped;  source[row] = t*K + k, -1 padding
//             Room for R = T*K + E*(align-1) rows: known without reading an id. The order is that
//             of a stable argsort; no sort is made: it is counted.
//   permute   y[row] = x[source[row] / K], bytes; padding rows zero
//   unpermute x[t] = sum_k w[t,k] * y[row_map[t,k]]   from k = 0 on, fp32, rounded once:
//             acc = fma(w, y, acc), or acc + y without weights, from acc = +0; -1 is left out
//   backward  dy[row] = w * dx[t] rounded once; padding rows zero
//             dw[t,k] = sum_h dx[t,h] * y[row,h]: 256 partial sums by h % 256 (fma, ascending h),
//             then partial l plus partial l + 128, 64, 32, 16, 8, 4, 2, 1
//   sort_chunks  chunk i of x (split_sizes[i] rows) goes where order names it:
//             y = concat(chunk[order[0]], chunk[order[1]], ...), then zero rows
//
// permute's backward is unpermute without weights and the other way round; sort_chunks' is its
// inverse. Row arithmetic is 64-bit: T*K*H passes 2^31 at 37 450 tokens of K2.
//
// Cost (T 4096, K 8, H 7168, bf16): plan 4 T K read, 8 T K + 8 E written, 0.4 MB; permute T H read
// once (a token's K rows are written while it is in cache) and R H written, 59 + 470 MB; unpermute
// R H read, T H written.
// Source of the index form: TransformerEngine's and vLLM's MoE permutation.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "cpu/engines.h"

namespace kimi {

using PermutePlanParams = kimi_permute_plan_params;
using PermuteParams = kimi_permute_params;
using UnpermuteParams = kimi_unpermute_params;
using UnpermuteBackwardParams = kimi_unpermute_backward_params;
using SortChunksParams = kimi_sort_chunks_params;

size_t permute_plan_workspace_bytes(const PermutePlanParams& p, kimi_device device);
Status permute_plan(const PermutePlanParams& p, kimi_device device, void* stream);
Status permute(const PermuteParams& p, kimi_device device, void* stream);
Status unpermute(const UnpermuteParams& p, kimi_device device, void* stream);
Status unpermute_backward(const UnpermuteBackwardParams& p, kimi_device device, void* stream);
Status sort_chunks(const SortChunksParams& p, kimi_device device, void* stream);

// permute*.cu. Arguments have been checked; every output is written whole, for T = 0 too.
size_t permute_plan_workspace_bytes_cuda(const PermutePlanParams& p);
Status permute_plan_cuda(const PermutePlanParams& p, void* stream);
Status permute_cuda(const PermuteParams& p, void* stream);
Status unpermute_cuda(const UnpermuteParams& p, void* stream);
Status unpermute_backward_cuda(const UnpermuteBackwardParams& p, void* stream);
Status sort_chunks_cuda(const SortChunksParams& p, void* stream);

namespace permutation {

// One CPU engine: tokens (sort_chunks: rows) [begin, end) in the calling thread.
struct CpuEngine {
  // `stream`: the output will not fit the cache, so it is written around it.
  void (*permute)(const PermuteParams& p, int64_t begin, int64_t end, bool stream);
  void (*unpermute)(const UnpermuteParams& p, int64_t begin, int64_t end);
  // Writes grad_weights and the rows of grad_y that row_map names; padding rows are not its own.
  void (*unpermute_backward)(const UnpermuteBackwardParams& p, int64_t begin, int64_t end,
                             bool stream);
};
KIMI_CPU_ENGINES(CpuEngine);

// permute_plan_sm90.cu: up to kPlanOfCluster pairs; takes no workspace.
inline constexpr int64_t kPlanOfCluster = 131072;
Status permute_plan_sm90(const PermutePlanParams& p, void* stream);
// unpermute_sm90.cu
Status unpermute_sm90(const UnpermuteParams& p, void* stream);

}  // namespace permutation
}  // namespace kimi
