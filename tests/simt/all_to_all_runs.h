// SPDX-License-Identifier: MIT
//
// Runs of dispatch and combine on the host: in one launch, in phases, or by several blocks of each
// rank, held against the definition.
#pragma once

#include "all_to_all/combine.cuh"
#include "all_to_all/dispatch.cuh"
#include "all_to_all_world.h"
#include "simt.h"

namespace a2a {

using namespace kimi::exchange;

enum Way { kOneLaunch, kPhases, kGrid };  // kGrid: several blocks, and as many ranks as one likes

template <class F>
void dispatch_ranks(const DispatchParams* ranks, uint32_t alive) {
  if (alive >> blockIdx.y & 1) dispatch_rank<F>(ranks[blockIdx.y]);
}
template <class F>
void combine_ranks(const CombineParams* ranks, uint32_t alive) {
  if (alive >> blockIdx.y & 1) combine_rank<F>(ranks[blockIdx.y]);
}

inline unsigned ranks_of(const World& w) { return static_cast<unsigned>(w.s.ranks); }

template <class F = Flags>
void run_grid(const std::vector<DispatchParams>& p, unsigned blocks, uint32_t alive = ~0u) {
  simt::launch(dispatch_ranks<F>,
               {{blocks, static_cast<unsigned>(p.size())},
                kThreads,
                table_bytes(p[0].peers.world, p[0].num_experts),
                true},
               p.data(), alive);
}
template <class F = Flags>
void run_grid(const std::vector<CombineParams>& p, unsigned blocks, uint32_t alive = ~0u) {
  simt::launch(combine_ranks<F>, {{blocks, static_cast<unsigned>(p.size())}, kThreads, 0, true},
               p.data(), alive);
}

inline void check_ok(const Status& status) { require(status.is_ok(), status.message); }

inline Status call(const DispatchParams& p) {
  return all_to_all_dispatch(p, KIMI_DEVICE_CUDA, nullptr);
}
inline Status call(const CombineParams& p) {
  return all_to_all_combine(p, KIMI_DEVICE_CUDA, nullptr);
}

template <class Params>
void run(std::vector<Params> p, Way way, unsigned blocks) {
  if (way == kGrid) return run_grid(p, blocks);
  for (Params& each : p) each.num_local = static_cast<int32_t>(p.size());
  for (Params& each : p) each.num_blocks = way == kOneLaunch ? 1 : static_cast<int32_t>(blocks);
  if (way == kOneLaunch) return check_ok(call(p[0]));
  for (int phase : {KIMI_ALL_TO_ALL_SEND, KIMI_ALL_TO_ALL_MEET, KIMI_ALL_TO_ALL_RECEIVE}) {
    for (Params& each : p) each.phases = static_cast<kimi_all_to_all_phase>(phase);
    check_ok(call(p[0]));
  }
}

inline std::vector<Bytes> results_of(World& w, const Expected& e) {
  std::vector<Bytes> outs;
  for (const auto& rows : e.rows) {
    Bytes& out = outs.emplace_back(rows.size() * w.row_bytes());
    for (size_t i = 0; i < out.size(); i += value_bytes(w.s.dtype))
      store_value(&out[i], w.s.dtype, std::normal_distribution<float>(0.0f, 2.0f)(w.random));
  }
  return outs;
}

inline void dispatch_once(World& w, const Expected& e, Way way, unsigned blocks, bool again) {
  w.fill(0xff);
  std::vector<DispatchParams> p;
  for (int r = 0; r < w.s.ranks; ++r)
    p.push_back(w.dispatch_params(r, static_cast<int64_t>(e.rows[r].size()), again));
  run(p, way, blocks);
  for (int r = 0; r < w.s.ranks; ++r)
    if (!w.masked(r)) w.check_dispatch(e, r);
}
inline void combine_once(World& w, const Expected& e, Way way, unsigned blocks) {
  w.fill(0xff);
  const std::vector<Bytes> outs = results_of(w, e);
  std::vector<CombineParams> p;
  for (int r = 0; r < w.s.ranks; ++r) {
    w.rank[r].home_y.assign(w.rank[r].tokens * w.row_bytes(), 0xa5);
    p.push_back(w.combine_params(r, outs[r]));
  }
  run(p, way, blocks);
  for (int r = 0; r < w.s.ranks; ++r)
    if (!w.masked(r)) w.check_combine(e, outs, r);
}

inline void start(const Shape& s, Way way, uint64_t seed) {
  simt::settings().seed = seed;
  g_case = "P " + std::to_string(s.ranks) + " E " + std::to_string(s.experts) + " K " +
           std::to_string(s.top_k) + " H " + std::to_string(s.hidden) + " align " +
           std::to_string(s.align) + " capacity " + std::to_string(s.capacity) + " dtype " +
           std::to_string(s.dtype) + " wire " + std::to_string(s.wire) + " direct " +
           std::to_string(s.direct) + " way " + std::to_string(way) + " seed " +
           std::to_string(seed);
}

inline void there_and_back(const Shape& s, Way way, int calls, uint64_t seed) {
  start(s, way, seed);
  World w(s, seed);
  for (int call = 0; call < calls; ++call) {
    w.draw(w.random() % 3 == 0 ? 2 : 0, w.random() % 3 * 0.2);
    const Expected e = w.expected();
    const unsigned blocks = 1 + static_cast<unsigned>(w.random() % 3);
    dispatch_once(w, e, way, blocks, false);
    combine_once(w, e, way, blocks);
    if (w.random() % 2 == 0) continue;
    for (Rank& k : w.rank) std::shuffle(k.x.begin(), k.x.end(), w.random);
    dispatch_once(w, e, way, blocks, true);
    combine_once(w, e, way, blocks);
  }
}

}  // namespace a2a
