// SPDX-License-Identifier: MIT
// all_to_all: argument checks. The kernels are CUDA's; on CPUs kimi_ops.ExpertParallel has other ways.
#include "all_to_all/all_to_all.h"

#include "common/engine.h"
#include "common/volume.h"

namespace kimi {
namespace {

using namespace exchange;

constexpr int64_t kMostColumns = 1 << 28, kMostPairs = 1 << 30, kMostBytes = 1 << 30;

template <class Params>
Status check_common(const char* op, const Params& p, int64_t needed) {
  const kimi_peer_memory& peers = p.peers;
  if (peers.world < 1 || peers.world > kMaxRanks)
    return invalid(op, ": peers.world: expected 1..", kMaxRanks, ", got ", peers.world);
  if (peers.rank < 0 || peers.rank >= peers.world)
    return invalid(op, ": peers.rank: expected 0..", peers.world - 1, ", got ", peers.rank);
  if (peers.halves < 2)
    return invalid(op, ": peers.halves: expected 2 or more, got ", peers.halves);
  if (peers.timeout_ns < 1)
    return invalid(op, ": peers.timeout_ns: expected 1 or more, got ", peers.timeout_ns);
  if (peers.buffers == nullptr || peers.state == nullptr)
    return invalid(op, ": peers: expected pointers to the buffers and the state, got NULL");
  if (half_bytes(peers) < needed)
    return invalid(op, ": peers.buffer_bytes: expected ", peers.halves, " halves of ", needed,
                   " bytes for these shapes, got ", half_bytes(peers), " each; ask ",
                   "kimi_all_to_all_buffer_bytes");
  if (p.top_k < 1 || p.top_k > KIMI_ALL_TO_ALL_MAX_TOP_K)
    return invalid(op, ": top_k: expected 1..", KIMI_ALL_TO_ALL_MAX_TOP_K, ", got ", p.top_k);
  if (p.max_tokens < 1) return invalid(op, ": max_tokens: expected 1 or more, got ", p.max_tokens);
  if (p.num_tokens < 0 || p.num_tokens > p.max_tokens)
    return invalid(op, ": num_tokens: expected 0..max_tokens=", p.max_tokens, ", got ",
                   p.num_tokens);
  if (volume(peers.world, p.max_tokens, p.top_k) > kMostPairs)
    return invalid(op, ": max_tokens: expected at most ", kMostPairs,
                   " pairs of all ranks (their ids are int32), got ", p.max_tokens, " tokens of ",
                   peers.world, " ranks with ", p.top_k, " experts; split the tokens");
  if (p.phases < 1 || p.phases > KIMI_ALL_TO_ALL_ALL)
    return invalid(op, ": phases: expected some of SEND 1, MEET 2, RECEIVE 4, got ", int(p.phases));
  if (p.num_blocks < 0) return invalid(op, ": num_blocks: expected 0 or more, got ", p.num_blocks);
  return Status::ok();
}

template <class... Pointers>
bool any_null(Pointers... pointers) {
  return ((pointers == nullptr) || ...);
}

Status check(const DispatchParams& p) {
  const char* op = "all_to_all_dispatch";
  if (p.row_bytes < 1 || p.row_bytes > kMostBytes || p.beside_bytes < 0 ||
      p.beside_bytes > kMostBytes || p.beside_bytes % 4 != 0)
    return invalid(op, ": row_bytes, beside_bytes: expected 1..", kMostBytes,
                   ", and a multiple of 4 from 0 on, got ", p.row_bytes, " and ", p.beside_bytes);
  KIMI_RETURN_IF_ERROR(check_common(op, p, DispatchLayout(p).end));
  if (p.num_experts < p.peers.world || p.num_experts > 1024)
    return invalid(op, ": num_experts: expected world=", p.peers.world, "..1024, got ",
                   p.num_experts);
  if (p.align < 1) return invalid(op, ": align: expected 1 or more, got ", p.align);
  if (p.num_rows < 0 || p.num_rows > INT32_MAX)
    return invalid(op, ": num_rows: expected 0..", INT32_MAX, ", got ", p.num_rows);
  const bool sends = p.phases & KIMI_ALL_TO_ALL_SEND, some = sends && p.num_tokens > 0;
  const bool lays = !p.again, meets = p.phases & KIMI_ALL_TO_ALL_MEET;
  const bool receives = p.phases & KIMI_ALL_TO_ALL_RECEIVE, rows = receives && p.num_rows > 0;
  if (any_null(p.report) || (some && any_null(p.x)) ||
      (some && p.beside_bytes > 0 && any_null(p.beside)) ||
      (some && lays && any_null(p.indices, p.row_map, p.home)) ||
      (sends && lays && any_null(p.offsets, p.tokens_per_expert)) ||
      (meets && lays && any_null(p.loads)) || any_null(p.y_offsets, p.y_tokens_per_expert) ||
      (receives && any_null(p.y_row_map, p.y_slots)) || (rows && any_null(p.y, p.y_source)) ||
      (rows && p.beside_bytes > 0 && any_null(p.y_beside)))
    return invalid(op, ": expected pointers for every input and output of the phases, got NULL");
  return Status::ok();
}

Status check(const CombineParams& p) {
  const char* op = "all_to_all_combine";
  if (!is_dtype(p.dtype) || !is_dtype(p.wire_dtype))
    return invalid(op, ": dtype, wire_dtype: expected a kimi_dtype (0..2), got ", int(p.dtype),
                   " and ", int(p.wire_dtype));
  if (p.hidden < 1 || p.hidden > kMostColumns || p.out_stride < 0)
    return invalid(op, ": hidden, out_stride: expected 1..", kMostColumns, ", and 0 or more, got ",
                   p.hidden, " and ", p.out_stride);
  KIMI_RETURN_IF_ERROR(check_common(op, p, CombineLayout(p).end));
  const bool sends = p.phases & KIMI_ALL_TO_ALL_SEND;
  const bool gives = p.phases & KIMI_ALL_TO_ALL_RECEIVE && p.num_tokens > 0;
  if (any_null(p.epoch, p.report) || (sends && any_null(p.row_map, p.slots)) ||
      (gives && any_null(p.home, p.y)))
    return invalid(op, ": expected pointers for every input and output of the phases, got NULL");
  return Status::ok();
}

// The ranks of one launch agree in what shapes the grid.
template <class Params>
Status check_ranks(const char* op, const Params* p, int& count) {
  count = std::max(p->num_local, 1);
  if (count > KIMI_ALL_TO_ALL_MAX_LOCAL)
    return invalid(op, ": num_local: expected at most ", KIMI_ALL_TO_ALL_MAX_LOCAL, ", got ",
                   count);
  for (int i = 0; i < count; ++i) {
    KIMI_RETURN_IF_ERROR(check(p[i]));
    if (p[i].phases != p->phases || p[i].num_blocks != p->num_blocks ||
        p[i].max_tokens != p->max_tokens || p[i].peers.world != p->peers.world)
      return invalid(op, ": params[", i, "]: expected the phases, num_blocks, max_tokens and ",
                     "peers.world of params[0], got others");
  }
  return Status::ok();
}

}  // namespace

Status all_to_all_dispatch(const DispatchParams& p, kimi_device device,
                           [[maybe_unused]] void* stream) {
  int ranks = 1;
  KIMI_RETURN_IF_ERROR(check_ranks("all_to_all_dispatch", &p, ranks));
  if (device == KIMI_DEVICE_CPU)
    return error(KIMI_UNSUPPORTED,
                 "all_to_all_dispatch: device: expected cuda, got cpu; between CPUs call "
                 "kimi_ops.ExpertParallel");
  return KIMI_CUDA("all_to_all_dispatch", all_to_all_dispatch_cuda(&p, ranks, stream));
}

Status all_to_all_combine(const CombineParams& p, kimi_device device,
                          [[maybe_unused]] void* stream) {
  int ranks = 1;
  KIMI_RETURN_IF_ERROR(check_ranks("all_to_all_combine", &p, ranks));
  if (device == KIMI_DEVICE_CPU)
    return error(KIMI_UNSUPPORTED,
                 "all_to_all_combine: device: expected cuda, got cpu; between CPUs call "
                 "kimi_ops.ExpertParallel");
  return KIMI_CUDA("all_to_all_combine", all_to_all_combine_cuda(&p, ranks, stream));
}

size_t all_to_all_buffer_bytes(const DispatchParams& dispatch, const CombineParams& combine) {
  CombineParams home = combine;
  home.peers.world = dispatch.peers.world;
  home.top_k = dispatch.top_k;
  home.direct = dispatch.direct;
  const int64_t half = std::max(DispatchLayout(dispatch).end, CombineLayout(home).end);
  return static_cast<size_t>(dispatch.peers.halves * (kFlagBytes + half));
}

}  // namespace kimi
