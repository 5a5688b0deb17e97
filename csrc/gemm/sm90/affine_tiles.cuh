// SPDX-License-Identifier: MIT
// AffineParams on Hopper: the arithmetic in the registers of the sums, then D by TMA.
//
//   C   a warp's 16 rows in boxes of 64 columns: cp.async into the scratch, two boxes ahead, and
//       ldmatrix, whose registers are those of wgmma's sums
//   D   a consumer's 64 rows in boxes of 128 bytes: four warps fill one (stmatrix), a thread stores
//       it; of a symmetric D the same with rows and columns exchanged (stmatrix.trans)
//
//        col   0  64 128 192         below the diagonal   the box and its mirror image
//   row   0   [\]                    on it                lower half, and that again above: one box
//        64   [ ] [\]                above it             nothing
//
// Both images come from the same registers: D is bitwise symmetric. A D that TMA cannot write, in
// the other type of 16 bits or symmetric in fp32, takes the way of sm_80's kernels, gemm/affine.cuh.
//
// *Predicted* by count, a wide tile: 128 to 450 instructions a thread for the arithmetic, two waits
// of the L2 for C (about 1000 cycles), 4 boxes of about 200 cycles for D and 4 for its image: 1000
// to 3000 cycles in which the consumer multiplies nothing, beside 16 a value of depth in which it
// does: 2 % at a depth of 7168, 3 to 9 % at 2048. The other consumer has the tensor cores meanwhile,
// once they are out of step.
#pragma once

#include "device/barrier.cuh"
#include "device/mma.cuh"
#include "gemm/affine.cuh"
#include "gemm/sm90/finished.cuh"
#include "gemm/sm90/kernel.cuh"

namespace kimi::gemm::sm90 {

struct AffineTilesParams {
  AffineWork affine;
  TensorMap map;  // of D, boxes of 64 rows
  bool by_tma;    // else gemm/affine.cuh
  bool rounds;    // sums become values of T, times unit
};

template <class T>
class AffineTiles {
  using Tiles = StoreTiles<T>;
  using Pieces = Finished<Affine<T>>;
  static constexpr int kCols = 64, kBoxSums = kCols / 2, kWarpBoxBytes = 16 * kRowBytes;

 public:
  using Params = AffineTilesParams;
  static constexpr bool kGated = false, kWritesZeros = false, kTogether = true;
  static constexpr int kScratchBytes = Tiles::kScratchBytes;  // of a warp
  static_assert(kScratchBytes == 2 * kWarpBoxBytes && kScratchBytes >= Pieces::kScratchBytes);

  // `valid` may be 0 or less: a consumer's warps come together.
  template <class X>
  __device__ static void run(const Params& params, const Product& p, const Work& work, int32_t row,
                             int valid, float (&d)[X::kSums], char* scratch) {
    if (!params.by_tma)
      return Pieces::template run<X>(params.affine, p, work, row, valid, d, scratch);
    if (lane_id() == 0) tma_store_wait_read<0>();
    meet();
    combine<X>(params, p, work, row, valid, d, scratch);
    char* const boxes = scratch - warp() * kScratchBytes;
    if (params.affine.d_dtype == kDtype<T>)
      store<X, T>(params, p, work, row, d, boxes);
    else
      store<X, float>(params, p, work, row, d, boxes);
  }
  __device__ static void end(const Params& params) {
    if (params.by_tma && lane_id() == 0) tma_store_wait<0>();
  }

 private:
  __device__ static int warp() { return warp_id() % 4; }
  // The four warps of a consumer.
  __device__ static void meet() {
    named_barrier_sync(kConsumerBarrier + static_cast<int>(threadIdx.x) / kGroupThreads,
                       kGroupThreads);
  }
  // visit<0>(), visit<1>(), ...: the boxes of a tile.
  template <class X, int kInBox, class Visitor>
  __device__ static void for_each_box(const Visitor& visit) {
    [&]<int... kBox>(std::integer_sequence<int, kBox...>) {
      (visit.template operator()<kBox>(), ...);
    }(std::make_integer_sequence<int, X::kTileCols / kInBox>());
  }

  // The sums become D's values, all but the last rounding.
  template <class X>
  __device__ static void combine(const Params& params, const Product& p, const Work& work,
                                 int32_t row, int valid, float (&d)[X::kSums], char* boxes) {
    const AffineWork& s = params.affine;
    const int32_t past = row - warp() * 16 + kConsumerRows;  // the diagonal
    const int32_t last = end_of<X>(p, work), end = p.lower && past < last ? past : last;
    const auto fetch = [&](int box) {
      const int32_t col = work.col + box * kCols;
      if (col < end)
        load_c(s, work.group, row, valid, col, end - col, boxes + box % 2 * kWarpBoxBytes);
      cp_async_commit();
    };
    if (s.c != nullptr) {
      fetch(0);
      fetch(1);
    }
    for_each_box<X, kCols>([&]<int kBox>() {
      const int32_t col = work.col + kBox * kCols;
      if (col >= end) return;
      if (s.c != nullptr) {
        cp_async_wait<1>();
        warp_barrier();
        add_c<kBox>(s, boxes + kBox % 2 * kWarpBoxBytes, d);
        warp_barrier();
        if (kBox + 2 < X::kTileCols / kCols)
          fetch(kBox + 2);
        else
          cp_async_commit();
      } else {
#pragma unroll
        for (int i = 0; i < kBoxSums; ++i)
          d[kBox * kBoxSums + i] = mul_rn(s.alpha, d[kBox * kBoxSums + i]);
      }
      if (s.delta != 0.0f && row < col + kCols && col < row + 16) {
        const int on = row + lane_id() / 4 - col - lane_id() % 4 * 2;
#pragma unroll
        for (int i = 0; i < kBoxSums; ++i)
          if (on == i / 4 * 8 + i % 2 - i / 2 % 2 * 8) {
            float& v = d[kBox * kBoxSums + i];
            v = add_rn(v, s.delta);
          }
      }
      if (params.rounds)
#pragma unroll
        for (int i = 0; i < kBoxSums; i += 2)
          Affine<T>::round(s, d[kBox * kBoxSums + i], d[kBox * kBoxSums + i + 1]);
    });
  }

  // 16 rows x `cols` columns of C into a box, 16 bytes a lane of every fourth row.
  __device__ static void load_c(const AffineWork& s, int32_t group, int32_t row, int valid,
                                int32_t col, int cols, char* box) {
    const int piece = lane_id() % 8, left = cols - piece * 8;
    const T* from = static_cast<const T*>(s.c) + group * s.c_group_stride + row * s.c_row_stride +
                    col + piece * 8;
    if (left <= 0) return;
#pragma unroll 1
    for (int r = lane_id() / 8; r < 16 && r < valid; r += 4) {
      char* const to = box + r * kRowBytes + ((piece ^ (r % 8)) << 4);
      const T* const values = from + r * s.c_row_stride;
      if (s.wide_c && left >= 8) {
        cp_async16(to, values, true);
      } else {
        for (int i = 0; i < 8 && i < left; ++i) reinterpret_cast<T*>(to)[i] = values[i];
      }
    }
  }
  template <int kBox, int kN>
  __device__ static void add_c(const AffineWork& s, const char* box, float (&d)[kN]) {
    const int r = lane_id() % 16, half = lane_id() / 16;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      uint32_t c[4];
      ldmatrix_x4(c, box + r * kRowBytes + (((j + half) ^ (r % 8)) << 4));
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        float low, high;
        widen_pair<T>(c[q], low, high);
        float* const v = d + kBox * kBoxSums + 4 * j + 2 * q;
        v[0] = fma_rn(s.beta, low, mul_rn(s.alpha, v[0]));
        v[1] = fma_rn(s.beta, high, mul_rn(s.alpha, v[1]));
      }
    }
  }

  // `boxes`: two, of 64 rows. Every box waits until the last but one has been read.
  template <class X, class D>
  __device__ static void store(const Params& params, const Product& p, const Work& work,
                               int32_t row, const float (&d)[X::kSums], char* boxes) {
    constexpr int kInBox = kRowBytes / static_cast<int>(sizeof(D));
    const int32_t first = row - warp() * 16, end = end_of<X>(p, work);
    const bool stores = warp() == 0 && lane_id() == 0;
    int turn = 0;
    const auto send = [&](const auto& fill, int32_t x, int32_t y) {
      char* const box = boxes + turn * kBoxBytes;
      turn ^= 1;
      if (stores) tma_store_wait_read<1>();
      meet();
      fill(box);
      fence_async_shared();
      meet();
      if (!stores) return;
      tma_store(params.map, box, x, y, work.group);
      tma_store_commit();
    };
    for_each_box<X, kInBox>([&]<int kBox>() {
      const int32_t col = work.col + kBox * kInBox;
      if (col >= end || (p.lower && col > first)) return;
      if constexpr (std::is_same_v<D, T>)
        if (p.lower && col == first)
          return send([&](char* box) { fill_diagonal<kBox>(d, box); }, col, first);
      send([&](char* box) { Tiles::template fill_box<D, kBox>(d, box + warp() * kWarpBoxBytes); },
           col, first);
      if constexpr (std::is_same_v<D, T>)
        if (p.lower) send([&](char* box) { fill_mirror<kBox>(d, box); }, first, col);
    });
  }

  // Column c of the warp's rows becomes 16 values of row c of the box.
  template <int kBox, int kN>
  __device__ static void fill_mirror(const float (&d)[kN], char* box) {
    const int column = lane_id() / 16 * 8 + lane_id() % 8, piece = warp() * 2 + lane_id() / 8 % 2;
    char* const to = box + column * kRowBytes + ((piece ^ (column % 8)) << 4);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float* const c = d + kBox * kBoxSums + 4 * j;
      stmatrix_x4_transposed(to + j * 8 * kRowBytes, round_pair<T>(c[0], c[1]),
                             round_pair<T>(c[2], c[3]), round_pair<T>(c[4], c[5]),
                             round_pair<T>(c[6], c[7]));
    }
  }

  // What lies on and below the diagonal, and its mirror image.
  template <int kBox, int kN>
  __device__ static void fill_diagonal(const float (&d)[kN], char* box) {
    const auto put = [&](int r, int c, uint32_t bits) {
      char* const to = box + r * kRowBytes + ((c / 8 ^ (r % 8)) << 4) + c % 8 * 2;
      *reinterpret_cast<T*>(to) = T{static_cast<uint16_t>(bits)};
    };
#pragma unroll
    for (int i = 0; i < kBoxSums; i += 2) {
      const int r = warp() * 16 + lane_id() / 4 + i / 2 % 2 * 8, c = i / 4 * 8 + lane_id() % 4 * 2;
      const uint32_t pair = round_pair<T>(d[kBox * kBoxSums + i], d[kBox * kBoxSums + i + 1]);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (c + k <= r) put(r, c + k, pair >> 16 * k);
        if (c + k < r) put(c + k, r, pair >> 16 * k);
      }
    }
  }
};

// TMA writes boxes of 64 rows of D where 16 bytes divide its addresses.
template <class X>
Status run_affine(const Product& p, const AffineWork& out, bool narrow, void* stream) {
  const bool same = out.d_dtype == kDtype<typename X::T>;
  StoreTilesParams d{
      {out.d, out.d_row_stride, out.d_group_stride, out.d_dtype}, {}, false, {}, false};
  if (same || (out.d_dtype == KIMI_FLOAT32 && !p.lower))
    KIMI_RETURN_IF_ERROR(encode_out<X>(p, kConsumerRows, &d));
  return run<X>(p, AffineTilesParams{out, d.map, d.by_tma, out.unit != 1.0f || !same}, stream,
                narrow);
}

template <class T>
Status affine(const Product& p, const AffineWork& out, bool narrow, void* stream) {
  const auto with = [&]<Major kA, Major kB>() {
    return run_affine<Traits<T, Grouping::kBatch, kB, AffineTiles<T>, 256, kA>>(p, out, narrow,
                                                                                stream);
  };
  if (a_major(p) == Major::kOuter) return with.template operator()<Major::kOuter, Major::kOuter>();
  if (b_major(p) == Major::kOuter) return with.template operator()<Major::kDepth, Major::kOuter>();
  return with.template operator()<Major::kDepth, Major::kDepth>();
}

}  // namespace kimi::gemm::sm90
