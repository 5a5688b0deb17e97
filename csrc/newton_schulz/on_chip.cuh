// SPDX-License-Identifier: MIT
// Small matrices: a block of 16 warps, or a cluster of blocks of 8, takes one after the other from
// norm to output in one launch.
//
//   shared memory   R, Z, Q [m, m], lower triangles of tiles (triangles.cuh), whole in every block
//                   a ring of 3 chunks of X [m, 128 bytes], where two of them are idle
//   workspace       X [m, n] of every cluster, in dtype: it stays in the L2 cache
//
//   norm, X            two passes over G (elements.cuh)
//   R = X X^T          chunks of columns come through the ring by cp.async and are both operands
//   polynomials        products of R, Z and Q, all of them symmetric. A warp keeps the sums of its
//                      tiles in registers until all have read, so D may lie anywhere
//   X = Q X + beta X   chunk by chunk through the ring, in place
//
// The blocks of a cluster share out the tiles of an [m, m], and each sends what it has to all
// others; of X they share out the columns. Which thread has which sum changes no bit of it: sums
// depend on m and n alone, and a matrix may go to a cluster of any size.
//
// 16-bit, m = 128, 5 steps with one restart: 14 products of m^3 / 2 and 4 of m^2 n. Shared memory is
// the limit: a tile's step of 16 in depth reads 2 KB for 32 768 operations, 16 clocks. Predicted for
// an H100 at 1.75 GHz, not measured, n = 512, one block: polynomials 14 x 1900 clocks (1280 of
// reading, 250 of storing, barriers), R 2 x 5100, Q X 2 x 12 300 with its stores, norm and X 17 000
// (256 KB twice, 25 bytes a clock): 79 000 clocks, 45 us for as many matrices as the GPU has
// multiprocessors, each of which holds one block. Clusters: on_chip_sm90.cu.
#pragma once

#include "device/cluster.cuh"
#include "device/cp_async.cuh"
#include "device/launch.cuh"
#include "newton_schulz/elements.cuh"
#include "newton_schulz/triangles.cuh"

namespace kimi::newton_schulz_cuda {

struct Job {
  Lines g, x;
  int64_t n, stride;             // from row to row of X, a multiple of 8
  int32_t m, tiles;              // tiles: of the side
  int32_t square, stage, bytes;  // of R; of a chunk of X; of all shared memory
  int32_t count, steps, shift;
  float eps;
  int32_t a_outside;  // of Q
  void* workspace;    // [clusters, m, stride] dtype
  Step step[kMostSteps];
};

template <class T, bool kCluster>
class OnChip {
  using Square = Triangles<T>;
  using Affine = typename Square::Affine;
  static constexpr int kTile = Square::kTile, kStages = 3;
  static constexpr int kCols = 128 / static_cast<int>(sizeof(T));  // of a chunk of X
  // Of a warp: tiles of a square, and next to each other in a chunk of X.
  static constexpr int kMostTiles = kCluster ? 3 : 1, kAcross = kCluster ? 2 : 1;

  using ByDepth = gemm::sm80::TileLayout<T, Major::kDepth, kTile, kCols>;
  using ByOuter = gemm::sm80::TileLayout<T, Major::kOuter, kCols, kTile>;
  static constexpr int kRowBytes = ByDepth::kRowBytes;

 public:
  static constexpr int kWarps = kCluster ? 8 : 16, kThreads = kWarps * kWarpSize;
  static constexpr int kMostTileRows = kCluster ? 8 : 4;
  static constexpr int kMostSide = kMostTileRows * kTile;
  static constexpr int kLeastBlocks = kCluster ? 2 : 1;  // of a cluster
  static_assert(kMostTileRows * (kMostTileRows + 1) / 2 <= kLeastBlocks * kWarps * kMostTiles);
  static_assert(kMostTileRows * kCols <= kWarps * kAcross * kTile);

  static void set_sizes(Job& job, const ChainShape& s) {
    job.n = s.n;
    job.m = static_cast<int32_t>(s.m);
    job.stride = round_up(s.n, 8);
    job.tiles = static_cast<int32_t>(ceil_div(s.m, kTile));
    job.square = Square::bytes(job.tiles);
    job.stage = job.tiles * kTile * kRowBytes;
    job.bytes = job.square + std::max(2 * job.square, kStages * job.stage);
  }

  __device__ OnChip(const Job& job, char* shared)
      : job_(job),
        shared_(shared),
        rank_(kCluster ? cluster_rank() : 0),
        blocks_(kCluster ? cluster_blocks() : 1),
        x_(static_cast<T*>(job.workspace) + cluster() * (job.m * job.stride)) {}

  // Of all blocks, or there is one in each.
  __device__ int cluster() const { return static_cast<int>(blockIdx.x) / blocks_; }
  __device__ int clusters() const { return static_cast<int>(gridDim.x) / blocks_; }

  // All threads of the cluster.
  __device__ static void meet() {
    if constexpr (kCluster) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  }

  __device__ void run(const Matrices& matrices, int e) const {
    normalize(matrices.g[e]);
#pragma unroll 1
    for (int k = 0;; ++k) {
      const bool end = k == job_.steps;
      if (end || job_.step[k].fresh) {
        if (k > 0) apply(job_.a_outside ? job_.step[k - 1].a : 0.0f);
        if (end) break;
        gram_matrix();
      }
      polynomials(k);
    }
    finish(matrices.x[e]);
  }

 private:
  __device__ char* r() const { return shared_; }
  __device__ char* z() const { return shared_ + job_.square; }
  __device__ char* q() const { return shared_ + job_.bytes - job_.square; }
  __device__ char* other_than_r() const { return z(); }
  __device__ char* other_than_q() const { return r(); }
  __device__ Lines lines_of_x() const { return {job_.stride, 0, 1, kDtype<T>}; }
  template <class Body>
  __device__ void each_block(const Body& body) const {
    for_each_block(job_.m, job_.n, rank_ * kWarps, tiles_of(job_.m, job_.n), blocks_ * kWarps,
                   body);
  }

  // Parts of the sum: as many as the lanes of a warp, shared out to the warps there are.
  __device__ double sum_of_squares(const void* g) const {
    KIMI_STATIC_SHARED(uint4, parts, kWarpSize);  // fp64
#pragma unroll 1
    for (int first = rank_ * kWarps; first < kWarpSize; first += blocks_ * kWarps) {
      const double sum = newton_schulz_cuda::sum_of_squares(g, job_.g, job_.m, job_.n, first,
                                                            tiles_of(job_.m, job_.n), kWarpSize);
      if (lane_id() == 0) {
        uint4 part{};
        memcpy(&part, &sum, sizeof sum);
        parts[first + warp_id()] = part;
        send(&parts[first + warp_id()], part);
      }
    }
    meet();
    double sum;
    memcpy(&sum, &parts[lane_id()], sizeof sum);
    return warp_sum(sum);
  }

  // X and, up to a multiple of 8 columns, zero.
  __device__ void normalize(const void* g) const {
    const Unit unit(sum_of_squares(g), job_.eps, job_.shift);
    each_block([&](Block b) {
      Values v;
      load_block(g, job_.g, b, v);
      unit.apply(v);
      b.cols = up_to_4(job_.stride - b.col);
      store_block(x_, lines_of_x(), b, v);
    });
    meet();
  }

  __device__ void finish(void* out) const {
    each_block([&](const Block& b) {
      Values v;
      load_block(x_, lines_of_x(), b, v);
      undo_shift(v, job_.shift);
      store_block(out, job_.x, b, v);
    });
  }

  // body(chunk, column) for the chunks `first`, `first + by`, ... of X, which come to `ring`. All
  // threads of the block come; nobody reads the last chunk any more when they leave.
  template <class Layout, class Body>
  __device__ void each_chunk(char* ring, int first, int by, const Body& body) const {
    const int chunks = static_cast<int>(ceil_div(job_.n, kCols));
    const int row = static_cast<int>(threadIdx.x) / 8, piece = static_cast<int>(threadIdx.x) % 8;
    const auto fill = [&](int slot, int chunk) {
      if (chunk < chunks) {
        const int64_t col = int64_t{chunk} * kCols + piece * Layout::kPerChunk;
#pragma unroll 1
        for (int i = row; i < job_.tiles * kTile; i += kThreads / 8) {
          const bool inside = i < job_.m && col < job_.stride;
          cp_async16(ring + slot * job_.stage + Layout::offset(i, piece),
                     inside ? x_ + i * job_.stride + col : x_, inside);
        }
      }
      cp_async_commit();  // an empty group too: waits count groups
    };
#pragma unroll 1
    for (int s = 0; s + 1 < kStages; ++s) fill(s, first + s * by);
    int slot = 0, next = kStages - 1;
#pragma unroll 1
    for (int chunk = first; chunk < chunks; chunk += by) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the chunk is there, and everybody is through with the one before
      fill(next, chunk + (kStages - 1) * by);
      body(ring + slot * job_.stage, int64_t{chunk} * kCols);
      slot = slot + 1 == kStages ? 0 : slot + 1;
      next = next + 1 == kStages ? 0 : next + 1;
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  // body(i, tile) for the warp's tiles of a square. Blocks take turns.
  struct Tile {
    int row, col;
  };
  template <class Body>
  __device__ void each_tile(const Body& body) const {
#pragma unroll
    for (int i = 0; i < kMostTiles; ++i) {
      int left = (warp_id() + i * kWarps) * blocks_ + rank_, row = 0;
      for (; left > row; ++row) left -= row + 1;
      if (row < job_.tiles) body(i, Tile{row, left});
    }
  }

  __device__ void gram_matrix() const {
    float sums[kMostTiles][Square::kSums] = {};
    each_chunk<ByDepth>(other_than_r(), 0, 1, [&](const char* chunk, int64_t) {
      each_tile([&](int i, const Tile& t) {
        const typename Square::template Warp<ByDepth, ByDepth> warp(t.row * kTile, t.col * kTile);
        Square::accumulate(warp, chunk, chunk, kCols, sums[i]);
      });
    });
    const float alpha = power_of_two(-2 * job_.shift);
    store(sums, {alpha, 0.0f, 0.0f}, r(), r());
  }

  // Of a step (a, b, c) on R = X X^T or what has become of it:
  //   fresh     Q = c R R + b R + a I        R = Q (R Q)
  //   else      Z = c R R + b R    Q = Q Z + a Q    R = Z (R Z + a R) + a (R Z + a R)
  __device__ void polynomials(int k) const {
    const auto step = [&]() -> const Step& { return job_.step[k]; };
    // Read when they are wanted: registers are few.
    const auto first = [&] {
      return Affine{step().c, step().b, step().fresh && !job_.a_outside ? step().a : 0.0f};
    };
    const auto other = [&] { return Affine{1.0f, step().fresh ? 0.0f : step().a, 0.0f}; };
    char* const w = step().fresh ? q() : z();
    square(r(), r(), first, r(), w);
    if (!step().fresh) square(q(), w, other, q(), q());
    if (k + 1 == job_.steps || job_.step[k + 1].fresh) return;  // R is not needed any more
    square(r(), w, other, r(), r());
    square(w, r(), other, r(), r());
  }

  // D = alpha A B + beta C + delta I, all symmetric; f() has the numbers.
  template <class F>
  __device__ void square(const char* a, const char* b, const F& f, const char* c, char* d) const {
    float sums[kMostTiles][Square::kSums] = {};
    if (f().alpha != 0.0f)
      each_tile([&](int i, const Tile& t) {
        Square::accumulate_tile(a, b, t.row, t.col, job_.tiles, sums[i]);
      });
    meet();
    store(sums, f(), c, d);
  }
  __device__ void store(const float (&sums)[kMostTiles][Square::kSums], const Affine& f,
                        const char* c, char* d) const {
    each_tile([&](int i, const Tile& t) {
      char* const tile = d + Square::at(t.row, t.col);
      Square::store(sums[i], f, c + Square::at(t.row, t.col), tile, t.row == t.col);
      if constexpr (kCluster) {
        warp_barrier();
#pragma unroll
        for (int piece = lane_id(); piece < Square::kTileBytes / 16; piece += kWarpSize)
          send(tile + 16 * piece, load16(tile + 16 * piece));
      }
    });
    meet();
  }

  // To the same place in the other blocks.
  __device__ void send(void* address, uint4 value) const {
    if constexpr (kCluster) {
#pragma unroll 1
      for (int i = 1; i < blocks_; ++i) store16_in(address, value, (rank_ + i) % blocks_);
    }
  }

  // X = Q X + beta X.
  __device__ void apply(float beta) const {
    each_chunk<ByOuter>(other_than_q(), rank_, blocks_, [&](const char* chunk, int64_t first) {
      const int row = warp_id() % kMostTileRows;
      const int col = warp_id() / kMostTileRows * kTile;
      if (row >= job_.tiles || col >= kCols) return;
      float sums[kAcross * Square::kSums] = {};
      const auto part = [&](int k) { return chunk + k * kTile * kRowBytes; };
      Square::template accumulate_row<ByOuter, kAcross * kTile>(q(), row, job_.tiles, col, part,
                                                                sums);
      Square::template each_pair<kAcross * kTile>([&](int pair, int i, int j) {
        float one = sums[2 * pair], two = sums[2 * pair + 1];
        i += row * kTile;
        j += col;
        if (i >= job_.m || first + j >= job_.stride) return;
        if (beta != 0.0f) {
          const T* old = Square::template element<ByOuter>(chunk, i, j);
          one = fma_rn(beta, to_float(old[0]), one);
          two = fma_rn(beta, to_float(old[1]), two);
        }
        Square::store(x_ + i * job_.stride + first + j, one, two);
      });
    });
    meet();
  }

  const Job& job_;
  char* const shared_;
  const int rank_, blocks_;
  T* const x_;
};

// A block or, of `kCluster`, a cluster takes every clusters-th matrix.
template <class T, bool kCluster>
__device__ void take_matrices(const Job& job, const Matrices& matrices) {
  KIMI_SHARED(char, shared);
  using Chip = OnChip<T, kCluster>;
  Chip chip(job, shared);
  if constexpr (kCluster) Chip::meet();  // the others are there
#pragma unroll 1
  for (int e = chip.cluster(); e < job.count; e += chip.clusters()) chip.run(matrices, e);
}

}  // namespace kimi::newton_schulz_cuda
