// SPDX-License-Identifier: MIT
// permute_plan on a CPU: a counting sort in three passes over runs of pairs, one run a thread.
//
//   count    histogram[run][e]                               T*K ids read
//   prefix   first row of (run, e): runs in order            runs * E, one thread
//   place    row = next[run][e]++; row_map, source           T*K ids read, 8 bytes a pair written
//
// The rows do not depend on how the pairs were cut into runs.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/integer.h"
#include "cpu/parallel.h"
#include "permute/permute.h"

namespace kimi {
namespace {

constexpr int64_t kPairsPerRun = 4096, kMaxRuns = 64;

struct Runs {
  int64_t pairs, count;
  int64_t begin(int64_t run) const { return pairs * run / count; }
};

Runs runs_of(const PermutePlanParams& p) {
  const int64_t pairs = p.num_tokens * p.top_k;
  const int64_t wanted = std::min<int64_t>(pairs / kPairsPerRun, cpu::num_threads());
  return {pairs, std::clamp<int64_t>(wanted, 1, kMaxRuns)};
}

// Bucket of an id: E holds the dropped ones.
uint32_t bucket(int32_t id, uint32_t num_experts) { return std::min(uint32_t(id), num_experts); }

}  // namespace

size_t permute_plan_workspace_bytes_cpu(const PermutePlanParams& p) {
  return sizeof(int32_t) * kMaxRuns * (size_t(p.num_experts) + 1);
}

Status permute_plan_cpu(const PermutePlanParams& p) {
  const Runs runs = runs_of(p);
  const uint32_t experts = uint32_t(p.num_experts);
  int32_t* const next = static_cast<int32_t*>(p.workspace);  // [runs, E + 1]
  std::atomic<int64_t> first_bad{runs.pairs};

  cpu::parallel_for(runs.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t run = first; run < last; ++run) {
      int32_t* counts = next + run * (experts + 1);
      std::memset(counts, 0, sizeof(int32_t) * (experts + 1));
      uint32_t highest = 0;  // of id + 1: -1 is 0, and other negative ids are beyond every expert
      for (int64_t i = runs.begin(run); i < runs.begin(run + 1); ++i) {
        highest = std::max(highest, uint32_t(p.indices[i]) + 1);
        ++counts[bucket(p.indices[i], experts)];
      }
      if (highest <= experts + 1) continue;
      int64_t bad = runs.begin(run);
      while (uint32_t(p.indices[bad]) + 1 <= experts + 1) ++bad;
      int64_t seen = first_bad.load();
      while (bad < seen && !first_bad.compare_exchange_weak(seen, bad)) {
      }
    }
  });
  if (const int64_t bad = first_bad.load(); bad < runs.pairs)
    return invalid("permute_plan: indices[", bad / p.top_k, ", ", bad % p.top_k,
                   "]: expected an expert in 0..", p.num_experts - 1, ", or -1 for none, got ",
                   p.indices[bad]);

  int32_t row = 0;
  for (uint32_t e = 0; e < experts; ++e) {
    int32_t count = 0;
    for (int64_t run = 0; run < runs.count; ++run) {
      int32_t& entry = next[run * (experts + 1) + e];
      count += std::exchange(entry, row + count);
    }
    const int32_t end = row + int32_t(round_up(count, p.align));
    std::fill(p.source + row + count, p.source + end, -1);
    p.tokens_per_expert[e] = count;
    p.offsets[e] = row = end;
  }
  const int64_t capacity = runs.pairs + int64_t{p.num_experts} * (p.align - 1);
  std::fill(p.source + row, p.source + capacity, -1);

  cpu::parallel_for(runs.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t run = first; run < last; ++run) {
      int32_t* cursor = next + run * (experts + 1);
      for (int64_t i = runs.begin(run); i < runs.begin(run + 1); ++i) {
        const uint32_t e = bucket(p.indices[i], experts);
        if (e == experts) {
          p.row_map[i] = -1;
          continue;
        }
        p.row_map[i] = cursor[e];
        p.source[cursor[e]++] = int32_t(i);
      }
    }
  });
  return Status::ok();
}

}  // namespace kimi
