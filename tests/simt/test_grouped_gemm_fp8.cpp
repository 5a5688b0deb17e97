// SPDX-License-Identifier: MIT
//
// The FP8 product, run on the host, against plain loops in fp64 within the rounding of fp32 sums.
// Outputs are filled with a canary before.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "fp8_buffer.h"
#include "gemm/sm90/job.h"
#include "grouped_gemm/fp8.h"

namespace {

using namespace kimi;
using namespace fp8_tests;
using fp8::blocks;

struct Problem {
  std::vector<int> rows;  // of the groups
  int64_t spare;          // rows after the last group
  int64_t k, n;
  kimi_dtype out_dtype = KIMI_FLOAT32;
  bool bias = false;
  int64_t a_gap = 0;
};

template <class Out>
void compare_product(const Problem& problem, uint64_t seed) {
  simt::settings().seed = seed;
  std::mt19937 random(static_cast<unsigned>(seed * 7919 + 13));
  const auto uniform = [&](float low, float high) {
    return low + (high - low) * static_cast<float>(random() % 4096) / 4096.0f;
  };
  const int64_t k = problem.k, n = problem.n, groups = static_cast<int64_t>(problem.rows.size());
  std::vector<int32_t> offsets;
  for (int rows : problem.rows) offsets.push_back((offsets.empty() ? 0 : offsets.back()) + rows);
  const int64_t used = offsets.back(), rows = used + problem.spare, a_stride = k + problem.a_gap;
  const int64_t scale_stride = (rows + 3) / 4 * 4, kb = blocks(k), nb = blocks(n);
  Buffer<e4m3> a(rows * a_stride), b(groups * n * k);
  Buffer<float> a_scale(kb * scale_stride), b_scale(groups * nb * kb);
  for (int64_t i = 0; i < rows * a_stride; ++i) a.data()[i] = from_float<e4m3>(uniform(-4, 4));
  for (int64_t i = used * a_stride; i < rows * a_stride; ++i)
    a.data()[i] = {0x7f};  // whatever they hold
  for (int64_t i = 0; i < groups * n * k; ++i) b.data()[i] = from_float<e4m3>(uniform(-4, 4));
  for (int64_t i = 0; i < kb * scale_stride; ++i) a_scale.data()[i] = uniform(0.5, 2);
  for (int64_t i = 0; i < groups * nb * kb; ++i) b_scale.data()[i] = uniform(0.5, 2);
  Buffer<Out> bias(groups * n), out(rows * n);
  for (int64_t i = 0; i < groups * n; ++i) bias.data()[i] = from_float<Out>(uniform(-50, 50));
  GroupedGemmFp8Params p{};
  p.a = a.data();
  p.a_scale = a_scale.data();
  p.b = b.data();
  p.b_scale = b_scale.data();
  p.offsets = offsets.data();
  p.bias = problem.bias ? bias.data() : nullptr;
  p.out = out.data();
  p.num_rows = rows;
  p.k = k;
  p.n = n;
  p.a_row_stride = a_stride;
  p.a_scale_stride = scale_stride;
  p.num_experts = static_cast<int32_t>(groups);
  p.out_dtype = kDtype<Out>;
  require_ok(grouped_gemm_fp8_cuda(p, nullptr));
  const double ulp = kDtype<Out> == KIMI_FLOAT32    ? 0.0
                     : kDtype<Out> == KIMI_BFLOAT16 ? 0x1p-8
                                                    : 0x1p-11;
  // The values with their scales, once: conversions take longer than the products.
  std::vector<double> x(static_cast<size_t>(rows * k)), y(static_cast<size_t>(groups * n * k));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < k; ++i)
      x[static_cast<size_t>(r * k + i)] =
          double(to_float(a.data()[r * a_stride + i])) * a_scale.data()[i / 128 * scale_stride + r];
  for (int64_t c = 0; c < groups * n; ++c)
    for (int64_t i = 0; i < k; ++i)
      y[static_cast<size_t>(c * k + i)] = double(to_float(b.data()[c * k + i])) *
                                          b_scale.data()[(c / n * nb + c % n / 128) * kb + i / 128];
  for (int64_t r = 0, e = 0; r < rows; ++r) {
    while (e < groups && r >= offsets[e]) ++e;
    for (int64_t c = 0; c < n; ++c) {
      double want = 0, size = 0;
      const double *const of_row = x.data() + r * k, *const of_col = y.data() + (e * n + c) * k;
      for (int64_t i = 0; i < k && e < groups; ++i) {
        const double term = of_row[i] * of_col[i];
        want += term;
        size += std::fabs(term);
      }
      if (problem.bias && e < groups) want += to_float(bias.data()[e * n + c]);
      const double error = std::fabs(to_float(out.data()[r * n + c]) - want);
      require(error <= size * 1e-5 + std::fabs(want) * ulp,
              "row " + std::to_string(r) + " of group " + std::to_string(e) + ", column " +
                  std::to_string(c) + ": " + std::to_string(to_float(out.data()[r * n + c])) +
                  " for " + std::to_string(want));
    }
  }
}

void compare(const Problem& problem, uint64_t seed) {
  dispatch(problem.out_dtype, [&]<class Out>() { compare_product<Out>(problem, seed); });
}

TEST(both_tiles_and_every_tail_of_columns) {
  uint64_t seed = 0;
  for (int64_t n : {1, 8, 64, 120, 128, 136, 200, 256, 300, 384, 392, 700})
    compare({{70}, 0, 128, n, kimi_dtype(seed % 3), seed % 2 == 0}, ++seed);
}

TEST(tails_of_rows_and_depth) {
  uint64_t seed = 100;
  for (int rows : {1, 15, 16, 63, 64, 65, 127, 128, 129, 200})
    for (int64_t k : {16, 112, 144, 272})
      if (++seed % 2 == 0 || rows == 65)
        compare(
            {{rows}, int64_t(seed % 3), k, 72, kimi_dtype(seed % 3), false, int64_t(seed % 2) * 16},
            seed);
}

TEST(groups_begin_anywhere_and_may_be_empty) {
  compare({{0, 3, 0, 130, 1, 0, 77, 0}, 9, 256, 136, KIMI_BFLOAT16, true}, 4);
  compare({{0, 0, 0}, 140, 128, 130, KIMI_BFLOAT16, true}, 5);
  compare({{5, 0, 66}, 0, 0, 40, KIMI_FLOAT16, true}, 6);  // no depth: the bias alone
  std::vector<int> many(70, 1);
  many[3] = many[40] = 0;
  compare({many, 2, 32, 24, KIMI_FLOAT32, true}, 7);
}

// A box of row scales begins at a row that 4 divides, a tile anywhere.
TEST(groups_begin_at_every_row_modulo_4) {
  uint64_t seed = 20;
  for (int before : {0, 1, 2, 3})
    for (int rows : {64, 128, 130, 67}) {
      ++seed;
      compare({{before, rows, 4 + before, 129}, int64_t(seed % 4), 144, 72, KIMI_FLOAT32}, seed);
    }
}

TEST(the_ring_goes_round_in_any_order_of_threads) {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    compare({{129, 30}, 1, 128 * 7, 300, KIMI_BFLOAT16, false}, seed);
    compare({{66, 1}, 1, 128 * 9, 392, KIMI_FLOAT32, false}, seed);
  }
}

// Of the three orders: one block of 128 and one of 66 rows have both consumers, one has 30.
TEST(consumers_take_turns) {
  using gemm::sm90::trial;
  constexpr uint64_t kDepth = 5;
  for (int order : {0, 1, 2})
    for (uint64_t seed = 0; seed < 12; seed += order == 0 ? 6 : 2) {
      trial().order = order;
      compare({{128, 30, 66}, 1, 128 * kDepth, 72, KIMI_BFLOAT16, false}, seed);
      if (order == 1)  // each block of depth is a turn of both
        CHECK(simt::last_statistics().turns == 2 * (2 * 2 * kDepth) + 2 * 1);
      trial() = {};
    }
}

// Whole groups of 16 rows leave by TMA where a trial asks for it, into every type.
TEST(c_leaves_by_tma) {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    gemm::sm90::trial().store = seed % 4 != 3;
    const auto dtype = kimi_dtype(seed % 3);
    compare({{70, 0, 33}, 2, 144, 200, dtype, seed == 4}, seed);
    const bool by_tma = seed % 4 != 3 && seed != 4;
    const uint64_t boxes = (4 + 2 + 0) * (dtype == KIMI_FLOAT32 ? 7 : 4);
    CHECK(simt::last_statistics().stored_bytes == (by_tma ? boxes * 2048 : 0));
    compare({{40}, 0, 32, 12, dtype}, seed);  // 16 bytes do not divide every row
  }
  gemm::sm90::trial() = {};
}

// Of a thread's partial sums the first one alone: rows 0..7 of 16, even columns below 8.
TEST(a_trial_without_promotion) {
  constexpr int64_t kRows = 16, kN = 16, kK = 256;
  Buffer<e4m3> a(kRows * kK), b(kN * kK);
  std::fill_n(a.data(), kRows * kK, e4m3{0x38});
  std::fill_n(b.data(), kN * kK, e4m3{0x38});
  Buffer<float> a_scale(2 * kRows), b_scale(2), out(kRows * kN);
  std::fill_n(a_scale.data(), 2 * kRows, 0.5f);
  std::fill_n(b_scale.data(), 2, 2.0f);
  const int32_t offsets[] = {kRows};
  GroupedGemmFp8Params p{a.data(),   a_scale.data(),
                         b.data(),   b_scale.data(),
                         offsets,    nullptr,
                         out.data(), kRows,
                         kK,         kN,
                         kK,         kRows,
                         1,          KIMI_FLOAT32};
  gemm::sm90::trial().promote = 0;
  require_ok(grouped_gemm_fp8_cuda(p, nullptr));
  gemm::sm90::trial() = {};
  for (int64_t i = 0; i < kRows * kN; ++i) {
    const bool first = i / kN < 8 && i % kN < 8 && i % 2 == 0;
    require(out.data()[i] == (first ? 256.0f : 0.0f), "value " + std::to_string(i));
  }
}

TEST(a_row_that_is_not_a_number_stays_in_its_row) {
  constexpr int64_t kRows = 40, kN = 16, kK = 32;
  Buffer<e4m3> a(kRows * kK), b(2 * kN * kK);
  std::fill_n(a.data(), kRows * kK, e4m3{0x38});
  std::fill_n(b.data(), 2 * kN * kK, e4m3{0x38});
  a.data()[7 * kK + 3] = {0xff};
  Buffer<float> a_scale(kRows), b_scale(2);
  std::fill_n(a_scale.data(), kRows, 0.5f);
  std::fill_n(b_scale.data(), 2, 2.0f);
  const int32_t offsets[] = {5, 39};
  Buffer<bf16> out(kRows * kN);
  GroupedGemmFp8Params p{a.data(),   a_scale.data(),
                         b.data(),   b_scale.data(),
                         offsets,    nullptr,
                         out.data(), kRows,
                         kK,         kN,
                         kK,         kRows,
                         2,          KIMI_BFLOAT16};
  require_ok(grouped_gemm_fp8_cuda(p, nullptr));
  for (int64_t i = 0; i < kRows * kN; ++i) {
    const float value = to_float(out.data()[i]);
    require(i / kN == 7 ? value != value : value == (i / kN == 39 ? 0.0f : 32.0f), "value");
  }
}

// Each row is left alone, zero, or of one of the groups; nothing around the output is written.
TEST(bad_offsets_lead_to_wrong_rows_and_never_out_of_memory) {
  constexpr int64_t kRows = 150, kN = 72, kK = 144, kGroups = 3, kMargin = 64 * kN;
  Buffer<e4m3> a(kRows * kK), b(kGroups * kN * kK);
  std::fill_n(a.data(), kRows * kK, e4m3{0x38});
  Buffer<float> a_scale(2 * (kRows + 2)), b_scale(2 * kGroups);
  std::fill_n(a_scale.data(), 2 * (kRows + 2), 1.0f);
  std::fill_n(b_scale.data(), 2 * kGroups, 1.0f);
  for (uint8_t e = 0; e < kGroups; ++e)  // 1, 2, 4
    std::fill_n(b.data() + e * kN * kK, kN * kK, e4m3{uint8_t(0x38 + 8 * e)});
  constexpr int32_t kLeast = std::numeric_limits<int32_t>::min(),
                    kMost = std::numeric_limits<int32_t>::max();
  const int32_t all[][kGroups] = {{-1, 70, 150},        {90, 31, 140},      {10, 20, 151},
                                  {kMost, kLeast, 150}, {kLeast, kMost, 0}, {150, 149, -150},
                                  {149, 0, kMost}};
  Buffer<float> canary(1);
  for (uint64_t seed = 0; seed < 4; ++seed)
    for (const auto& offsets : all) {
      simt::settings().seed = seed * 4 + seed;
      Buffer<float> out(kRows * kN + 2 * kMargin);
      GroupedGemmFp8Params p{a.data(),
                             a_scale.data(),
                             b.data(),
                             b_scale.data(),
                             offsets,
                             nullptr,
                             out.data() + kMargin,
                             kRows,
                             kK,
                             kN,
                             kK,
                             kRows + 2,
                             kGroups,
                             KIMI_FLOAT32};
      require_ok(grouped_gemm_fp8_cuda(p, nullptr));
      for (int64_t i = -kMargin; i < kRows * kN + kMargin; ++i) {
        const float value = out.data()[kMargin + i];
        const bool alone = std::memcmp(&value, canary.data(), sizeof value) == 0;
        const bool of_group = value == 0 || value == kK || value == 2 * kK || value == 4 * kK;
        require(alone || (of_group && i >= 0 && i < kRows * kN), "value " + std::to_string(i));
      }
    }
}

}  // namespace

TEST_MAIN()
