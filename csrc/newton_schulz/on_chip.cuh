// SPDX-License-Identifier: MIT
// Small matrices: a block of 8 warps takes one after the other from norm to output in one launch.
//
//   shared memory   R [m, m]  Z [m, m]  Q [m, m]  ring of 3 chunks of X [m, 128 bytes]
//   workspace       X [m, n] of every block, in dtype: it stays in the L2 cache
//
//   norm, X         two passes over G (elements.cuh)
//   R = X X^T       chunks of columns come through the ring by cp.async and are both operands
//   polynomials     products of R, Z and Q, all of them symmetric: tiles of the lower triangle are
//                   computed and their mirror images stored with them. A warp keeps the sums of its
//                   tiles (2 of 10 at most) in registers until all have read, so D may lie anywhere
//   X = Q X + beta X   chunk by chunk through the same ring, in place
//
// A tile is 32 x 32 by mma.sync, in fp32 16 x 16 by fma; nothing is split over the depth, so sums
// depend on m and n alone.
//
// 16-bit, m = 128, 5 steps with one restart: 14 products of m^3 / 2 and 4 of m^2 n. Shared memory is
// the limit: a tile's step of 16 in depth reads 2 KB for 32 768 operations, 16 clocks. Predicted for
// an H100 at 1.75 GHz, not measured, n = 512: polynomials 14 x 2000 clocks (1280 of reading, 500 of
// storing, two barriers), R 2 x 5100, Q X 2 x 12 300 with its stores, norm and X 17 000 (256 KB
// twice, 25 bytes a clock): 80 000 clocks, 46 us for as many matrices as the GPU has
// multiprocessors. A block takes 144 KB there; at m = 64 60 KB, and three share a multiprocessor.
#pragma once

#include "device/cp_async.cuh"
#include "device/launch.cuh"
#include "gemm/sm80/warp_tile.cuh"
#include "newton_schulz/elements.cuh"

namespace kimi::newton_schulz_cuda {

struct Job {
  Lines g, x;
  int64_t n, stride;      // from row to row of X, a multiple of 8
  int32_t m, side;        // side: m in whole tiles
  int32_t square, stage;  // bytes of R; of a chunk of X
  int32_t count, steps, shift;
  float eps;
  int32_t a_outside;  // of Q
  void* workspace;    // [blocks, m, stride] dtype
  Step step[kMostSteps];
};

template <class T>
struct OnChip {
  static constexpr int kWarps = 8, kThreads = kWarps * kWarpSize, kStages = 3;
  static constexpr int kTile = sizeof(T) == 2 ? 32 : 16;  // of sums, by a warp
  static constexpr int kMostSide = 4 * kTile, kMostTiles = 2;
  static constexpr int kCols = 128 / static_cast<int>(sizeof(T));  // of a chunk of X
  static constexpr int kSums = kTile * kTile / kWarpSize;
  static_assert(10 <= kMostTiles * kWarps && kMostSide * kCols <= kTile * kTile * kWarps);

  using Square = gemm::sm80::TileLayout<T, Major::kDepth, kMostSide, kMostSide>;
  using ByDepth = gemm::sm80::TileLayout<T, Major::kDepth, kMostSide, kCols>;
  using ByOuter = gemm::sm80::TileLayout<T, Major::kOuter, kCols, kMostSide>;
  template <class A, class B>
  using Warp = gemm::sm80::WarpTile<T, A, B, kTile, kTile>;

  static void set_sizes(Job& job, const ChainShape& s) {
    job.n = s.n;
    job.m = static_cast<int32_t>(s.m);
    job.stride = round_up(s.n, 8);
    job.side = static_cast<int32_t>(round_up(s.m, kTile));
    job.square = job.side * Square::kRowBytes;
    job.stage = job.side * ByDepth::kRowBytes;
  }
  static size_t shared_bytes(const Job& job) {
    return static_cast<size_t>(3 * job.square + kStages * job.stage);
  }

  __device__ OnChip(const Job& job, char* shared)
      : job_(job),
        shared_(shared),
        x_(static_cast<T*>(job.workspace) + blockIdx.x * (job.m * job.stride)) {}

  __device__ void run(const void* g, void* out) {
    normalize(g);
    float beta = 0.0f;
#pragma unroll 1
    for (int k = 0;; ++k) {
      const bool end = k == job_.steps;
      if (end || job_.step[k].fresh) {
        if (k > 0) apply(beta);
        if (end) break;
        gram_matrix();
      }
      const Step& s = job_.step[k];
      polynomials(s, k + 1 == job_.steps || job_.step[k + 1].fresh);
      beta = job_.a_outside ? s.a : 0.0f;
    }
    finish(out);
  }

 private:
  __device__ char* r() const { return shared_; }
  __device__ char* z() const { return shared_ + job_.square; }
  __device__ char* q() const { return shared_ + 2 * job_.square; }
  __device__ char* chunk_at(int slot) const {
    return shared_ + 3 * job_.square + slot * job_.stage;
  }
  __device__ Lines lines_of_x() const { return {job_.stride, 0, 1, kDtype<T>}; }
  template <class Body>
  __device__ void each_block(const Body& body) const {
    for_each_block(job_.m, job_.n, 0, tiles_of(job_.m, job_.n), kWarps, body);
  }

  // X and, up to a multiple of 8 columns, zero.
  __device__ void normalize(const void* g) {
    KIMI_STATIC_SHARED(double, partial, kWarps);
    const double mine =
        sum_of_squares(g, job_.g, job_.m, job_.n, 0, tiles_of(job_.m, job_.n), kWarps);
    __syncthreads();  // the matrix before this one is done with
    if (lane_id() == 0) partial[warp_id()] = mine;
    __syncthreads();
    double squares = 0.0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) squares += partial[w];
    const Unit unit(squares, job_.eps, job_.shift);
    each_block([&](Block b) {
      Values v;
      load_block(g, job_.g, b, v);
      unit.apply(v);
      b.cols = up_to_4(job_.stride - b.col);
      store_block(x_, lines_of_x(), b, v);
    });
    __syncthreads();
  }

  __device__ void finish(void* out) const {
    each_block([&](const Block& b) {
      Values v;
      load_block(x_, lines_of_x(), b, v);
      undo_shift(v, job_.shift);
      store_block(out, job_.x, b, v);
    });
  }

  // body(tile, column) for every chunk of X in turn. All threads come; nobody reads the last chunk
  // any more when they leave.
  template <class Layout, class Body>
  __device__ void each_chunk(const Body& body) const {
    const int64_t chunks = (job_.n + kCols - 1) / kCols;
    const int row = static_cast<int>(threadIdx.x) / 8, piece = static_cast<int>(threadIdx.x) % 8;
    const auto fill = [&](int slot, int64_t chunk) {
      if (chunk < chunks) {
        const int64_t col = chunk * kCols + piece * Layout::kPerChunk;
#pragma unroll 1
        for (int i = row; i < job_.side; i += kThreads / 8) {
          const bool inside = i < job_.m && col < job_.stride;
          cp_async16(chunk_at(slot) + Layout::offset(i, piece),
                     inside ? x_ + i * job_.stride + col : x_, inside);
        }
      }
      cp_async_commit();  // an empty group too: waits count groups
    };
#pragma unroll 1
    for (int s = 0; s + 1 < kStages; ++s) fill(s, s);
    int slot = 0, next = kStages - 1;
#pragma unroll 1
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the chunk is there, and everybody is through with the one before
      fill(next, chunk + kStages - 1);
      body(chunk_at(slot), chunk * kCols);
      slot = slot + 1 == kStages ? 0 : slot + 1;
      next = next + 1 == kStages ? 0 : next + 1;
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  template <class A, class B>
  __device__ static void accumulate(const Warp<A, B>& warp, const char* a, const char* b, int depth,
                                    float (&sums)[kSums]) {
    typename Warp<A, B>::Fragment f;
#pragma unroll 1
    for (int step = 0; step < depth / Warp<A, B>::kStepDepth; ++step) {
      warp.load(f, a, b, step);
      Warp<A, B>::multiply(f, sums);
    }
  }

  // The warp's i-th tile of the lower triangle; false if there is none.
  struct Tile {
    int row, col;
  };
  __device__ bool lower_tile(int i, Tile& tile) const {
    int left = warp_id() + i * kWarps, row = 0;
    for (; left > row; ++row) left -= row + 1;
    tile = {row * kTile, left * kTile};
    return tile.row < job_.side;
  }

  __device__ void gram_matrix() const {
    float sums[kMostTiles][kSums] = {};
    each_chunk<ByDepth>([&](const char* chunk, int64_t) {
#pragma unroll
      for (int i = 0; i < kMostTiles; ++i)
        if (Tile t; lower_tile(i, t))
          accumulate(Warp<ByDepth, ByDepth>(t.row, t.col), chunk, chunk, kCols, sums[i]);
    });
    const float alpha = power_of_two(-2 * job_.shift);
    store_squares(sums, alpha, 0.0f, r(), 0.0f, r());
  }

  // Of a step (a, b, c) on R = X X^T or what has become of it:
  //   fresh     Q = c R R + b R + a I        R = Q (R Q)
  //   else      Z = c R R + b R    Q = Q Z + a Q    R = Z (R Z + a R) + a (R Z + a R)
  // `last`: R is not needed any more.
  __device__ void polynomials(const Step& s, bool last) const {
    char* const w = s.fresh ? q() : z();
    const float beta = s.fresh ? 0.0f : s.a;
    const float delta = s.fresh && !job_.a_outside ? s.a : 0.0f;
    square(r(), r(), s.c, s.b, r(), delta, w);
    if (!s.fresh) square(q(), w, 1.0f, beta, q(), 0.0f, q());
    if (last) return;
    square(r(), w, 1.0f, beta, r(), 0.0f, r());
    square(w, r(), 1.0f, beta, r(), 0.0f, r());
  }

  // D = alpha A B + beta C + delta I, all symmetric.
  __device__ void square(const char* a, const char* b, float alpha, float beta, const char* c,
                         float delta, char* d) const {
    float sums[kMostTiles][kSums] = {};
    if (alpha != 0.0f) {
#pragma unroll
      for (int i = 0; i < kMostTiles; ++i)
        if (Tile t; lower_tile(i, t))
          accumulate(Warp<Square, Square>(t.row, t.col), a, b, job_.side, sums[i]);
    }
    __syncthreads();
    store_squares(sums, alpha, beta, c, delta, d);
  }

  // visit(row, col, pair of sums) for the sums that a lane has of a tile, as mma.m16n8 leaves them.
  template <class Visitor>
  __device__ static void each_pair(const float (&sums)[kSums], const Visitor& visit) {
#pragma unroll
    for (int rows = 0; rows < kTile / 16; ++rows)
#pragma unroll
      for (int cols = 0; cols < kTile / 8; ++cols)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* pair = sums + 4 * (rows * (kTile / 8) + cols) + 2 * half;
          visit(16 * rows + 8 * half + lane_id() / 4, 8 * cols + lane_id() % 4 * 2, pair[0],
                pair[1]);
        }
  }
  __device__ static Vec<T, 2> rounded(float first, float second) {
    Vec<T, 2> both;
    if constexpr (sizeof(T) == 2) {
      const uint32_t pair = round_pair<T>(first, second);
      memcpy(&both, &pair, sizeof both);
    } else {
      both[0] = first;
      both[1] = second;
    }
    return both;
  }
  template <class Layout>
  __device__ static T* at(char* tile, int row, int col) {
    constexpr int kPer = Layout::kPerChunk;
    return reinterpret_cast<T*>(tile + Layout::offset(row, col / kPer)) + col % kPer;
  }
  template <class Layout>
  __device__ static const T* at(const char* tile, int row, int col) {
    return at<Layout>(const_cast<char*>(tile), row, col);
  }

  // Lower triangle and mirror image. An element of C is read by the thread that writes it in D.
  __device__ void store_squares(const float (&sums)[kMostTiles][kSums], float alpha, float beta,
                                const char* c, float delta, char* d) const {
#pragma unroll
    for (int i = 0; i < kMostTiles; ++i)
      if (Tile t; lower_tile(i, t))
        each_pair(sums[i], [&](int row, int col, float first, float second) {
          row += t.row;
          col += t.col;
          const bool one = col <= row, two = col + 1 <= row;
          float v[2] = {mul_rn(alpha, first), mul_rn(alpha, second)};
          if (beta != 0.0f) {
            if (one) v[0] = fma_rn(beta, to_float(at<Square>(c, row, col)[0]), v[0]);
            if (two) v[1] = fma_rn(beta, to_float(at<Square>(c, row, col)[1]), v[1]);
          }
          if (col == row) v[0] = add_rn(v[0], delta);
          if (col + 1 == row) v[1] = add_rn(v[1], delta);
          const Vec<T, 2> value = rounded(v[0], v[1]);
          if (one) at<Square>(d, row, col)[0] = value[0];
          if (two) at<Square>(d, row, col)[1] = value[1];
          if (col < row) *at<Square>(d, col, row) = value[0];
          if (col + 1 < row) *at<Square>(d, col + 1, row) = value[1];
        });
    __syncthreads();
  }

  // X = Q X + beta X.
  __device__ void apply(float beta) const {
    each_chunk<ByOuter>([&](const char* chunk, int64_t first) {
      const int row = warp_id() % (kMostSide / kTile) * kTile;
      const int col = warp_id() / (kMostSide / kTile) * kTile;
      if (row >= job_.side) return;
      float sums[kSums] = {};
      accumulate(Warp<Square, ByOuter>(row, col), q(), chunk, job_.side, sums);
      each_pair(sums, [&](int i, int j, float one, float two) {
        i += row;
        j += col;
        if (i >= job_.m || first + j >= job_.stride) return;
        if (beta != 0.0f) {
          const T* old = at<ByOuter>(chunk, i, j);
          one = fma_rn(beta, to_float(old[0]), one);
          two = fma_rn(beta, to_float(old[1]), two);
        }
        *reinterpret_cast<Vec<T, 2>*>(x_ + i * job_.stride + first + j) = rounded(one, two);
      });
    });
  }

  const Job& job_;
  char* const shared_;
  T* const x_;
};

template <class T>
__global__ void __launch_bounds__(OnChip<T>::kThreads, 2)
    on_chip_kernel(const __grid_constant__ Job job, const __grid_constant__ Matrices matrices) {
  KIMI_SHARED(char, shared);
  OnChip<T> chip(job, shared);
#pragma unroll 1
  for (int e = static_cast<int>(blockIdx.x); e < job.count; e += static_cast<int>(gridDim.x))
    chip.run(matrices.g[e], matrices.x[e]);
}

}  // namespace kimi::newton_schulz_cuda
