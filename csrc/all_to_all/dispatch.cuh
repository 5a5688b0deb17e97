// SPDX-License-Identifier: MIT
// The three phases of dispatch, for one rank: a block a token, a thread 16 bytes of columns.
//
//   send     my tokens, ids, positions and counts into my half
//   meet     all ranks have sent; one block writes what the host and combine need of the counts
//   receive  for each token of each rank: lanes hold its K pairs and find their rows; who has any
//            pulls the token, 4 x 16 bytes a thread in flight, and stores it to each of its rows
//
// Each block makes its own table of first rows from P El counts: 1.5 KB for K2 with 8 ranks.
#pragma once

#include "all_to_all/exchange.cuh"
#include "device/atomic.cuh"
#include "permute/permute.cuh"

namespace kimi::exchange {

inline constexpr int kReportHead = 4;  // numbers before the tokens of each rank
inline constexpr int kInFlight = 4;    // loads of a thread

/// What a block knows of the rows of its rank's experts; `memory` [(P + 2) El + P] is shared.
struct Table {
  int32_t* first;   // [P][El] row of the first pair from a rank
  int32_t* cut;     // [El] end of the pairs
  int32_t* end;     // [El] end of the padding
  int32_t* tokens;  // [P] of each rank
  int experts;
  int64_t wanted = 0;   // rows if all were kept
  int64_t dropped = 0;  // pairs

  __device__ Table(int32_t* memory, int world, int experts)
      : first(memory),
        cut(memory + world * experts),
        end(cut + experts),
        tokens(end + experts),
        experts(experts) {}
};
inline size_t table_bytes(int world, int num_experts) {
  return sizeof(int32_t) * ((world + 2) * Placement(num_experts, world).count(0) + world);
}

__device__ inline int64_t block_sum(int64_t value, int64_t (&warp_sums)[kWarps]) {
  int64_t sum = 0;
  permutation::block_exclusive_sum<kWarps>(value, warp_sums, sum);
  return sum;
}

__device__ inline int64_t padded(int64_t count, int align) {
  return (count + align - 1) / align * align;
}

template <class Flags>
__device__ void fill_table(Table& table, const DispatchParams& p, const Exchange<Flags>& exchange) {
  KIMI_STATIC_SHARED(int64_t, warp_sums, kWarps);
  const int experts = table.experts, thread = static_cast<int>(threadIdx.x);
  if (p.again) {
    for (int e = thread; e < experts; e += kThreads) {
      table.cut[e] = (e == 0 ? 0 : p.y_offsets[e - 1]) + p.y_tokens_per_expert[e];
      table.end[e] = p.y_offsets[e];
    }
    __syncthreads();
    return;
  }
  const DispatchLayout layout(p);
  const int own = Placement(p.num_experts, p.peers.world).first(p.peers.rank);
  if (thread < p.peers.world)
    table.tokens[thread] =
        exchange.masked(thread)
            ? 0
            : static_cast<int32_t>(*reinterpret_cast<const int64_t*>(exchange.half_of(thread)));
  for (int e = thread; e < experts; e += kThreads) {
    int32_t total = 0;
    for (int s = 0; s < p.peers.world; ++s) {
      const char* half = exchange.half_of(s);
      table.first[s * experts + e] = total;
      if (!exchange.masked(s))
        total += reinterpret_cast<const int32_t*>(half + layout.counts)[own + e];
    }
    table.cut[e] = total;  // for now the number of pairs, all of this thread's own
  }
  const auto rows_up_to = [&](int64_t level) {
    int64_t rows = 0;
    for (int e = thread; e < experts; e += kThreads)
      rows += padded(std::min<int64_t>(table.cut[e], level), p.align);
    return block_sum(rows, warp_sums);
  };
  int64_t level = p.peers.world * p.max_tokens * p.top_k;
  table.wanted = rows_up_to(level);
  if (table.wanted > p.num_rows) {
    for (int64_t low = 0, high = level; low < high;) {
      const int64_t middle = (low + high + 1) / 2;
      const bool fits = rows_up_to(middle) <= p.num_rows;
      (fits ? low : high) = fits ? middle : middle - 1;
      level = low;
    }
  }
  int64_t lost = 0, start = 0;
  for (int round = 0; round < experts; round += kThreads) {
    const int e = round + thread;
    const int64_t total = e < experts ? table.cut[e] : 0, kept = std::min(total, level);
    lost += total - kept;
    const int64_t rows = e < experts ? padded(kept, p.align) : 0;
    const int64_t at = permutation::block_exclusive_sum<kWarps>(rows, warp_sums, start);
    if (e >= experts) continue;
    for (int s = 0; s < p.peers.world; ++s)
      table.first[s * experts + e] += static_cast<int32_t>(at);
    table.cut[e] = static_cast<int32_t>(at + kept);
    table.end[e] = static_cast<int32_t>(at + rows);
  }
  table.dropped = block_sum(lost, warp_sums);
  __syncthreads();
}

// ---- bytes -------------------------------------------------------------------------------------

/// Copies `bytes` to each row of y that a lane of the warp has (-1: none), by the whole block.
template <class Unit, int kLoads>
__device__ inline void copy_units(void* y, int64_t y_stride, int32_t row, const void* from,
                                  int64_t bytes) {
  const int units = static_cast<int>(bytes / static_cast<int64_t>(sizeof(Unit)));
  const uint32_t lanes = warp_ballot(row >= 0);
  for (int base = 0; base < units; base += kThreads * kLoads) {
    const int column = base + static_cast<int>(threadIdx.x);
    Unit value[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (column + i * kThreads >= units) continue;
      const Unit* at = static_cast<const Unit*>(from) + column + i * kThreads;
      if constexpr (sizeof(Unit) == 16)
        value[i] = load16_peer(at);
      else
        value[i] = *at;
    }
    for (uint32_t left = lanes; left != 0; left &= left - 1) {
      const int64_t to = warp_broadcast(row, __ffs(static_cast<int>(left)) - 1);
      Unit* out = reinterpret_cast<Unit*>(static_cast<char*>(y) + to * y_stride) + column;
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        if (column + i * kThreads < units) permutation::store_once(out + i * kThreads, value[i]);
    }
  }
}
/// A token: 16 bytes at a time where they divide all addresses; what is beside it, in 4 bytes.
__device__ inline void copy_row(void* y, int64_t y_stride, int32_t row, const void* from,
                                int64_t bytes) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(y) | reinterpret_cast<uintptr_t>(from) |
                        static_cast<uint64_t>(y_stride | bytes);
  if (bits % 16 == 0)
    copy_units<uint4, kInFlight>(y, y_stride, row, from, bytes);
  else
    copy_units<uint8_t, 1>(y, y_stride, row, from, bytes);
}
__device__ inline void copy_beside(void* y, int64_t y_stride, int32_t row, const void* from,
                                   int64_t bytes) {
  if (bytes > 0) copy_units<uint32_t, 1>(y, y_stride, row, from, bytes);
}

__device__ inline void clear_row(void* y, int64_t row, int64_t bytes) {
  char* const at = static_cast<char*>(y) + row * bytes;
  if ((reinterpret_cast<uintptr_t>(y) | static_cast<uint64_t>(bytes)) % 16 == 0) {
    for (int64_t c = threadIdx.x * int64_t{16}; c < bytes; c += kThreads * 16)
      store16(at + c, uint4{});
  } else {
    for (int64_t c = threadIdx.x; c < bytes; c += kThreads) at[c] = 0;
  }
}

// ---- the phases --------------------------------------------------------------------------------

/// Lanes that hold the first pair of their rank (-1: none): as many as there are ranks.
__device__ inline int count_ranks(int rank) {
  const uint32_t same = warp_match(rank);
  const bool first = (same & ((1u << lane_id()) - 1)) == 0;
  return __popc(warp_ballot(rank >= 0 && first));
}

template <class Flags>
__device__ void send(const DispatchParams& p, const Exchange<Flags>& exchange) {
  const DispatchLayout layout(p);
  const Placement placement(p.num_experts, p.peers.world);
  char* const half = exchange.half_of(p.peers.rank);
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  if (blockIdx.x == 0 && !p.again) {
    if (thread == 0) *reinterpret_cast<int64_t*>(half) = p.num_tokens;
    for (int e = thread; e < p.num_experts; e += kThreads)
      reinterpret_cast<int32_t*>(half + layout.counts)[e] = p.tokens_per_expert[e];
  }
  for (int64_t t = blockIdx.x; t < p.num_tokens; t += gridDim.x) {
    const int32_t self = lane == 0 ? 0 : -1;
    copy_row(half + layout.rows + t * layout.row_stride, 0, self,
             static_cast<const char*>(p.x) + t * p.x_stride_bytes, p.row_bytes);
    copy_beside(half + layout.beside + t * layout.beside_stride, 0, self,
                static_cast<const char*>(p.beside) + t * p.beside_bytes, p.beside_bytes);
    if (warp_id() != 0) continue;
    const int64_t pair = t * p.top_k + lane;
    const bool inside = lane < p.top_k;
    if (inside && p.weights != nullptr)
      reinterpret_cast<float*>(half + layout.weights)[pair] = p.weights[pair];
    if (p.again) continue;
    int32_t id = inside ? p.indices[pair] : -1;
    if (id < 0 || id >= p.num_experts || exchange.masked(placement.owner(id))) id = -1;
    if (inside) {
      reinterpret_cast<int32_t*>(half + layout.ids)[pair] = id;
      if (id >= 0)
        reinterpret_cast<int32_t*>(half + layout.positions)[pair] =
            p.row_map[pair] - (p.offsets[id] - p.tokens_per_expert[id]);
    }
    const uint32_t pairs = warp_ballot(id >= 0);
    const int ranks = count_ranks(id < 0 ? -1 : placement.owner(id));
    if (lane == 0) p.home[t] = p.direct ? pairs : static_cast<uint32_t>((uint64_t{1} << ranks) - 1);
  }
}

/// One block: what the counts of all ranks say.
template <class Flags>
__device__ void settle(const DispatchParams& p, const Exchange<Flags>& exchange,
                       const Table& table) {
  KIMI_STATIC_SHARED(int64_t, warp_sums, kWarps);
  const int thread = static_cast<int>(threadIdx.x), world = p.peers.world;
  if (thread == 0) p.report[0] = static_cast<int64_t>(exchange.epoch());
  if (p.again) return;
  const DispatchLayout layout(p);
  const Placement placement(p.num_experts, world);
  int64_t most = 0;
  uint64_t overfull = 0;
  for (int owner = 0; owner < world; ++owner) {
    int64_t rows = 0;
    const int first = placement.first(owner);
    for (int e = first + thread; e < first + placement.count(owner); e += kThreads) {
      int64_t total = 0;
      for (int s = 0; s < world; ++s) {
        const char* half = exchange.half_of(s);
        const int32_t count = exchange.masked(s) || exchange.masked(owner)
                                  ? 0
                                  : reinterpret_cast<const int32_t*>(half + layout.counts)[e];
        p.loads[int64_t{s} * p.num_experts + e] = count;
        total += count;
      }
      rows += padded(total, p.align);
    }
    const int64_t wanted = block_sum(rows, warp_sums);
    most = std::max(most, wanted);
    if (wanted > p.num_rows) overfull |= uint64_t{1} << owner;
  }
  const bool fails = p.strict && overfull != 0;
  for (int e = thread; e < table.experts; e += kThreads) {
    const int32_t start = e == 0 ? 0 : table.end[e - 1];
    // rows of a call that fails are not all there: whoever works on them has none
    p.y_offsets[e] = fails ? 0 : table.end[e];
    p.y_tokens_per_expert[e] = fails ? 0 : table.cut[e] - start;
  }
  if (thread < world) p.report[kReportHead + thread] = table.tokens[thread];
  if (thread == 0) {
    p.report[1] = table.wanted;
    p.report[2] = most;
    p.report[3] = table.dropped;
    if (fails) exchange.overflow(overfull, most);
  }
}

/// An operation that has failed lays out no row, and rows that were laid out before are zeros: what
/// comes behind it reads nothing that is not there. Other blocks of it may have been in time.
__device__ inline void leave_empty(const DispatchParams& p) {
  const bool receives = p.phases & KIMI_ALL_TO_ALL_RECEIVE;
  const int thread = static_cast<int>(threadIdx.x);
  if (p.again) {
    for (int64_t row = blockIdx.x; receives && row < p.num_rows; row += gridDim.x) {
      clear_row(p.y, row, p.row_bytes);
      if (p.beside_bytes > 0) clear_row(p.y_beside, row, p.beside_bytes);
    }
  } else {
    const auto fill = [&](auto* to, int64_t count, auto value) {
      for (int64_t i = blockIdx.x * kThreads + thread; i < count; i += gridDim.x * kThreads)
        to[i] = value;
    };
    if (p.phases & KIMI_ALL_TO_ALL_SEND) fill(p.home, p.num_tokens, 0u);
    if (p.phases & KIMI_ALL_TO_ALL_MEET) {
      const int owned = Placement(p.num_experts, p.peers.world).count(p.peers.rank);
      fill(p.y_offsets, owned, 0);
      fill(p.y_tokens_per_expert, owned, 0);
      fill(p.loads, int64_t{p.peers.world} * p.num_experts, 0);
      fill(p.report, kReportHead + p.peers.world, int64_t{0});
    }
    // Each block all of them, since its own rows may be any; beside others, so by atomics: -1 is ones.
    for (int64_t row = thread; receives && row < p.num_rows; row += kThreads)
      atomic_or(reinterpret_cast<uint32_t*>(&p.y_source[row]), ~0u);
  }
  if (!receives) return;
  const int jobs =
      static_cast<int>(p.peers.world * p.max_tokens);  // of this block, as in receive()
  for (int job = static_cast<int>(blockIdx.x); job < jobs; job += static_cast<int>(gridDim.x)) {
    const Job at(job, p.peers);
    const int64_t token = at.rank * p.max_tokens + at.token, pair = token * p.top_k + thread;
    if (thread < p.top_k && !p.again) p.y_row_map[pair] = -1;
    if (thread < p.top_k && p.y_weights != nullptr) p.y_weights[pair] = 0.0f;
    if (thread == 0 && !p.again) p.y_slots[token] = 0;
  }
}

/// What a lane knows of its pair: the expert and its place among those of its rank; `again` the row.
struct Found {
  int32_t id, position;
};

template <class Flags>
__device__ void receive(const DispatchParams& p, const Exchange<Flags>& exchange,
                        const Table& table) {
  const DispatchLayout layout(p);
  const Placement placement(p.num_experts, p.peers.world);
  const int own = placement.first(p.peers.rank), lane = lane_id(), experts = table.experts;
  const int jobs = static_cast<int>(p.peers.world * p.max_tokens);
  const int step = static_cast<int>(gridDim.x);
  const int most = static_cast<int>(p.max_tokens);
  const bool inside = lane < p.top_k;
  // Of the next job while this one is copied: a peer's memory is far away.
  const auto look = [&](int job) {
    Found found{-1, 0};
    if (job >= jobs || !inside) return found;
    const Job at(job, p.peers);
    if (p.again) return Found{0, p.y_row_map[(at.rank * most + at.token) * p.top_k + lane]};
    if (at.token >= table.tokens[at.rank]) return found;
    const char* const half = exchange.half_of(at.rank);
    const int there = at.token * p.top_k + lane;
    return Found{reinterpret_cast<const int32_t*>(half + layout.ids)[there],
                 reinterpret_cast<const int32_t*>(half + layout.positions)[there]};
  };
  Found next = look(static_cast<int>(blockIdx.x));
  for (int job = static_cast<int>(blockIdx.x); job < jobs; job += step) {
    const Found found = next;
    next = look(job + step);
    const Job at(job, p.peers);
    const char* const half = exchange.half_of(at.rank);
    const int token = at.rank * most + at.token, there = at.token * p.top_k + lane;
    const int pair = token * p.top_k + lane;
    int32_t row = -1;
    if (p.again) {
      if (inside) row = found.position;
    } else {
      const int32_t id = found.id, local = id - own;
      const bool here = id >= 0 && local >= 0 && local < experts;
      if (here) {
        row = table.first[at.rank * experts + local] + found.position;
        if (row >= table.cut[local]) row = -1;
      }
      const uint32_t pairs = warp_ballot(here);
      const int before = count_ranks(id >= 0 && id < own ? placement.owner(id) : -1);
      const uint32_t slots = p.direct || pairs == 0 ? pairs : 1u << before;
      if (warp_id() == 0) {
        if (inside) p.y_row_map[pair] = row;
        if (row >= 0) p.y_source[row] = pair;
        if (lane == 0) p.y_slots[token] = slots;
      }
    }
    if (p.y_weights != nullptr && inside && warp_id() == 0)
      p.y_weights[pair] =
          row >= 0 ? reinterpret_cast<const float*>(half + layout.weights)[there] : 0.0f;
    if (warp_ballot(row >= 0) == 0) continue;  // the same for all warps
    copy_row(p.y, p.row_bytes, row, half + layout.rows + at.token * layout.row_stride, p.row_bytes);
    copy_beside(p.y_beside, p.beside_bytes, row,
                half + layout.beside + at.token * layout.beside_stride, p.beside_bytes);
  }
  for (int e = 0; e <= experts; ++e) {
    const int64_t begin = e < experts ? table.cut[e] : table.end[experts - 1];
    const int64_t end = e < experts ? table.end[e] : p.num_rows;
    for (int64_t row = begin + (blockIdx.x + e) % gridDim.x; row < end; row += gridDim.x) {
      clear_row(p.y, row, p.row_bytes);
      if (p.beside_bytes > 0) clear_row(p.y_beside, row, p.beside_bytes);
      if (threadIdx.x == 0 && !p.again) p.y_source[row] = -1;
    }
  }
}

/// Dynamic shared memory: the table.
template <class Flags>
__device__ void dispatch_rank(const DispatchParams& p) {
  KIMI_SHARED(int32_t, memory);
  const bool sends = p.phases & KIMI_ALL_TO_ALL_SEND, meets = p.phases & KIMI_ALL_TO_ALL_MEET;
  const Exchange<Flags> exchange(p.peers, sends || meets ? Exchange<Flags>::next(p.peers)
                                                         : static_cast<uint64_t>(p.report[0]));
  if (exchange.broken()) return leave_empty(p);
  if (sends) send(p, exchange);
  if (meets) {
    const uint32_t tag =
        tag_of({1, p.max_tokens, p.row_bytes, p.beside_bytes, p.num_experts, p.top_k, p.align,
                p.direct, p.again, p.y_weights != nullptr, p.strict, p.strict ? p.num_rows : 0});
    exchange.signal(tag);
    if (!exchange.wait(tag)) return leave_empty(p);
  }
  if (p.phases == KIMI_ALL_TO_ALL_SEND) return;
  Table table(memory, p.peers.world, Placement(p.num_experts, p.peers.world).count(p.peers.rank));
  fill_table(table, p, exchange);
  if (meets && blockIdx.x == 0) settle(p, exchange, table);
  if (p.phases & KIMI_ALL_TO_ALL_RECEIVE) receive(p, exchange, table);
}

}  // namespace kimi::exchange
