// SPDX-License-Identifier: MIT
// What the kernels of attention_max_logits share: tasks, what their rows see, and the join of their
// maxima.
//
//   task  a block of kTaskRows queries of one head; those of a head follow one another, long and
//         short in turn, so that two neighbours have the same keys together, and blocks that run
//         at the same time read the keys of few heads:
//
//         task    0   1   2   3            queries of the block, from the last one on
//         block   3   0   2   1
#pragma once

#include <algorithm>
#include <cmath>

#include "common/integer.h"
#include "device/atomic.cuh"
#include "device/math.cuh"
#include "device/warp.cuh"
#include "qk_clip/qk_clip.h"

namespace kimi::max_logits {

inline constexpr int kTaskRows = 128;

KIMI_HOST_DEVICE int64_t blocks_of_head(const AttentionMaxLogitsParams& p) {
  return (p.queries + kTaskRows - 1) / kTaskRows;
}
KIMI_HOST_DEVICE int64_t num_tasks(const AttentionMaxLogitsParams& p) {
  return p.batch * p.heads * blocks_of_head(p);
}

struct Task {
  int64_t batch, head, first;  // first query
  int64_t before;              // row i of the task sees keys 0 .. before + i, as far as they exist
  int64_t keys;                // that the last row sees
  int rows;

  __device__ Task(const AttentionMaxLogitsParams& p, int64_t index) {
    const int64_t blocks = blocks_of_head(p), pair = index / blocks, turn = index % blocks;
    batch = pair / p.heads;
    head = pair % p.heads;
    first = (turn % 2 == 0 ? blocks - 1 - turn / 2 : turn / 2) * kTaskRows;
    rows = p.queries - first < kTaskRows ? static_cast<int>(p.queries - first) : kTaskRows;
    before = p.causal ? first + p.keys - p.queries : p.keys;
    keys = before + rows < p.keys ? before + rows : p.keys;
  }
};

// Which sums of kCols columns, those of the keys from `key` on, rows of a task see.
template <int kCols>
struct Sight {
  int64_t past_first;  // how many of the keys row 0 would see if there were more of them
  int keys;            // of the columns exist
  int rows;

  __device__ Sight(const Task& task, int64_t key)
      : past_first(task.before + 1 - key),
        keys(task.keys - key < kCols ? static_cast<int>(task.keys - key) : kCols),
        rows(task.rows) {}

  // All columns of `count` rows from `row` on.
  __device__ bool is_whole(int row, int count) const {
    return keys == kCols && past_first + row >= kCols && row + count <= rows;
  }
  // Columns that a row sees, from the first one on.
  __device__ int seen(int row) const {
    const int64_t visible = past_first + row;
    return row >= rows ? 0 : visible < keys ? static_cast<int>(visible) : keys;
  }
};

// max_logits[head] = max(max_logits[head], scale times the largest of the warp's values), NaN above
// all. Of two floats that are no negative NaN the larger one is the larger integer if it is
// positive, and the smaller unsigned one if both are negative: whatever the order of arrival, the
// same bits stay.
__device__ inline void join(const AttentionMaxLogitsParams& p, int64_t head, float largest) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
    largest = max_nan(largest, warp_exchange(largest, mask));
  if (lane_id() != 0) return;
  const float logit = mul_rn(largest, p.scale);
  const uint32_t bits = logit != logit ? 0x7fffffffu : bits_of(logit);
  float* const to = p.max_logits + head;
  if (bits >> 31 == 0)
    atomic_max(reinterpret_cast<int32_t*>(to), static_cast<int32_t>(bits));
  else
    atomic_min(reinterpret_cast<uint32_t*>(to), bits);
}

// mma.sync, or fma, for what is not empty (max_logits.cu). max_logits[h] holds -inf.
Status largest_sm80(const AttentionMaxLogitsParams& p, void* stream);

// wgmma, where TMA can read q and k (max_logits_sm90.cu).
bool serves_sm90(const AttentionMaxLogitsParams& p);
Status largest_sm90(const AttentionMaxLogitsParams& p, void* stream);

}  // namespace kimi::max_logits
