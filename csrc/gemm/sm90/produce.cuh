// SPDX-License-Identifier: MIT
// The producers of the Hopper product fill the ring of stages.
//
//   TMA      one thread; a stage is full when its bytes have come
//   gather   cp.async of the producers' 128 threads for the operand with an index, TMA for the
//            other one. Eight threads copy the 128 bytes of a row. A thread waits for its copies
//            kGathers stages later, makes them visible to wgmma and arrives at the full barrier.
//
// Rows of the next group, or past the end, may come along: kRows never stores what they make, and
// with kDepth the consumers clear them.
#pragma once

#include "device/cluster.cuh"
#include "device/cp_async.cuh"
#include "device/fence.cuh"
#include "device/tma.cuh"
#include "gemm/sm90/traits.cuh"

namespace kimi::grouped::sm90 {

// One stage of P and Q by TMA, from depth (kDepth: row) `depth` on. One thread.
template <class X>
class Loader {
 public:
  __device__ Loader(const Product& p, const Maps& maps, const Shared<X>& shared, int blocks,
                    int rank)
      : p_(p), maps_(maps), shared_(shared), blocks_(blocks), rank_(rank) {}

  __device__ void set_tile(const Tile& tile, int64_t row) {
    group_ = tile.group;
    row_ = static_cast<int32_t>(row);
    col_ = tile.col_tile * X::kTileCols;
    const int64_t left = tile.end - tile.begin;
    boxes_ = !X::kFew ? 1 : left < X::kTileRows ? static_cast<int>(left + 7) / 8 : X::kTileRows / 8;
  }

  // What load() brings to this block's stage, in the pair's other block as well.
  __device__ uint32_t bytes() const {
    const int p_bytes = p_.p.index != nullptr ? 0 : X::kFew ? boxes_ * 8 * kRowBytes : X::kPBytes;
    return static_cast<uint32_t>(p_bytes + (p_.q.index != nullptr ? 0 : X::kQBytes));
  }

  __device__ void load(int stage, int32_t depth) const {
    MBarrier& full = shared_.full(stage);
    mbarrier_arrive_expect_tx(full, bytes());
    if (p_.p.index == nullptr) load_p(shared_.p_tile(stage), full, depth);
    if (p_.q.index == nullptr) load_q(shared_.q_tile(stage), full, depth);
  }

 private:
  __device__ void load_p(char* to, MBarrier& full, int32_t depth) const {
    if constexpr (X::kDepthwise) {
      for (int box = 0; box < X::kTileRows / 64; ++box)
        tma_load(to + box * kBoxBytes, maps_.p, full, row_ + 64 * box, depth);
    } else {
      for (int box = 0; box < boxes_; ++box)
        tma_load(to + box * 8 * kRowBytes, maps_.p, full, depth, row_ + 8 * box);
    }
  }

  // Boxes of 64 rows (kOuter: 64 outer x 64 deep), or of 128 rows. Of a pair each block loads half.
  __device__ void load_q(char* to, MBarrier& full, int32_t depth) const {
    constexpr bool kOuter = X::kQMajor == Major::kOuter;
    constexpr int kBoxRows = kOuter ? 64 : X::kQBoxRows;
    const int boxes = X::kQRows / kBoxRows / blocks_;
    for (int i = 0; i < boxes; ++i) {
      const int at = (i + rank_ * boxes) * kBoxRows;
      // kActivate: the first half of the tile is gate, the second up.
      const int32_t first = X::kPairs && at >= X::kTileCols
                                ? static_cast<int32_t>(p_.cols) + col_ + at - X::kTileCols
                                : col_ + at;
      const int32_t x = kOuter ? first : depth, y = kOuter ? depth : first;
      char* box = to + at * kRowBytes;
      if constexpr (X::kDepthwise) {
        if (blocks_ == 1)
          tma_load(box, maps_.q, full, x, y);
        else
          tma_load_multicast(box, maps_.q, full, x, y, 3);
      } else {
        if (blocks_ == 1)
          tma_load(box, maps_.q, full, x, y, group_);
        else
          tma_load_multicast(box, maps_.q, full, x, y, group_, 3);
      }
    }
  }

  const Product& p_;
  const Maps& maps_;
  const Shared<X>& shared_;
  int blocks_, rank_, group_ = 0, boxes_ = 1;
  int32_t row_ = 0, col_ = 0;
};

template <class X>
__device__ inline void produce_by_tma(const Product& p, const Maps& maps, const Shared<X>& shared,
                                      int blocks, int rank) {
  Tiles<X> tiles(p, blocks, rank);
  Loader<X> loader(p, maps, shared, blocks, rank);
  Ring<X::kStages> ring;
  Tile tile;
  int64_t row;
  while (tiles.next(tile, row)) {
    const int steps = depth_blocks<X>(p, tile);
    if (lane_id() == 0) {
      loader.set_tile(tile, row);
      const int32_t first = X::kDepthwise ? static_cast<int32_t>(tile.begin) : 0;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
        loader.load(ring.stage, first + step * kBlockDepth);
        ring.next();
      }
    }
    warp_barrier();
  }
}

// A thread's share of the gathered rows of a tile: with kRows the same rows at every depth, with
// kDepth the rows of a stage.
template <class X>
class Gatherer {
  using T = typename X::T;
  static constexpr int kEvery = kGroupThreads / 8;  // rows between a thread's
  static constexpr int kRows = (X::kDepthwise ? kBlockDepth : X::kTileRows) / kEvery;

 public:
  __device__ Gatherer(const Product& p, bool of_q)
      : p_(p),
        m_(of_q ? p.q : p.p),
        outer_(static_cast<int32_t>(of_q ? p.cols : p.rows)),
        of_q_(of_q) {}

  __device__ void set_tile(const Tile& tile, int64_t row) {
    end_ = tile.end;
    if constexpr (X::kDepthwise) {
      first_ = tile.begin + thread_row();
      outer_at_ = (of_q_ ? tile.col_tile * X::kTileCols : static_cast<int32_t>(row)) + piece() * 8;
      find_rows();
    } else {
      first_ = row + thread_row();
      find_rows();
#pragma unroll
      for (int i = 0; i < kRows; ++i) source_[i] = token(i);
    }
  }

  __device__ void load(char* to, int step) {
    to += thread_row() * kRowBytes + ((piece() ^ (thread_row() & 7)) << 4);
    if constexpr (X::kDepthwise) {
      const int boxes = (of_q_ ? X::kQRows : X::kTileRows) / 64;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int32_t row = token(i);
        const T* from = at(row, outer_at_);
        const int left = row < 0 ? 0 : outer_ - outer_at_;
#pragma unroll 1
        for (int box = 0; box < boxes; ++box, from += 64)
          cp_async16(to + i * kEvery * kRowBytes + box * kBoxBytes, from, 64 * box < left);
      }
      first_ += kBlockDepth;
      find_rows();
    } else {
      const int64_t depth = step * kBlockDepth + piece() * 8;
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        if (!X::kFew || source_[i] >= 0)
          cp_async16(to + i * kEvery * kRowBytes, at(source_[i], depth),
                     source_[i] >= 0 && depth < p_.depth);
    }
  }

 private:
  __device__ static int thread_row() { return static_cast<int>(threadIdx.x) % kGroupThreads / 8; }
  __device__ static int piece() { return static_cast<int>(threadIdx.x) % 8; }
  // The index of each row; no load waits for another one. Past the end that of the last row.
  __device__ void find_rows() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t r = first_ + i * kEvery;
      source_[i] = m_.index[r < end_ ? r : end_ - 1];
    }
  }
  __device__ int32_t token(int i) const {
    return first_ + i * kEvery < end_ ? source_[i] / m_.divisor : -1;
  }
  __device__ const T* at(int32_t row, int64_t column) const {
    const int64_t stride = X::kDepthwise ? m_.depth_stride : m_.outer_stride;
    return static_cast<const T*>(m_.data) + (row < 0 ? 0 : row * stride + column);
  }

  const Product& p_;
  const Matrix& m_;
  int64_t first_ = 0, end_ = 0;
  int32_t outer_, outer_at_ = 0;
  int32_t source_[kRows];  // kDepth: the index of the stage to come; kRows: the token, or -1
  bool of_q_;
};

template <class X>
__device__ inline void produce_by_gather(const Product& p, const Maps& maps,
                                         const Shared<X>& shared, int blocks, int rank) {
  Tiles<X> tiles(p, blocks, rank);
  Loader<X> loader(p, maps, shared, blocks, rank);
  Gatherer<X> gatherer(p, p.p.index == nullptr);
  Ring<X::kStages> ring, shown;
  int hidden = 0;
  const auto show = [&] {
    fence_async_shared();
    mbarrier_arrive(shared.full(shown.stage));
    shown.next();
    --hidden;
  };
  Tile tile;
  int64_t row;
  while (tiles.next(tile, row)) {
    const int steps = depth_blocks<X>(p, tile);
    if (steps == 0) continue;
    loader.set_tile(tile, row);
    gatherer.set_tile(tile, row);
    const int32_t first = X::kDepthwise ? static_cast<int32_t>(tile.begin) : 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
      if (threadIdx.x == 0) loader.load(ring.stage, first + step * kBlockDepth);
      gatherer.load(p.p.index != nullptr ? shared.p_tile(ring.stage) : shared.q_tile(ring.stage),
                    step);
      cp_async_commit();
      ring.next();
      if (++hidden > kGathers) {
        cp_async_wait<kGathers>();
        show();
      }
    }
    cp_async_wait<0>();  // the consumers need not wait until the next tile's rows are known
    while (hidden > 0) show();
  }
}

}  // namespace kimi::grouped::sm90
