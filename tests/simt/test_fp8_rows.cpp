// SPDX-License-Identifier: MIT
//
// The kernels that make FP8 rows, run on the host, against the definition bit for bit; and by a
// plan, here and by the CPU's way, against rows that were permuted before.
#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <string>

#include "common/dtype.h"
#include "cpu/parallel.h"
#include "fp8_buffer.h"
#include "fp8_rows/fp8_rows.h"
#include "fp8_rows/quantize.cuh"
#include "permute_cases.h"

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
  Fp8RowsParams p{x.data(), data.data(), scale.data(), rows,   k, stride, scale_stride, kDtype<T>,
                  0,        0,           nullptr,      nullptr};
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

TEST(a_scale_is_the_ieee_quotient) {
  for (int exponent : {-126, -120, -118, -110, -1, 0, 100, 127})
    for (uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += exponent == 0 ? 1 : 97) {
      const float most = float_of(static_cast<uint32_t>(exponent + 127) << 23 | mantissa);
      require(fp8::scale_of(most) == std::max(most / 448.0f, 0x1p-126f), std::to_string(most));
    }
}

template <class T>
void compare_planned(permute_cases::Plan shape, permute_cases::Skew skew, int64_t k, bool pads,
                     uint64_t seed) {
  std::mt19937 random(static_cast<unsigned>(seed + 1));
  simt::settings().seed = seed;
  const permute_cases::Plan plan =
      define_plan(make_ids(shape, skew, seed % 2 ? 0.3 : 0.0, random), shape);
  std::normal_distribution<float> normal;
  const int64_t rows = plan.num_rows(), scale_stride = (rows + 3) / 4 * 4;
  Buffer<T> x(plan.num_tokens * k), permuted(rows * k);
  for (int64_t i = 0; i < plan.num_tokens * k; ++i) x.data()[i] = from_float<T>(normal(random));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < k; ++i)
      permuted.data()[r * k + i] =
          plan.source[r] < 0 ? from_float<T>(0.0f) : x.data()[plan.source[r] / plan.top_k * k + i];
  Buffer<uint8_t> data(rows * k), want(rows * k);
  Buffer<float> scale(blocks(k) * scale_stride), want_scale(blocks(k) * scale_stride);
  Fp8RowsParams p{
      permuted.data(), want.data(), want_scale.data(), rows, k, k, scale_stride, kDtype<T>, 0, 0,
      nullptr,         nullptr};
  require_ok(fp8_rows_cuda(p, nullptr));
  p.x = x.data(), p.data = data.data(), p.scale = scale.data();
  p.top_k = plan.top_k, p.num_tokens = plan.num_tokens;
  p.row_map = plan.row_map.data(), p.source = pads ? plan.source.data() : nullptr;
  cpu::set_num_threads(2);
  for (bool on_cpu : {false, true}) {
    std::memset(data.data(), kCanary, static_cast<size_t>(rows * k));
    std::fill_n(scale.data(), blocks(k) * scale_stride, -1.0f);
    require_ok(on_cpu ? fp8_rows(p, KIMI_DEVICE_CPU, nullptr) : fp8_rows_cuda(p, nullptr));
    for (int64_t r = 0; r < rows; ++r) {
      const bool stays = !pads && plan.source[r] < 0;
      const std::string at = (on_cpu ? "CPU, row " : "row ") + std::to_string(r);
      for (int64_t i = 0; i < k; ++i)
        require(data.data()[r * k + i] == (stays ? kCanary : want.data()[r * k + i]), at);
      for (int64_t kb = 0; kb < blocks(k); ++kb)
        require(scale.data()[kb * scale_stride + r] ==
                    (stays ? -1.0f : want_scale.data()[kb * scale_stride + r]),
                at + ", scale");
    }
  }
  if (plan.num_tokens == 0) return;
  std::vector<int32_t> beyond = plan.row_map;
  beyond.back() = static_cast<int32_t>(rows);
  p.row_map = beyond.data();
  const Status status = fp8_rows(p, KIMI_DEVICE_CPU, nullptr);
  require(status.message.find("fp8_rows: row_map: expected rows in -1 .. ") == 0, status.message);
}

TEST(a_plan_gives_the_bits_of_permuting_before) {
  using enum permute_cases::Skew;
  uint64_t seed = 0;
  for (auto [tokens, experts, top_k, align] :
       {std::array{1, 4, 1, 1}, {5, 3, 2, 1}, {37, 9, 8, 1}, {9, 5, 11, 4}, {20, 2, 3, 16}})
    for (auto skew : {kBalanced, kHot, kOneExpert, kNone})
      for (int64_t k : {48, 129, 400}) {
        const permute_cases::Plan shape{tokens, experts, top_k, align, {}, {}, {}, {}};
        ++seed;
        compare_planned<bf16>(shape, skew, k, seed % 3 != 0, seed);
        compare_planned<float>(shape, skew, k, seed % 3 == 0, seed);
      }
  compare_planned<bf16>({0, 3, 2, 4, {}, {}, {}, {}}, kNone, 144, true, ++seed);  // padding alone
}

}  // namespace

TEST_MAIN()
