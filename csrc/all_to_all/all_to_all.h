// SPDX-License-Identifier: MIT
// all_to_all: experts spread over ranks that reach each other's memory.
//
//   dispatch  a rank puts its T tokens into its own buffer, once, and says how many pairs go to each
//             expert; every rank then reads the counts of all, knows the row of each pair, and pulls
//             the tokens it needs straight into these rows
//               row(s, t, k) = start[e] + pairs of e on ranks before s + those of s before (t, k)
//   combine   a rank adds its results up by token and pushes the sums to the token's home, to a
//             place that depends on the token alone; home adds those up
//               by rank   part = sum_k fma(w, out, part) ascending k, rounded to the wire's dtype
//                         y    = sum of the parts, ascending rank, rounded
//               direct    y    = sum_k fma(w, out rounded to the wire's dtype, y), rounded
//             sums in fp32; these are the bits of kimi_ops.reference.all_to_all.
//
// Nothing is counted with atomics, so rows come in one order. A token's place in `positions` is that
// of its own rank's permute_plan: no rank sorts what another has sorted.
//
// A buffer: flags [halves][64], then the halves. Operation n (1, 2, ... alike on all ranks) uses half
// n % halves of all buffers; both kinds of operation use the same memory.
//   dispatch   T | counts [E] | ids, positions, weights [S, K] | rows [S] | beside [S]
//   combine    rows [slots][S], slots = min(P, K), or K where direct | live [slots][S] where direct
//
// Order, for two halves. Rank a may write half n % 2 of its own (dispatch) or another's (combine)
// buffer when nobody reads operation n - 2 there any more. It knows without asking: it has acquired
// everybody's flag of n - 1, which each rank releases after it has read n - 2, in the order of its
// stream. So there is one flag a rank and operation, no barrier on entry, and no reset: flags hold
// the epoch, which lives on the device and is the same after a replay of a graph as after a call.
// With m operations under way at once a rank may be m behind its flag, hence 2 m halves.
//
// Bytes (u ranks a token on average, K2 with P 8: T 4096, H 7168, K 8, u 5.28, T H = 58.7 MB bf16):
//   dispatch  memory 2 T H (in) + u T H (pulled) + K T H (rows) = 15.3 T H; link u (P - 1) / P T H
//   combine   memory K T H (results) + 2 u T H (sums) + T H     = 19.6 T H; link the same
// A push into slots with a compaction behind it would move 19.6 T H for dispatch and needs P S rows of
// buffer where this needs S; a push to the final rows moves 9 T H but K T H over the link (1.5 times),
// and its rows lie in the peers' buffers, where the next call overwrites what autograd has kept.
// Predicted, not measured, on an H200: all 8 ranks on one GPU, at 85 % of 4.8 TB/s, dispatch 1.8 ms,
// combine 2.3 ms; on 8 GPUs, at 280 GB/s of link, 0.97 ms each, of which memory is 0.22 and 0.28.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/dtype.h"
#include "common/status.h"
#include "kimi_ops_parallel.h"

namespace kimi {

using DispatchParams = kimi_all_to_all_dispatch_params;
using CombineParams = kimi_all_to_all_combine_params;

Status all_to_all_dispatch(const DispatchParams& p, kimi_device device, void* stream);
Status all_to_all_combine(const CombineParams& p, kimi_device device, void* stream);
size_t all_to_all_buffer_bytes(const DispatchParams& dispatch, const CombineParams& combine);

// all_to_all.cu. Arguments have been checked.
Status all_to_all_dispatch_cuda(const DispatchParams* ranks, int num_ranks, void* stream);
Status all_to_all_combine_cuda(const CombineParams* ranks, int num_ranks, void* stream);

namespace exchange {

inline constexpr int kMaxRanks = KIMI_ALL_TO_ALL_MAX_RANKS;
inline constexpr int64_t kFlagBytes = kMaxRanks * sizeof(uint64_t);  // of a half
inline constexpr int64_t kPart = 128;                                // what parts of a half lie on

KIMI_HOST_DEVICE int64_t rounded_up(int64_t value, int64_t to) {
  return (value + to - 1) / to * to;
}

/// Who owns which expert: E / P neighbours each, one more on the first E % P ranks.
struct Placement {
  int small, more;
  KIMI_HOST_DEVICE Placement(int num_experts, int world)
      : small(num_experts / world), more(num_experts % world) {}
  KIMI_HOST_DEVICE int first(int rank) const { return rank * small + (rank < more ? rank : more); }
  KIMI_HOST_DEVICE int count(int rank) const { return small + (rank < more); }
  KIMI_HOST_DEVICE int owner(int expert) const {
    const int large = more * (small + 1);
    return expert < large ? expert / (small + 1) : more + (expert - large) / small;
  }
};

/// Byte offsets within a half.
struct DispatchLayout {
  int64_t counts, ids, positions, weights, rows, beside, end, row_stride, beside_stride;
  KIMI_HOST_DEVICE explicit DispatchLayout(const DispatchParams& p) {
    const int64_t pairs = rounded_up(p.max_tokens * p.top_k * int64_t{4}, kPart);
    row_stride = rounded_up(p.row_bytes, 16);
    beside_stride = rounded_up(p.beside_bytes, 16);
    counts = kPart;
    ids = counts + rounded_up(p.num_experts * int64_t{4}, kPart);
    positions = ids + pairs;
    weights = positions + pairs;
    rows = weights + pairs;
    beside = rows + rounded_up(p.max_tokens * row_stride, kPart);
    end = beside + rounded_up(p.max_tokens * beside_stride, kPart);
  }
};
struct CombineLayout {
  int64_t live, end, row_stride;
  int slots;
  KIMI_HOST_DEVICE explicit CombineLayout(const CombineParams& p) {
    slots = p.direct || p.peers.world > p.top_k ? p.top_k : p.peers.world;
    row_stride = rounded_up(p.hidden, 8) * (p.wire_dtype == KIMI_FLOAT32 ? 4 : 2);
    live = rounded_up(slots * p.max_tokens * row_stride, kPart);
    end = live + (p.direct ? rounded_up(slots * p.max_tokens * int64_t{4}, kPart) : 0);
  }
};

KIMI_HOST_DEVICE int64_t half_bytes(const kimi_peer_memory& peers) {
  return (peers.buffer_bytes - peers.halves * kFlagBytes) / peers.halves / kPart * kPart;
}

}  // namespace exchange
}  // namespace kimi
