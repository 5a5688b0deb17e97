// SPDX-License-Identifier: MIT
// How the CUDA passes find their work: the list of tensors travels in the parameters of the launch,
// so that nothing is copied from the host and a graph captures it.
//
//   entries   | tensor 0 | tensor 1 | tensor 2 | ...        as many as 32000 bytes hold
//   blocks    0 1 2 ..   5 6 7 ...  9                       one a run of 2^13 elements; its tensor
//                                                           by bisection over the first blocks
// Longer lists take a launch more. Dtypes are looked at where elements are loaded, not in template
// arguments: a branch that all threads take alike, beside 100 bytes of memory.
#pragma once

#include <algorithm>

#include "device/launch.cuh"
#include "device/ops.cuh"
#include "device/vec.cuh"
#include "muon_clip/numbers.h"

namespace kimi::muon_clip_cuda {

using namespace muon_clip_math;

inline constexpr size_t kParameterBytes = 32000;  // of the 32764 that a launch takes

// Numbers of the call, and its tensors. An Entry has `first_block`, 64 bits.
template <class Numbers, class Entry>
struct Table {
  static constexpr int kMost = (kParameterBytes - sizeof(Numbers)) / sizeof(Entry);
  Numbers numbers;
  Entry entries[kMost];
  int32_t count;

  // Of a block: the last entry that begins at it or before.
  __device__ const Entry& of(int64_t block) const {
    int low = 0, high = count;  // entries[low].first_block <= block < entries[high].first_block
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (entries[middle].first_block <= block ? low : high) = middle;
    }
    return entries[low];
  }
};

// `fill(entry, t)` gives the number of blocks of tensor t; run(table, blocks) for each table. Those
// without blocks are left out unless `keep_empty`.
template <class Table, class Fill, class Run>
Status in_tables(Table& table, int64_t count, bool keep_empty, const Fill& fill, const Run& run) {
  int64_t blocks = 0;
  table.count = 0;
  for (int64_t t = 0; t < count; ++t) {
    auto& entry = table.entries[table.count];
    const int64_t more = fill(entry, t);
    entry.first_block = blocks;
    blocks += more;
    table.count += more > 0 || keep_empty;
    if (table.count == Table::kMost || (t + 1 == count && table.count > 0)) {
      KIMI_RETURN_IF_ERROR(run(table, blocks));
      blocks = table.count = 0;
    }
  }
  return Status::ok();
}

inline int64_t blocks_of(int64_t elements) { return (elements + kBlock - 1) / kBlock; }

inline LaunchConfig grid(int64_t blocks, int threads, void* stream) {
  return {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), 0, stream};
}

// Whether 16 bytes divide every address.
template <class... Addresses>
__device__ bool aligned16(const Addresses*... addresses) {
  return ((reinterpret_cast<uintptr_t>(addresses) | ...) % 16) == 0;
}

// Elements i .. i + 7 of a tensor, those beyond `count` left out.
__device__ inline void load8(const void* x, kimi_dtype dtype, int64_t i, float (&v)[8], int count,
                             bool wide) {
  if (dtype == KIMI_FLOAT32)
    kimi::load8(static_cast<const float*>(x) + i, v, count, wide);
  else if (dtype == KIMI_BFLOAT16)
    kimi::load8(static_cast<const bf16*>(x) + i, v, count, wide);
  else
    kimi::load8(static_cast<const fp16*>(x) + i, v, count, wide);
}
__device__ inline void store8(void* x, kimi_dtype dtype, int64_t i, const float (&v)[8], int count,
                              bool wide) {
  if (dtype == KIMI_FLOAT32)
    kimi::store8(static_cast<float*>(x) + i, v, count, wide);
  else if (dtype == KIMI_BFLOAT16)
    kimi::store8(static_cast<bf16*>(x) + i, v, count, wide);
  else
    kimi::store8(static_cast<fp16*>(x) + i, v, count, wide);
}

// Sums by halves over the block's threads; every one gets the sum.
template <int kThreads>
__device__ double block_tree(double mine, double (&sums)[kThreads]) {
  const int thread = static_cast<int>(threadIdx.x);
  sums[thread] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  __syncthreads();
  return sums[0];
}

}  // namespace kimi::muon_clip_cuda
