// SPDX-License-Identifier: MIT
// The largest attention logits on Hopper: blocks that stay, of two producing warps and two
// consuming warpgroups.
//
//   queries  64 rows of a consumer, 64 columns a box  --TMA--> its own memory, once a task
//   keys     256 at a time, 64 columns a stage        --TMA--> ring of 5 stages of 32 KB
//   wgmma    64 x 256 sums, 4 a stage, until the columns end; then their largest, in registers
//
//   consumer 0  | multiply | maximum | multiply | maximum |        the tensor cores have one while
//   consumer 1        | multiply | maximum | multiply | ...        the other looks at its sums
//
// Consumer 1 begins when the first sums of 0 are there: while both have work they keep that
// distance, for which the ring holds one stage more than 256 columns have. The keys of the next
// task come while this one is multiplied; its queries when the consumer has done with the old
// ones, while the other consumer multiplies.
//
// By count, a tile of 128 x 256 sums and 192 columns: 3072 cycles of wgmma; 1920 of shared memory
// for its reads and 768 for the keys; 512 for the maxima (two cycles an instruction, two warps a
// scheduler), behind the other consumer's products. From L2 96 KB, 32 B a cycle. Nothing of it was
// measured.
#include <climits>

#include "common/dtype.h"
#include "device/launch.cuh"
#include "device/registers.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "gemm/sm90/ring.cuh"
#include "qk_clip/max_logits.cuh"

namespace kimi {
namespace {

using gemm::sm90::kBoxBytes;
using gemm::sm90::kGroupThreads;
using gemm::sm90::kRowBytes;
using gemm::sm90::kThreads;
using gemm::sm90::Ring;
using max_logits::Sight;
using max_logits::Task;

constexpr int kConsumers = 2, kConsumerRows = 64, kGroupWarps = 4;
constexpr int kCols = 256;                   // keys of a tile of sums
constexpr int kDepth = 64, kMostDepths = 4;  // columns of a stage; stages of a tile
constexpr int kStages = kMostDepths + 1;
constexpr int kSums = kConsumerRows * kCols / kGroupThreads;
static_assert(kConsumers * kConsumerRows == max_logits::kTaskRows);

struct Shared {
  alignas(1024) char queries[kConsumers][kMostDepths][kBoxBytes];
  char keys[kStages][kCols * kRowBytes];
  MBarrier full[kStages], empty[kStages];
  MBarrier queries_full[kConsumers], queries_empty[kConsumers];
  MBarrier turn;  // of consumer 1 to begin
};
static_assert(sizeof(Shared) <= gemm::sm90::kSharedLimit);

// q or k as TMA sees it: the heads' rows, in which a batch is further rows or further heads.
struct Heads {
  TensorMap map;
  int32_t rows_of_batch, heads_of_batch;

  __device__ void load(char* to, MBarrier& full, int depth, int64_t batch, int64_t head,
                       int64_t row) const {
    tma_load(to, map, full, depth * kDepth, static_cast<int32_t>(batch * rows_of_batch + row),
             static_cast<int32_t>(batch * heads_of_batch + head));
  }
};
struct Inputs {
  Heads q, k;
  int32_t depths;
  int32_t run;  // tasks in a row that a block takes
};

// The tasks of this block in turn.
template <class Visitor>
__device__ inline void for_each_task(const AttentionMaxLogitsParams& p, const Inputs& in,
                                     const Visitor& visit) {
  const int64_t tasks = max_logits::num_tasks(p);
#pragma unroll 1
  for (int64_t first = int64_t{blockIdx.x} * in.run; first < tasks;
       first += int64_t{gridDim.x} * in.run)
#pragma unroll 1
    for (int64_t index = first; index < first + in.run && index < tasks; ++index)
      visit(Task(p, index));
}

__device__ inline void produce_keys(const AttentionMaxLogitsParams& p, const Inputs& in,
                                    Shared& s) {
  Ring<kStages> ring;
  for_each_task(p, in, [&](const Task& task) {
    const int64_t head = task.head / (p.heads / p.kv_heads);
#pragma unroll 1
    for (int64_t key = 0; key < task.keys; key += kCols)
#pragma unroll 1
      for (int depth = 0; depth < in.depths; ++depth, ring.next()) {
        mbarrier_wait(s.empty[ring.at], ring.parity ^ 1);
        mbarrier_arrive_expect_tx(s.full[ring.at], kCols * kRowBytes);
        in.k.load(s.keys[ring.at], s.full[ring.at], depth, task.batch, head, key);
      }
  });
}

__device__ inline void produce_queries(const AttentionMaxLogitsParams& p, const Inputs& in,
                                       Shared& s) {
  uint32_t parity = 1;
  for_each_task(p, in, [&](const Task& task) {
#pragma unroll 1
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      MBarrier& full = s.queries_full[consumer];
      mbarrier_wait(s.queries_empty[consumer], parity);
      mbarrier_arrive_expect_tx(full, static_cast<uint32_t>(in.depths) * kBoxBytes);
#pragma unroll 1
      for (int depth = 0; depth < in.depths; ++depth)
        in.q.load(s.queries[consumer][depth], full, depth, task.batch, task.head,
                  task.first + consumer * kConsumerRows);
    }
    parity ^= 1;
  });
}

// One arrival for a warp, all of whose lanes have done with what the barrier guards.
__device__ inline void release(MBarrier& empty) {
  if (lane_id() == 0) mbarrier_arrive(empty);
}

// The sums of the consumer's rows and the next 256 keys.
template <class T>
__device__ inline void multiply(const Inputs& in, Shared& s, int consumer, Ring<kStages>& ring,
                                float (&d)[kSums]) {
  constexpr Major kMajor = Major::kDepth;
  int before = 0;
  wgmma_fence(d);
#pragma unroll 1
  for (int depth = 0; depth < in.depths; ++depth, ring.next()) {
    mbarrier_wait(s.full[ring.at], ring.parity);
    wgmma_fence();
    const uint64_t a = wgmma_descriptor<kMajor>(s.queries[consumer][depth]);
    const uint64_t b = wgmma_descriptor<kMajor>(s.keys[ring.at]);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      wgmma<T, kCols, kMajor, kMajor>(d, wgmma_advance<kMajor>(a, k), wgmma_advance<kMajor>(b, k),
                                      depth > 0 || k > 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (depth > 0) release(s.empty[before]);
    before = ring.at;
  }
  wgmma_wait<0>();
  wgmma_fence(d);
  release(s.empty[before]);
}

// The largest of a thread's sums that are seen, of the warp's 16 rows from `row` on.
__device__ inline float largest_of(const float (&d)[kSums], const Sight<kCols>& sight, int row) {
  float most[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};  // chains that do not wait
  if (sight.is_whole(row, 16)) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) most[i % 4] = max_nan(most[i % 4], d[i]);
  } else {
    const int col = lane_id() % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int seen = sight.seen(row + lane_id() / 4 + 8 * half) - col;
#pragma unroll
      for (int i = 0; i < kSums / 2; ++i)
        most[i % 4] = max_nan(
            most[i % 4], i / 2 * 8 + i % 2 < seen ? d[i / 2 * 4 + 2 * half + i % 2] : -INFINITY);
    }
  }
  return max_nan(max_nan(most[0], most[1]), max_nan(most[2], most[3]));
}

template <class T>
__device__ inline void consume(const AttentionMaxLogitsParams& p, const Inputs& in, Shared& s) {
  const int consumer = static_cast<int>(threadIdx.x) / kGroupThreads - 1;
  const int row = consumer * kConsumerRows + warp_id() % kGroupWarps * 16;
  Ring<kStages> ring;
  uint32_t parity = 0;
  bool opens = consumer == 0;
  float d[kSums];
  if (consumer == 1) mbarrier_wait(s.turn, 0);
  for_each_task(p, in, [&](const Task& task) {
    float most = -INFINITY;
    mbarrier_wait(s.queries_full[consumer], parity);
#pragma unroll 1
    for (int64_t key = 0; key < task.keys; key += kCols) {
      multiply<T>(in, s, consumer, ring, d);
      if (key + kCols >= task.keys) release(s.queries_empty[consumer]);
      if (opens) release(s.turn);
      opens = false;
      most = max_nan(most, largest_of(d, Sight<kCols>(task, key), row));
    }
    max_logits::join(p, task.head, most);
    parity ^= 1;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    max_logits_wgmma_kernel(const __grid_constant__ AttentionMaxLogitsParams p,
                            const __grid_constant__ Inputs in) {
  KIMI_SHARED(Shared, memory);
  Shared& s = *memory;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(s.full[i], 1);
      mbarrier_init(s.empty[i], kConsumers * kGroupWarps);
    }
    for (int i = 0; i < kConsumers; ++i) {
      mbarrier_init(s.queries_full[i], 1);
      mbarrier_init(s.queries_empty[i], kGroupWarps);
    }
    mbarrier_init(s.turn, kGroupWarps);
    mbarrier_fence_init();
    tma_prefetch(in.q.map);
    tma_prefetch(in.k.map);
  }
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    registers_decrease<72>();
    if (lane_id() == 0 && warp_id() == 0) produce_keys(p, in, s);
    if (lane_id() == 0 && warp_id() == 1) produce_queries(p, in, s);
  } else {
    registers_increase<216>();
    consume<T>(p, in, s);
  }
}

// ---- launcher ----------------------------------------------------------------------------------

// A tensor [batch, heads, rows, dim]; strides in elements, that of a dimension of one element 0.
struct Tensor4 {
  const void* data;
  int64_t batch, heads, rows, dim, batch_stride, head_stride, row_stride, col_stride;
};

bool is_stride(int64_t elements) {
  return elements > 0 && elements * 2 % 16 == 0 && elements * 2 < int64_t{1} << 40;
}

// The rank-3 view in which the batches are further rows or further heads, if there is one.
struct View {
  int64_t sizes[3], strides_bytes[2];  // innermost first
  int32_t rows_of_batch, heads_of_batch;
};
bool view_of(const Tensor4& x, View* view) {
  const int64_t any = round_up(x.dim, 8);  // a stride that means nothing
  const int64_t row = x.rows > 1 ? x.row_stride : any, head = x.heads > 1 ? x.head_stride : any;
  *view = {{x.dim, x.rows, x.heads}, {2 * row, 2 * head}, 0, 0};
  if (x.batch > 1 && x.heads == 1) {
    *view = {{x.dim, x.rows, x.batch}, {2 * row, 2 * x.batch_stride}, 0, 1};
  } else if (x.batch > 1 && x.batch_stride == x.heads * x.head_stride) {
    view->sizes[2] = x.batch * x.heads;
    view->heads_of_batch = static_cast<int32_t>(x.heads);
  } else if (x.batch > 1) {
    if (x.rows == 1) view->strides_bytes[0] = 2 * x.batch_stride;
    if (x.batch_stride * 2 != x.rows * view->strides_bytes[0]) return false;
    view->sizes[1] = x.batch * x.rows;
    view->rows_of_batch = static_cast<int32_t>(x.rows);
  }
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.col_stride == 1 || x.dim == 1) &&
         is_stride(view->strides_bytes[0] / 2) && is_stride(view->strides_bytes[1] / 2) &&
         view->sizes[1] < INT_MAX - kCols && view->sizes[2] < INT_MAX;
}

Tensor4 queries_of(const AttentionMaxLogitsParams& p) {
  return {p.q,           p.batch,          p.heads,         p.queries,
          p.dim,         p.q_batch_stride, p.q_head_stride, p.q_row_stride,
          p.q_col_stride};
}
Tensor4 keys_of(const AttentionMaxLogitsParams& p) {
  return {p.k,           p.batch,          p.kv_heads,      p.keys,
          p.dim,         p.k_batch_stride, p.k_head_stride, p.k_row_stride,
          p.k_col_stride};
}

template <class T>
Status encode(Heads* heads, const Tensor4& x, int32_t box_rows) {
  View view;
  if (!view_of(x, &view)) return invalid("max_logits_sm90: q, k: expected what serves accepts");
  heads->rows_of_batch = view.rows_of_batch;
  heads->heads_of_batch = view.heads_of_batch;
  const int32_t box[] = {kDepth, box_rows, 1};
  return encode_tensor_map<T>(&heads->map, x.data, 3, view.sizes, view.strides_bytes, box,
                              Swizzle::k128);
}

template <class T>
Status launch_sm90(const AttentionMaxLogitsParams& p, void* stream) {
  Inputs in{};
  KIMI_RETURN_IF_ERROR(encode<T>(&in.q, queries_of(p), kConsumerRows));
  KIMI_RETURN_IF_ERROR(encode<T>(&in.k, keys_of(p), kCols));
  const auto kernel = max_logits_wgmma_kernel<T>;
  const int64_t tasks = max_logits::num_tasks(p),
                resident = resident_blocks(kernel, kThreads, sizeof(Shared));
  in.depths = static_cast<int32_t>(ceil_div(p.dim, kDepth));
  in.run = tasks > resident ? 2 : 1;
  const dim3 grid(static_cast<unsigned>(std::min(ceil_div(tasks, in.run), resident)));
  return launch(kernel, LaunchConfig{grid, dim3(kThreads), sizeof(Shared), stream}, p, in);
}

}  // namespace

bool max_logits::serves_sm90(const AttentionMaxLogitsParams& p) {
  View view;
  return p.dtype != KIMI_FLOAT32 && p.dim <= kMostDepths * kDepth &&
         view_of(queries_of(p), &view) && view_of(keys_of(p), &view);
}

Status max_logits::largest_sm90(const AttentionMaxLogitsParams& p, void* stream) {
  if (p.dtype == KIMI_BFLOAT16) return launch_sm90<bf16>(p, stream);
  return launch_sm90<fp16>(p, stream);
}

}  // namespace kimi
