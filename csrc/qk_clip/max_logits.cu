// SPDX-License-Identifier: MIT
// The largest attention logits on any GPU from sm_80 on: mma.sync (fp32: fma) out of a ring of
// tiles of keys that cp.async fills, with a maximum where a product would be stored.
//
//   queries of the task --> shared memory, once          128 x dim, up to 64 KB; larger ones come
//   keys 0.., 128 at a time --> ring of 3 tiles of 64 B  along with the keys, tile after tile
//   64 x 64 sums a warp (2 x 2 warps), dim deep --> the largest that is seen, per thread
//   lanes --> shuffles --> an integer atomic for each warp and task
//
// The ring does not stop between the keys of one tile of sums and the next: it brings (8 KB a step
// of 2^20 operations; the products of gemm/sm80 bring 16) while the last sums are looked at, which
// is one instruction for each sum, to dim / 16 of mma for sixteen of them.
#include "common/dtype.h"
#include "device/launch.cuh"
#include "gemm/sm80/tile_loader.cuh"
#include "gemm/sm80/warp_tile.cuh"
#include "qk_clip/max_logits.cuh"

namespace kimi {
namespace {

using max_logits::Sight;
using max_logits::Task;

constexpr float kNone = -INFINITY;

template <class T_>
struct Traits {
  using T = T_;
  static constexpr int kThreads = 128, kCols = 128;  // of the block; keys of a tile of sums
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));
  static constexpr int kStages = 3, kMostQueryTiles = 8;
  using Tile = gemm::sm80::TileLayout<T, Major::kDepth, kCols, kDepth>;
  using Warp = gemm::sm80::WarpTile<T, Tile, Tile, 64, 64>;
  static constexpr int kSums = 64 * 64 / kWarpSize, kUnroll = 2;
  static constexpr int kSteps = kDepth / Warp::kStepDepth;
  static_assert(max_logits::kTaskRows == kCols && Warp::kUnroll == kUnroll && kSteps % 2 == 0);
};

// What the launcher knows of the call.
struct Plan {
  bool wide_q, wide_k;  // cp.async can copy them
  bool queries_stay;
};

// The rows of a head of q or k.
struct Rows {
  const void* data;
  int64_t row_stride, col_stride, count;
  bool wide;
};

// Columns depth.. of rows first.. to a tile; what does not exist is zero.
template <class X>
__device__ inline void load_tile(char* tile, const Rows& from, int64_t first, int64_t depth,
                                 int64_t dim) {
  using Tile = typename X::Tile;
  constexpr int kEvery = X::kThreads / Tile::kChunks;  // rows between a thread's
  const int chunk = static_cast<int>(threadIdx.x) % Tile::kChunks,
            row = static_cast<int>(threadIdx.x) / Tile::kChunks;
  char* const to = tile + Tile::offset(row, chunk);
  const int64_t column = depth + chunk * Tile::kPerChunk, left = dim - column;
  const auto* const data = static_cast<const typename X::T*>(from.data);
  if (from.wide) {
#pragma unroll
    for (int i = 0; i < X::kCols / kEvery; ++i) {
      const int64_t at = first + row + i * kEvery;
      const bool exists = left > 0 && at < from.count;
      cp_async16(to + i * kEvery * Tile::kRowBytes,
                 data + (exists ? at * from.row_stride + column : 0), exists);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < X::kCols / kEvery; ++i) {
    const int64_t at = first + row + i * kEvery;
    const bool exists = left > 0 && at < from.count;
    gemm::sm80::fill_chunk(to + i * kEvery * Tile::kRowBytes,
                           data + (exists ? at * from.row_stride + column * from.col_stride : 0),
                           from.col_stride,
                           !exists                  ? 0
                           : left < Tile::kPerChunk ? static_cast<int>(left)
                                                    : Tile::kPerChunk);
  }
}

// The largest of a thread's sums that are seen, of the warp's rows and columns from row, col on.
template <class X>
__device__ inline float largest_of(const float (&c)[X::kSums], const Sight<X::kCols>& sight,
                                   int row, int col) {
  constexpr int kColTiles = X::Warp::kColTiles;
  float most[4] = {kNone, kNone, kNone, kNone};  // chains that do not wait for one another
  if (sight.is_whole(row, 64)) {
#pragma unroll
    for (int i = 0; i < X::kSums; ++i) most[i % 4] = max_nan(most[i % 4], c[i]);
  } else {
    row += lane_id() / 4;
    col += lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < X::kSums; i += 4 * kColTiles)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int seen = sight.seen(row + i / (4 * kColTiles) * 16 + 8 * half) - col;
#pragma unroll
        for (int j = 0; j < 2 * kColTiles; ++j) {
          const float sum = c[i + j / 2 * 4 + 2 * half + j % 2];
          most[j % 4] = max_nan(most[j % 4], j / 2 * 8 + j % 2 < seen ? sum : kNone);
        }
      }
  }
  return max_nan(max_nan(most[0], most[1]), max_nan(most[2], most[3]));
}

// The largest product of the task's queries and the keys they see, of this thread's sums.
template <class X>
__device__ inline float largest_of_task(const AttentionMaxLogitsParams& p, const Plan& plan,
                                        const Task& task, char* memory) {
  using Tile = typename X::Tile;
  using Warp = typename X::Warp;
  const int64_t kv_head = task.head / (p.heads / p.kv_heads);
  const auto at = [](const void* data, int64_t elements) {
    return static_cast<const typename X::T*>(data) + elements;
  };
  const Rows q{at(p.q, task.batch * p.q_batch_stride + task.head * p.q_head_stride), p.q_row_stride,
               p.q_col_stride, p.queries, plan.wide_q};
  const Rows k{at(p.k, task.batch * p.k_batch_stride + kv_head * p.k_head_stride), p.k_row_stride,
               p.k_col_stride, p.keys, plan.wide_k};
  const int depths = static_cast<int>(ceil_div(p.dim, X::kDepth));
  const int stage = Tile::kBytes * (plan.queries_stay ? 1 : 2);
  char* const ring = memory + (plan.queries_stay ? depths * Tile::kBytes : 0);

  int64_t next_key = 0;  // of the tile that is asked for next
  int next_depth = 0;
  const auto fill = [&](int slot) {
    if (next_key < task.keys) {
      const int64_t depth = int64_t{next_depth} * X::kDepth;
      load_tile<X>(ring + slot, k, next_key, depth, p.dim);
      if (!plan.queries_stay) load_tile<X>(ring + slot + Tile::kBytes, q, task.first, depth, p.dim);
      if (++next_depth == depths) {
        next_depth = 0;
        next_key += X::kCols;
      }
    }
    cp_async_commit();  // an empty group too: waits count groups
  };
  if (plan.queries_stay)
    for (int d = 0; d < depths; ++d)
      load_tile<X>(memory + d * Tile::kBytes, q, task.first, int64_t{d} * X::kDepth, p.dim);
#pragma unroll 1
  for (int s = 0; s < X::kStages; ++s) fill(s * stage);
  cp_async_wait<X::kStages - 1>();
  __syncthreads();

  const int row = warp_id() / 2 * 64, col = warp_id() % 2 * 64;
  const Warp warp(row, col);
  int slot = 0, depth = 0;
  const auto load = [&](typename Warp::Fragment& f, int step) {
    const char* const queries =
        plan.queries_stay ? memory + depth * Tile::kBytes : ring + slot + Tile::kBytes;
    warp.load(f, queries, ring + slot, step);
  };
  float most = kNone;
  typename Warp::Fragment f[2];
  load(f[0], 0);
#pragma unroll 1
  for (int64_t key = 0; key < task.keys; key += X::kCols) {
    float c[X::kSums] = {};
#pragma unroll 1
    for (int left = depths; left > 0; --left) {
#pragma unroll 1
      for (int step = 0; step < X::kSteps; step += X::kUnroll) {
#pragma unroll
        for (int i = 0; i < X::kUnroll; ++i) {
          const bool last = i + 1 == X::kUnroll && step + X::kUnroll == X::kSteps;
          if (last) {  // the next tile has come; all warps have read this one: it is filled anew
            cp_async_wait<X::kStages - 2>();
            __syncthreads();
            fill(slot);
            slot = slot == (X::kStages - 1) * stage ? 0 : slot + stage;
            depth = left > 1 ? depth + 1 : 0;
          }
          load(f[(i + 1) % 2], last ? 0 : step + i + 1);
          Warp::multiply(f[i % 2], c);
        }
      }
    }
    most = max_nan(most, largest_of<X>(c, Sight<X::kCols>(task, key), row, col));
  }
  __syncthreads();  // the loop reads one fragment too many
  return most;
}

template <class X>
__global__ void __launch_bounds__(X::kThreads, 2)
    max_logits_kernel(const __grid_constant__ AttentionMaxLogitsParams p,
                      const __grid_constant__ Plan plan) {
  KIMI_SHARED(char, memory);
  const int64_t tasks = max_logits::num_tasks(p);
#pragma unroll 1
  for (int64_t index = blockIdx.x; index < tasks; index += gridDim.x) {
    const Task task(p, index);
    max_logits::join(p, task.head, largest_of_task<X>(p, plan, task, memory));
  }
}

__global__ void max_logits_fill_kernel(float* to, int64_t count, float value) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < count) to[i] = value;
}

bool is_wide(const void* data, int64_t batch, int64_t head, int64_t row, int64_t col, int64_t dim,
             int64_t bytes) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return aligned && (batch | head | row | dim) * bytes % 16 == 0 && col == 1;
}

template <class T>
Status launch_sm80(const AttentionMaxLogitsParams& p, void* stream) {
  using X = Traits<T>;
  const int64_t query_tiles = ceil_div(p.dim, X::kDepth);
  const Plan plan = {is_wide(p.q, p.q_batch_stride, p.q_head_stride, p.q_row_stride, p.q_col_stride,
                             p.dim, sizeof(T)),
                     is_wide(p.k, p.k_batch_stride, p.k_head_stride, p.k_row_stride, p.k_col_stride,
                             p.dim, sizeof(T)),
                     query_tiles <= X::kMostQueryTiles};
  const int64_t tiles = plan.queries_stay ? query_tiles + X::kStages : 2 * X::kStages;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(max_logits::num_tasks(p), 1 << 30)));
  return launch(
      max_logits_kernel<X>,
      LaunchConfig{grid, dim3(X::kThreads), static_cast<size_t>(tiles * X::Tile::kBytes), stream},
      p, plan);
}

}  // namespace

Status max_logits::largest_sm80(const AttentionMaxLogitsParams& p, void* stream) {
  return dispatch(p.dtype, [&]<class T>() { return launch_sm80<T>(p, stream); });
}

Status attention_max_logits_cuda(const AttentionMaxLogitsParams& params, void* stream) {
  AttentionMaxLogitsParams p = params;
  if (p.heads == 0) return Status::ok();
  // The stride of a dimension of one element says nothing.
  for (int64_t* stride : {&p.q_batch_stride, &p.k_batch_stride})
    if (p.batch == 1) *stride = 0;
  if (p.heads == 1) p.q_head_stride = 0;
  if (p.kv_heads == 1) p.k_head_stride = 0;
  if (p.queries == 1) p.q_row_stride = 0;
  if (p.keys == 1) p.k_row_stride = 0;
  constexpr int kThreads = 128;
  const bool nothing = p.batch == 0 || p.queries == 0 || p.keys == 0;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.heads, kThreads)));
  KIMI_RETURN_IF_ERROR(launch(max_logits_fill_kernel, LaunchConfig{grid, dim3(kThreads), 0, stream},
                              p.max_logits, p.heads, p.dim == 0 && !nothing ? 0.0f : kNone));
  if (nothing || p.dim == 0) return Status::ok();
  int sm = 0;
  KIMI_RETURN_IF_ERROR(device_sm(sm));
  if (sm / 10 == 9 && max_logits::serves_sm90(p)) return max_logits::largest_sm90(p, stream);
  return max_logits::largest_sm80(p, stream);
}

}  // namespace kimi
