// SPDX-License-Identifier: MIT
// Stages with gathered rows: cp.async of the producers' 128 threads for the operand with an index,
// TMA for the other one. Eight threads copy the 128 bytes of a row. Nobody waits for them: the full
// barrier counts a thread when its copies have landed, and the consumers make them visible to
// wgmma. With Trial::noinc 0 a thread waits for a stage once the next one is issued.
#pragma once

#include "device/cp_async.cuh"
#include "gemm/sm90/produce.cuh"

namespace kimi::gemm::sm90 {

// A thread's share of the gathered rows of a tile: M-grouped the same rows at every depth,
// K-grouped the rows of a stage.
template <class X>
class Gatherer {
  using T = typename X::T;
  static constexpr bool kOfK = X::kGrouping == Grouping::kK;
  static constexpr int kEvery = kGroupThreads / 8;  // rows between a thread's
  static constexpr int kRows = (kOfK ? X::kBlockDepth : kTileRows) / kEvery;

 public:
  __device__ Gatherer(const Product& p, bool of_b)
      : p_(p),
        m_(of_b ? p.b : p.a),
        outer_(static_cast<int32_t>(of_b ? p.cols : p.rows)),
        of_b_(of_b) {}

  __device__ void set_tile(const Work& work) {
    if constexpr (kOfK) {
      end_ = int64_t{work.first} + work.depth;
      first_ = work.first + thread_row();
      outer_at_ = (of_b_ ? work.col : work.row) + piece() * 8;
      find_rows();
    } else {
      end_ = int64_t{work.row} + work.rows;
      first_ = work.row + thread_row();
      find_rows();
#pragma unroll
      for (int i = 0; i < kRows; ++i) source_[i] = token(i);
    }
  }

  __device__ void load(char* to, int step) {
    to += thread_row() * kRowBytes + ((piece() ^ (thread_row() & 7)) << 4);
    if constexpr (kOfK) {
      const int boxes = (of_b_ ? X::kBRows : kTileRows) / 64;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int32_t row = token(i);
        const T* from = at(row, outer_at_);
        const int left = row < 0 ? 0 : outer_ - outer_at_;
#pragma unroll 1
        for (int box = 0; box < boxes; ++box, from += 64)
          cp_async16(to + i * kEvery * kRowBytes + box * kBoxBytes, from, 64 * box < left);
      }
      first_ += X::kBlockDepth;
      find_rows();
    } else {
      const int64_t depth = step * X::kBlockDepth + piece() * 8;
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        if (source_[i] >= 0)
          cp_async16(to + i * kEvery * kRowBytes, at(source_[i], depth), depth < p_.depth);
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
    const int64_t stride = kOfK ? m_.depth_stride : m_.outer_stride;
    return static_cast<const T*>(m_.data) + (row < 0 ? 0 : row * stride + column);
  }

  const Product& p_;
  const Matrix& m_;
  int64_t first_ = 0, end_ = 0;
  int32_t outer_, outer_at_ = 0;
  int32_t source_[kRows];  // K-grouped: the index of the stage to come; else the token, or -1
  bool of_b_;
};

template <class X>
__device__ inline void produce_by_gather(const Product& p, const InputsOf<X>& in, Shared<X>& s) {
  Loader<X> loader(p, in, s);
  Gatherer<X> gatherer(p, p.a.index == nullptr);
  Ring<X::kStages> ring;
  produce_tiles<X>(p, in, s, [&](const Work& work) {
    const int stages = stages_of<X>(work);
    if (stages == 0) return;
    loader.set_tile(work);
    gatherer.set_tile(work);
    const bool waits = in.trial.noinc == 0;
    int before = 0;
#pragma unroll 1
    for (int step = 0; step < stages; ++step, ring.next()) {
      mbarrier_wait(s.empty[ring.at], ring.parity ^ 1);
      if (threadIdx.x == 0) loader.load(ring.at, step);
      Stage<X>& stage = s.stages[ring.at];
      gatherer.load(p.a.index != nullptr ? stage.a : stage.b, step);
      if (!waits) {
        cp_async_arrive(s.full[ring.at]);
        continue;
      }
      cp_async_commit();
      cp_async_wait<1>();
      if (step > 0) mbarrier_arrive(s.full[before]);
      before = ring.at;
    }
    if (waits) {
      cp_async_wait<0>();
      mbarrier_arrive(s.full[before]);
    }
  });
}

}  // namespace kimi::gemm::sm90
