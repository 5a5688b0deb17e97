// SPDX-License-Identifier: MIT
//
// A batch through the Hopper kernel, whole and by its lower triangle, with an epilogue of the
// test's own, run on the host: every matrix is multiplied, tiles above the diagonal never are.
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/dtype.h"
#include "gemm/epilogue.cuh"
#include "gemm/sm90/kernel.cuh"
#include "simt.h"

namespace {

using namespace kimi;
using namespace kimi::gemm;

// out[e, i, j] = 2 C, and how often an element was written.
struct TwiceParams {
  float* out;      // [E, rows, cols]
  int32_t* times;  // the same
};
struct Twice {
  using Params = TwiceParams;
  static constexpr bool kGated = false, kWritesZeros = false;
  static constexpr int kRun = 8;

  __device__ static void write(const Params& to, const Product& p, const Place& at, float (&v)[8],
                               int count) {
    const int64_t first = (at.group * p.rows + at.row) * p.cols + at.col;
    for (int i = 0; i < count; ++i) {
      to.out[first + i] = 2.0f * v[i];
      ++to.times[first + i];
    }
  }
};

struct Shape {
  int32_t batch;
  int64_t rows, cols, depth;
  bool lower;
};

// 16 bytes divide the distance of rows, columns and matrices.
int64_t padded(int64_t n) { return (n + 7) / 8 * 8; }

template <Major kA, Major kB, int kTileCols>
void compare(const Shape& shape, uint64_t seed) {
  simt::settings().seed = seed;
  std::mt19937 random(static_cast<unsigned>(seed));
  const auto make = [&](int64_t outer, Major major, std::vector<bf16>& data) {
    const bool by_depth = major == Major::kDepth;
    const int64_t line = padded(by_depth ? shape.depth : outer);
    const int64_t lines = by_depth ? outer : shape.depth;
    data.resize(static_cast<size_t>(shape.batch * lines * line));
    for (bf16& v : data) v = from_float<bf16>(static_cast<float>(int(random() % 9) - 4) / 16.0f);
    return Matrix{data.data(), by_depth ? line : 1, by_depth ? 1 : line, lines * line};
  };
  std::vector<bf16> a, b;
  Product p{};
  p.grouping = Grouping::kBatch;
  p.dtype = KIMI_BFLOAT16;
  p.a = make(shape.rows, kA, a);
  p.b = make(shape.cols, kB, b);
  p.groups = {nullptr, 0, shape.batch};
  p.rows = shape.rows;
  p.depth = shape.depth;
  p.cols = shape.cols;
  p.lower = shape.lower;
  std::vector<float> out(static_cast<size_t>(shape.batch * shape.rows * shape.cols));
  std::vector<int32_t> times(out.size());
  using X = sm90::Traits<bf16, Grouping::kBatch, kB, sm90::Finished<Twice>, kTileCols, kA>;
  CHECK(sm90::run<X>(p, {out.data(), times.data()}, nullptr).is_ok());
  for (int64_t e = 0, at = 0; e < shape.batch; ++e)
    for (int64_t i = 0; i < shape.rows; ++i)
      for (int64_t j = 0; j < shape.cols; ++j, ++at) {
        const bool wanted = !shape.lower || j / kTileCols * kTileCols < (i / 128 + 1) * 128;
        float sum = 0.0f;
        for (int64_t d = 0; wanted && d < shape.depth; ++d)
          sum += to_float(a[static_cast<size_t>(e * p.a.group_stride + i * p.a.outer_stride +
                                                d * p.a.depth_stride)]) *
                 to_float(b[static_cast<size_t>(e * p.b.group_stride + j * p.b.outer_stride +
                                                d * p.b.depth_stride)]);
        const size_t place = static_cast<size_t>(at);
        if (times[place] != (wanted ? 1 : 0) || out[place] != 2.0f * sum)
          check::fail(__FILE__, __LINE__,
                      "matrix " + std::to_string(e) + " element " + std::to_string(i) + ", " +
                          std::to_string(j) + " written " + std::to_string(times[place]) +
                          " times: " + std::to_string(out[place]) + " for " +
                          std::to_string(2.0f * sum) + ", seed " + std::to_string(seed));
      }
}

template <Major kA, Major kB>
void compare_tiles(const Shape& shape, uint64_t seed) {
  compare<kA, kB, 128>(shape, seed);
  compare<kA, kB, 256>(shape, seed + 1);
}

TEST(batches) {
  constexpr Major kDepth = Major::kDepth, kOuter = Major::kOuter;
  compare_tiles<kDepth, kDepth>({3, 130, 72, 40, false}, 1);
  compare_tiles<kDepth, kOuter>({2, 200, 264, 72, false}, 3);
  compare_tiles<kOuter, kDepth>({2, 56, 136, 130, false}, 5);
  compare_tiles<kOuter, kOuter>({1, 72, 24, 264, false}, 7);
}

TEST(lower_triangles) {
  constexpr Major kDepth = Major::kDepth, kOuter = Major::kOuter;
  uint64_t seed = 10;
  for (int64_t n : {8, 128, 136, 264, 392})
    compare_tiles<kDepth, kDepth>({n < 264 ? 3 : 2, n, n, 72, true}, seed += 2);
  compare_tiles<kOuter, kOuter>({2, 264, 264, 40, true}, seed + 2);
}

}  // namespace

TEST_MAIN()
