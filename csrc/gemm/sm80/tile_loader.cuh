// SPDX-License-Identifier: MIT
// One operand's way from global memory to the ring of tiles in shared memory.
//
//   thread t carries chunk t % kChunks of rows t / kChunks + i kRowStep, i = 0, 1, ...
//
// `wide` operands go by cp.async, 16 bytes a copy; what lies outside of the operand is zero. Others
// (odd strides, addresses or sizes) are read element by element into the same layout: slow, right.
//
//   OuterRows  depth-major tiles   A of M-grouped, with or without an index; B of M-grouped; batches
//   DepthRows  outer-major tiles   B of M-grouped; A and B of K-grouped, with or without an index;
//                                  batches
#pragma once

#include <cstring>

#include "device/cp_async.cuh"
#include "device/vec.cuh"
#include "device/warp.cuh"
#include "gemm/product.h"
#include "gemm/sm80/tile_layout.cuh"

namespace kimi::gemm::sm80 {

// Which part of an operand a tile of sums needs: `rows` outer indices from `outer` on, `length` of
// the depth from `depth` on.
struct Window {
  int32_t group;  // whose matrix it is; 0 where all groups share one
  int64_t outer, depth;
  int32_t rows, length;  // what is left; more than a tile has does not matter
};

// Element e of the chunk is from[e * stride]; beyond `left` there is zero.
template <class T>
__device__ inline void fill_chunk(char* chunk, const T* from, int64_t stride, int left) {
  constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));
  T values[kPerChunk];
#pragma unroll
  for (int e = 0; e < kPerChunk; ++e) values[e] = e < left ? from[e * stride] : T{};
  uint4 bits;
  memcpy(&bits, values, sizeof bits);
  store16(chunk, bits);
}

template <bool kIndexed>
__device__ inline int64_t source_row(const Matrix& m, int64_t row) {
  return kIndexed && m.index != nullptr ? m.index[row] / m.divisor : row;
}

// kIndexed: the rows may come by m.index. kGated: the tile's rows are gate and up rows in turn,
// kRowStep at a time, of the same columns of h.
template <class T, int kOuter, int kDepth, int kThreads, bool kIndexed, bool kGated>
class OuterRows {
 public:
  using Layout = TileLayout<T, Major::kDepth, kOuter, kDepth>;
  static constexpr int kRowStep = kThreads / Layout::kChunks;
  static constexpr int kCopies = kOuter / kRowStep;
  static_assert(kRowStep % 8 == 0 && kCopies * kRowStep == kOuter && (!kGated || kCopies % 2 == 0));

  // `up`: how far a gate row's up row is, in rows.
  __device__ OuterRows(const Matrix& m, bool wide, const Window& w, int64_t up)
      : m_(m), wide_(wide), w_(w), up_(up) {
    if (!wide) return;
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      rows_[i] = row_of(i) + (exists(i) ? chunk() * Layout::kPerChunk : 0);
  }

  // Tile `step` of the depth. Tiles come in order.
  __device__ void load(char* tile, int step) {
    const int left = w_.length - step * kDepth - chunk() * Layout::kPerChunk;
    char* to = tile + Layout::offset(row(), chunk());
    if (wide_) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
        cp_async16(to + i * kRowStep * Layout::kRowBytes, rows_[i] + int64_t{step} * kDepth,
                   left > 0 && exists(i));
      return;
    }
    const int64_t depth = w_.depth + int64_t{step} * kDepth + chunk() * Layout::kPerChunk;
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      const bool inside = left > 0 && exists(i);
      fill_chunk(to + i * kRowStep * Layout::kRowBytes,
                 row_of(i) + (inside ? depth * m_.depth_stride : 0), m_.depth_stride,
                 inside ? left : 0);
    }
  }

 private:
  __device__ static int chunk() { return static_cast<int>(threadIdx.x) % Layout::kChunks; }
  __device__ static int row() { return static_cast<int>(threadIdx.x) / Layout::kChunks; }

  __device__ int local(int i) const { return row() + (kGated ? i / 2 : i) * kRowStep; }
  __device__ bool exists(int i) const { return local(i) < w_.rows; }
  // Some address for a row that does not exist.
  __device__ const T* row_of(int i) const {
    const T* const data = static_cast<const T*>(m_.data) + w_.group * m_.group_stride;
    if (!exists(i)) return data;
    const int64_t up = kGated && i % 2 == 1 ? up_ : 0;
    return data + source_row<kIndexed>(m_, w_.outer + local(i) + up) * m_.outer_stride;
  }

  const Matrix& m_;
  bool wide_;
  Window w_;
  int64_t up_;
  const T* rows_[kCopies];  // [depth], from this thread's chunk on
};

template <class T, int kOuter, int kDepth, int kThreads, bool kIndexed>
class DepthRows {
 public:
  using Layout = TileLayout<T, Major::kOuter, kOuter, kDepth>;
  static constexpr int kRowStep = kThreads / Layout::kChunks;
  static constexpr int kCopies = kDepth / kRowStep;
  static_assert(kCopies * kRowStep == kDepth && (!kIndexed || kDepth <= kWarpSize));

  __device__ DepthRows(const Matrix& m, bool wide, const Window& w, int64_t /*up*/)
      : m_(m), wide_(wide), w_(w) {
    first_ = static_cast<const T*>(m.data) + w.group * m.group_stride +
             (w.outer + chunk() * Layout::kPerChunk) * m.outer_stride;
    look_up(0);
  }

  __device__ void load(char* tile, int step) {
    const int left = w_.rows - chunk() * Layout::kPerChunk;
    const int depth = step * kDepth + row();
    if (wide_) {
      const T* const next = first_ + (w_.depth + depth) * m_.depth_stride;
      const int32_t source = kIndexed ? looked_up() : 0;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int local = row() + i * kRowStep;
        const T* const from = kIndexed ? first_ + warp_broadcast(source, local) * m_.depth_stride
                                       : next + i * kRowStep * m_.depth_stride;
        cp_async16(tile + Layout::offset(local, chunk()), from,
                   depth + i * kRowStep < w_.length && left > 0);
      }
      look_up(step + 1);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      const int at = depth + i * kRowStep;
      const bool inside = at < w_.length && left > 0;
      fill_chunk(tile + Layout::offset(row() + i * kRowStep, chunk()),
                 first_ + (inside ? source_row<kIndexed>(m_, w_.depth + at) * m_.depth_stride : 0),
                 m_.outer_stride, inside ? left : 0);
    }
  }

 private:
  __device__ static int chunk() { return static_cast<int>(threadIdx.x) % Layout::kChunks; }
  __device__ static int row() { return static_cast<int>(threadIdx.x) / Layout::kChunks; }

  // Lane l learns where row l of tile `step` comes from, one tile before it is needed: nothing
  // waits for the index.
  __device__ void look_up(int step) {
    if (!kIndexed) return;
    const int at = step * kDepth + lane_id();
    entry_ = static_cast<int32_t>(w_.depth) + at;
    if (m_.index != nullptr && lane_id() < kDepth && at < w_.length) entry_ = m_.index[entry_];
  }
  __device__ int32_t looked_up() const {
    return m_.index != nullptr ? entry_ / m_.divisor : entry_;
  }

  const Matrix& m_;
  bool wide_;
  Window w_;
  const T* first_;     // of this thread's chunk, in row 0 of the operand
  int32_t entry_ = 0;  // of the index for the lane's row; the row itself without one
};

}  // namespace kimi::gemm::sm80
