// SPDX-License-Identifier: MIT
//
// The FP8 layer on the host runner: the same bits as its parts one after the other, where rows are
// permuted, products stored in fp32 and activations quantised by passes of their own.
#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "fp8_buffer.h"
#include "fused_experts/activate_fp8.h"
#include "fused_experts/epilogue.cuh"
#include "gemm/sm90/job.h"
#include "grouped_gemm/fp8.h"
#include "permute_cases.h"
#include "product_cases.h"

namespace {

using namespace kimi;
using namespace fp8_tests;
using fp8::blocks;
using permute_cases::Plan;
using product_cases::with_numbers;

// Rows in FP8 with their scales.
struct Rows {
  int64_t count, width, stride = (count + 3) / 4 * 4;
  Buffer<uint8_t> data{count * width};
  Buffer<float> scale{blocks(width) * stride};

  template <class T>
  Fp8RowsParams of(const T* x) {
    return {x, data.data(), scale.data(), count,  width, width, stride, kDtype<T>,
            0, 0,           nullptr,      nullptr};
  }
};

struct Weight {
  int64_t experts, rows, columns;
  Buffer<e4m3> data{experts * rows * columns};
  Buffer<float> scale{experts * blocks(rows) * blocks(columns)};

  void fill(std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < experts * rows * columns; ++i)
      data.data()[i] = from_float<e4m3>(32 * normal(random));
    for (int64_t i = 0; i < experts * blocks(rows) * blocks(columns); ++i)
      scale.data()[i] = (0.5f + static_cast<float>(random() % 64) / 64) /
                        (32 * std::sqrt(static_cast<float>(columns)));
  }
  kimi_expert_weights stored() {
    return {data.data(), scale.data(), rows * columns, columns, 1, KIMI_STORAGE_FP8_BLOCK};
  }
};

template <class Out>
void multiply(Rows& a, Weight& b, const std::vector<int32_t>& offsets, Out* out) {
  require_ok(grouped_gemm_fp8_cuda(
      {a.data.data(), a.scale.data(), b.data.data(), b.scale.data(), offsets.data(), nullptr, out,
       a.count, a.width, b.rows, a.width, a.stride, static_cast<int32_t>(b.experts), kDtype<Out>},
      nullptr));
}

// h of [g; u] in fp32, as the kernels compute it.
void activate(kimi_activation activation, const float* gate_up, int64_t rows, int64_t width,
              float* h) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; ++c)
      experts::with_activation(activation, [&]<kimi_activation kActivation>() {
        h[r * width + c] = experts::gated<experts::ActivationOps, kActivation, false>(
                               gate_up[r * 2 * width + c], gate_up[(r * 2 + 1) * width + c],
                               with_numbers(activation))
                               .value;
      });
}

// The two passes that activate_fp8 is in one.
Rows activated(Rows& x, Weight& w, const std::vector<int32_t>& offsets,
               kimi_activation activation) {
  const int64_t width = w.rows / 2;
  Buffer<float> gate_up(x.count * w.rows), h(x.count * width);
  multiply(x, w, offsets, gate_up.data());
  activate(activation, gate_up.data(), x.count, width, h.data());
  Rows result{x.count, width};
  require_ok(fp8_rows_cuda(result.of(h.data()), nullptr));
  return result;
}

struct Problem {
  std::vector<int> rows;  // of the groups
  int64_t spare, hidden, width;
};

void compare(const Problem& problem, kimi_activation activation, uint64_t seed, float special = 0) {
  simt::settings().seed = seed;
  std::mt19937 random(static_cast<unsigned>(seed + 5));
  std::normal_distribution<float> normal;
  std::vector<int32_t> offsets;
  for (int rows : problem.rows) offsets.push_back((offsets.empty() ? 0 : offsets.back()) + rows);
  const int64_t used = offsets.back(), F = problem.width,
                groups = static_cast<int64_t>(problem.rows.size());
  Rows x{used + problem.spare, problem.hidden};
  Buffer<float> values(x.count * x.width);
  for (int64_t i = 0; i < x.count * x.width; ++i) values.data()[i] = 3 * normal(random);
  if (special != 0) values.data()[3 * x.width + 1] = special;
  require_ok(fp8_rows_cuda(x.of(values.data()), nullptr));
  Weight w{groups, 2 * F, problem.hidden};
  w.fill(random);
  Rows want = activated(x, w, offsets, activation), is{x.count, F};

  gemm::Product product{};
  product.grouping = gemm::Grouping::kM;
  product.a = {x.data.data(), x.width, 1};
  product.b = {w.data.data(), x.width, 1, w.rows * w.columns};
  product.groups = {offsets.data(), x.count, static_cast<int32_t>(groups)};
  product.depth = x.width;
  product.cols = F;
  require_ok(experts::activate_fp8(
      product, {x.scale.data(), x.stride, w.scale.data()},
      {with_numbers(activation), is.data.data(), is.scale.data(), is.stride}, nullptr));
  Buffer<float> canary(1);
  for (int64_t r = 0; r < x.count; ++r) {
    for (int64_t c = 0; c < F; ++c)
      require(is.data.data()[r * F + c] == (r < used ? want.data.data()[r * F + c] : kCanary),
              "value " + std::to_string(r) + ", " + std::to_string(c));
    for (int64_t kb = 0; kb < blocks(F); ++kb) {
      const float* const from = r < used ? want.scale.data() + kb * is.stride + r : canary.data();
      const float got = is.scale.data()[kb * is.stride + r];
      require(std::memcmp(&got, from, sizeof got) == 0 || (got != got && *from != *from),
              "scale " + std::to_string(r));
    }
  }
}

TEST(gate_and_up_end_in_the_bits_of_two_passes) {
  uint64_t seed = 0;
  for (auto activation : {KIMI_ACTIVATION_SILU, KIMI_ACTIVATION_GELU, KIMI_ACTIVATION_SITU}) {
    compare({{1, 0, 70}, 3, 144, 128}, activation, ++seed);
    compare({{130, 5}, 0, 272, 384}, activation, ++seed);  // the last cluster has one tile
  }
  for (int rows : {15, 16, 17, 63, 64, 65, 128, 129})
    compare({{3, rows}, rows % 3, 16, 128}, KIMI_ACTIVATION_SILU, ++seed);
  compare({{20}, 0, 128, 128}, KIMI_ACTIVATION_SILU, ++seed, INFINITY);
  compare({{20}, 0, 128, 128}, KIMI_ACTIVATION_SILU, ++seed, NAN);
}

TEST(the_ring_goes_round_and_consumers_take_turns) {
  using gemm::sm90::trial;
  for (uint64_t seed = 0; seed < 12; seed += 2) {
    trial().order = static_cast<int32_t>(seed / 2 % 3);
    compare({{128, 30, 66}, 1, 128 * 5, 256}, KIMI_ACTIVATION_SILU, seed);
    if (trial().order == 1)  // gate and up are a turn each
      CHECK(simt::last_statistics().turns > 0);
    trial() = {};
  }
}

template <class T>
void compare_layer(Plan shape, permute_cases::Skew skew, int64_t hidden, int64_t width,
                   uint64_t seed) {
  std::mt19937 random(static_cast<unsigned>(seed + 1));
  simt::settings().seed = seed;
  const Plan plan = define_plan(make_ids(shape, skew, 0.2, random), shape);
  std::normal_distribution<float> normal;
  const int64_t rows = plan.num_rows(), tokens = plan.num_tokens;
  Buffer<T> x(tokens * hidden), permuted(rows * hidden), down(rows * hidden), y(tokens * hidden),
      want(tokens * hidden);
  for (int64_t i = 0; i < tokens * hidden; ++i) x.data()[i] = from_float<T>(normal(random));
  std::vector<float> weights(static_cast<size_t>(rows));
  for (float& weight : weights) weight = normal(random);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < hidden; ++i)
      permuted.data()[r * hidden + i] = plan.source[r] < 0
                                            ? from_float<T>(0.0f)
                                            : x.data()[plan.source[r] / plan.top_k * hidden + i];
  Weight gate_up{plan.num_experts, 2 * width, hidden}, w_down{plan.num_experts, hidden, width};
  gate_up.fill(random);
  w_down.fill(random);

  Rows of_x{rows, hidden};
  require_ok(fp8_rows_cuda(of_x.of(permuted.data()), nullptr));
  Rows h = activated(of_x, gate_up, plan.offsets, KIMI_ACTIVATION_SILU);
  multiply(h, w_down, plan.offsets, down.data());
  UnpermuteParams sum{};
  sum.y = down.data(), sum.row_map = plan.row_map.data(), sum.weights = weights.data();
  sum.x = want.data(), sum.num_tokens = tokens, sum.hidden = sum.y_stride = hidden;
  sum.top_k = plan.top_k, sum.dtype = kDtype<T>;
  require_ok(unpermute_cuda(sum, nullptr));

  FusedExpertsParams p{};
  p.x = x.data(), p.x_stride = hidden, p.y = y.data();
  p.w_gate_up = gate_up.stored(), p.w_down = w_down.stored();
  p.weights = weights.data(), p.row_map = plan.row_map.data();
  p.source = plan.source.data(), p.offsets = plan.offsets.data();
  p.num_tokens = tokens, p.hidden = hidden, p.width = width, p.num_experts = plan.num_experts;
  p.top_k = plan.top_k, p.dtype = kDtype<T>, p.activation = KIMI_ACTIVATION_SILU;
  Buffer<char> workspace(static_cast<int64_t>(experts::fp8_workspace_bytes(p)));
  p.workspace = workspace.data();
  const uint64_t before = simt::launches();
  require_ok(experts::fp8_forward(p, nullptr));
  CHECK(simt::launches() - before == 4);  // none that only quantises
  for (int64_t i = 0; i < tokens * hidden; ++i)
    require(y.data()[i].bits == want.data()[i].bits, "y " + std::to_string(i));
}

TEST(a_layer_is_four_launches_and_has_the_bits_of_its_parts) {
  using enum permute_cases::Skew;
  uint64_t seed = 30;
  for (auto [tokens, experts, top_k] : {std::array{37, 4, 3}, {1, 9, 8}, {150, 2, 1}, {5, 40, 2}})
    for (auto skew : {kBalanced, kOneExpert}) {
      const Plan shape{tokens, experts, top_k, 1, {}, {}, {}, {}};
      ++seed;
      compare_layer<bf16>(shape, skew, 144, 128, seed);
      if (tokens < 40) compare_layer<fp16>(shape, skew, 80, 256, seed);
    }
}

}  // namespace

TEST_MAIN()
