// SPDX-License-Identifier: MIT
//
// The kernels that make FP8 rows, run on the host, against the definition bit for bit.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>

#include "common/dtype.h"
#include "fp8_buffer.h"
#include "fp8_rows/fp8_rows.h"

namespace {

using namespace kimi;
using namespace fp8_tests;
using fp8::blocks;

template <class T>
void compare_rows(int64_t rows, int64_t k, int64_t gap, double size, uint64_t seed) {
  simt::settings().seed = seed;
  std::mt19937 random(static_cast<unsigned>(seed + 1));
  std::normal_distribution<double> normal;
  const int64_t stride = k + gap, scale_stride = (rows + 3) / 4 * 4;
  Buffer<T> x(rows * stride);
  for (int64_t i = 0; i < rows * stride; ++i)
    x.data()[i] = from_float<T>(static_cast<float>(size * normal(random)));
  const float special[] = {0.0f, -0.0f, INFINITY, NAN, -1e-40f};
  for (int64_t i = 0; i < 5 && rows > 2; ++i)
    x.data()[stride * (i % rows) + k * i / 5] = from_float<T>(special[i]);
  for (int64_t i = 0; i < std::min<int64_t>(k, fp8::kBlock); ++i)  // a block of zeros
    x.data()[stride * (rows - 1) + i] = from_float<T>(i % 2 ? -0.0f : 0.0f);
  Buffer<uint8_t> data(rows * k);
  Buffer<float> scale(blocks(k) * scale_stride);
  Fp8RowsParams p{x.data(), data.data(), scale.data(), rows, k, stride, scale_stride, kDtype<T>};
  require_ok(fp8_rows_cuda(p, nullptr));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k0 = 0; k0 < k; k0 += fp8::kBlock) {
      const T* const row = x.data() + r * stride;
      float most = 0.0f;
      for (int64_t i = k0; i < std::min(k, k0 + fp8::kBlock); ++i) {
        const float v = std::fabs(to_float(row[i]));
        most = v > most || v != v ? v : most;
        if (v != v) break;
      }
      const float want = most / 448.0f < 0x1p-126f ? 0x1p-126f : most / 448.0f;
      const float got = scale.data()[k0 / fp8::kBlock * scale_stride + r];
      require(want == got || (want != want && got != got), "scale");
      for (int64_t i = k0; i < std::min(k, k0 + fp8::kBlock); ++i) {
        const uint8_t q = from_float<e4m3>(to_float(row[i]) / got).bits,
                      is = data.data()[r * k + i];
        require(q == is, "value " + std::to_string(to_float(row[i])) + " scale " +
                             std::to_string(got) + ": " + std::to_string(is));
      }
    }
}

TEST(rows_are_quantised_as_defined) {
  uint64_t seed = 0;
  for (double size : {1.0, 1e-3, 1e4})
    for (int64_t k : {1, 15, 16, 127, 128, 129, 144, 400, 1100})
      for (int64_t rows : {1, 5, 9}) {
        ++seed;
        compare_rows<float>(rows, k, seed % 3, size, seed);
        compare_rows<bf16>(rows, k, seed % 2 * 8, size, seed);
        compare_rows<fp16>(rows, k, seed % 2, size, seed);
      }
  for (double size : {1e-44, 1e-38, 1e-30, 1e-18, 1e18, 1e30, 1e37})
    compare_rows<float>(6, 512, 0, size, ++seed);
}

}  // namespace

TEST_MAIN()
