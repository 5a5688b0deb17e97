// SPDX-License-Identifier: MIT
//
// The products of sm_80, run on the host, against plain loops in fp64 (product_cases.h).
#include "common/dtype.h"
#include "product_cases.h"

namespace {

using namespace product_cases;

// As product_cuda and activate_product would, on a GPU that has no other kernels.
Status store(const Product& p, const StoreParams& out) {
  sm80::Job job;
  KIMI_RETURN_IF_ERROR(sm80::make_job("grouped_gemm", p, std::nullopt, &job));
  return dispatch(p.dtype, [&]<class T>() { return sm80::store<T>(job, out, nullptr); });
}
Status activate(const Product& p, const ActivateParams& params, Pass pass) {
  sm80::Job job;
  const Major b = pass == Pass::kForward ? Major::kDepth : Major::kOuter;
  KIMI_RETURN_IF_ERROR(sm80::make_job("grouped_gemm", p, b, &job));
  return dispatch(p.dtype,
                  [&]<class T>() { return experts::activate_sm80<T>(job, params, pass, nullptr); });
}

constexpr Kernel kKernel{store, activate, nullptr};
constexpr kimi_dtype kTypes[] = {KIMI_BFLOAT16, KIMI_FLOAT16, KIMI_FLOAT32};

void check_product(const Case& c) { CHECK(check_case(c, kKernel)); }

// 128-row tiles need more than 16 rows a group on average.
const std::vector<int32_t> kLarge{3, 3, 70, 199, 200}, kSmall{0, 1, 1, 18, 33};

TEST(rows_store) {
  uint64_t seed = 0;
  for (kimi_dtype dtype : kTypes)
    for (bool few : {false, true})
      for (Contiguous b : {kAlongDepth, kAlongOuter, kNeither}) {
        Case c{.dtype = dtype, .offsets = few ? kSmall : kLarge, .b = b, .seed = ++seed};
        c.num_rows = few ? 40 : 215;  // rows after the last group are zeroed
        c.cols = seed % 2 == 0 ? 136 : 72;
        c.depth = seed % 3 == 0 ? 200 : 104;
        c.bias = seed % 2 == 1;
        c.out_dtype = seed % 3 == 0 ? KIMI_FLOAT32 : dtype;
        c.gather_a = seed % 4 < 2;
        c.divisor = seed % 3 == 0 ? 3 : 1;
        c.poison = seed % 2 == 0 ? 2 : 3;
        check_product(c);
      }
}

TEST(rows_store_with_addresses_that_16_bytes_do_not_divide) {
  uint64_t seed = 40;
  for (kimi_dtype dtype : kTypes)
    for (bool few : {false, true})
      for (int variant = 0; variant < 5; ++variant) {
        Case c{.dtype = dtype, .offsets = few ? kSmall : std::vector<int32_t>{17, 17, 61}};
        c.seed = ++seed;
        c.num_rows = few ? 33 : 61;
        c.cols = variant < 2 ? 37 : 64;
        c.depth = variant == 0 || variant == 2 ? 41 : 40;
        c.b = variant % 2 == 0 ? kAlongDepth : kAlongOuter;
        c.pad = variant == 3 ? 1 : 8;
        c.misalign = variant == 4 ? 1 : 0;
        c.a = seed % 3 == 0 ? kAlongOuter : kAlongDepth;
        c.out_pad = variant;
        c.out_misalign = variant == 4 ? 3 : 0;
        c.bias = true;
        c.out_dtype = dtype;
        c.gather_a = variant == 1;
        check_product(c);
      }
}

TEST(rows_store_sizes_around_the_tiles) {
  uint64_t seed = 80;
  for (std::vector<int32_t> offsets : {std::vector<int32_t>{127, 255, 384},
                                       {128},
                                       {129, 129},
                                       {15, 31, 48},
                                       {16},
                                       {17, 17},
                                       {1},
                                       {0, 0},
                                       {}})
    for (int64_t cols : {1, 128, 129}) {
      if (offsets.size() == 3 && offsets[0] == 127 && cols == 129) continue;  // slow
      Case c{.offsets = offsets, .seed = ++seed};
      c.num_rows = offsets.empty() ? 5 : offsets.back();
      c.cols = cols;
      c.depth = cols == 1 ? 8 : 64;
      c.b = seed % 2 == 0 ? kAlongDepth : kAlongOuter;
      check_product(c);
    }
  for (int64_t depth : {0, 1, 7, 8, 31, 32, 33, 95, 96, 97, 128}) {
    Case c{.dtype = kTypes[depth % 3], .offsets = {4, 60}, .num_rows = 61, .seed = ++seed};
    c.cols = 24;
    c.depth = depth;
    c.pad = static_cast<int>(8 - depth % 8);
    c.bias = true;
    check_product(c);
    c.offsets = {4, 20};
    c.num_rows = 21;
    check_product(c);
  }
}

TEST(rows_more_groups_than_a_warp_has_lanes) {
  for (uint64_t seed : {120, 121, 122, 123})
    for (bool few : {true, false}) {
      Case c{.dtype = few ? KIMI_BFLOAT16 : KIMI_FLOAT32, .seed = seed};
      std::mt19937 random(static_cast<unsigned>(seed));
      int32_t end = 0;
      for (int e = 0; e < 70; ++e) {
        if (e > 30 && e < 66) end += random() % 3 == 0;
        if (e == 2 || e == 68) end += few ? 20 : 600;
        c.offsets.push_back(end);
      }
      c.num_rows = end + 3;
      c.cols = few ? 140 : 8;
      c.depth = 16;
      check_product(c);
    }
}

TEST(depth_store) {
  uint64_t seed = 160;
  for (kimi_dtype dtype : kTypes)
    for (int variant = 0; variant < 7; ++variant) {
      Case c{.dtype = dtype, .grouping = Grouping::kK, .offsets = {0, 5, 5, 70, 101, 101}};
      c.seed = ++seed;
      c.num_rows = 110;
      c.a = variant == 2 ? kAlongDepth : kAlongOuter;
      c.b = variant == 3 ? kNeither : kAlongOuter;
      c.rows = variant == 4 ? 129 : 40;
      c.cols = variant == 4 ? 17 : variant == 5 ? 136 : 64;
      c.accumulate = variant % 2 == 1;
      c.gather_a = variant == 0 || variant == 6;
      c.gather_b = variant == 1 || variant == 6;
      c.divisor = variant == 6 ? 8 : 1;
      c.misalign = variant == 6 && dtype == KIMI_FLOAT16 ? 1 : 0;
      c.poison = variant < 4 ? 3 : -1;
      c.out_dtype = variant % 3 == 0 ? dtype : KIMI_FLOAT32;
      c.out_pad = variant == 4 ? 1 : 0;
      check_product(c);
    }
  Case none{.grouping = Grouping::kK, .offsets = {0, 0}, .rows = 9, .cols = 9};
  check_product(none);
  none.accumulate = true;
  check_product(none);
}

constexpr kimi_activation kActivations[] = {KIMI_ACTIVATION_SILU, KIMI_ACTIVATION_GELU,
                                            KIMI_ACTIVATION_SITU};

TEST(activate) {
  uint64_t seed = 200;
  for (kimi_dtype dtype : kTypes)
    for (bool few : {false, true})
      for (kimi_activation activation : kActivations) {
        Case c{.dtype = dtype, .epilogue = Epilogue::kActivate, .activation = activation};
        c.seed = ++seed;
        c.offsets = few ? kSmall : std::vector<int32_t>{20, 20, 90};
        c.num_rows = few ? 36 : 95;  // rows after the last group are left alone
        c.cols = activation == KIMI_ACTIVATION_GELU   ? 19
                 : activation == KIMI_ACTIVATION_SILU ? 96
                                                      : 64;
        c.depth = few ? 72 : 48;
        c.b = seed % 5 == 0 ? kAlongOuter : kAlongDepth;
        c.gather_a = seed % 2 == 0;
        c.divisor = 2;
        c.keep_gate_up = seed % 4 != 0;
        c.keep_hidden = seed % 4 != 1;
        c.poison = 2;
        check_product(c);
      }
}

TEST(activate_backward) {
  uint64_t seed = 240;
  for (kimi_dtype dtype : kTypes)
    for (bool few : {false, true})
      for (kimi_activation activation : kActivations) {
        Case c{.dtype = dtype, .epilogue = Epilogue::kActivateBackward, .activation = activation};
        c.seed = ++seed;
        c.offsets = few ? kSmall : std::vector<int32_t>{20, 20, 90};
        c.num_rows = few ? 36 : 95;
        c.cols = activation == KIMI_ACTIVATION_GELU   ? 43
                 : activation == KIMI_ACTIVATION_SILU ? 160
                                                      : 64;
        c.depth = few ? 72 : 48;
        c.b = seed % 5 == 0 ? kAlongDepth : kAlongOuter;
        c.gather_a = seed % 2 == 0;
        c.divisor = 2;
        c.out_misalign = seed % 3 == 0 ? 1 : 0;
        c.poison = 2;
        check_product(c);
      }
}

TEST(products_drawn_at_random) {
  for (uint64_t seed = 300; seed < 380; ++seed) {
    std::mt19937 random(static_cast<unsigned>(seed));
    const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    Case c{.dtype = kTypes[below(3)], .grouping = below(3) == 0 ? Grouping::kK : Grouping::kM};
    c.seed = seed;
    if (c.grouping == Grouping::kM) c.epilogue = static_cast<Epilogue>(below(3));
    int32_t end = 0;
    for (int e = below(6); e >= 0; --e) c.offsets.push_back(end += below(3) * below(40));
    c.num_rows = end + below(2) * below(20);
    c.rows = 1 + below(140);
    c.cols = below(2) ? 8 + 8 * below(18) : 1 + below(140);
    c.depth = below(2) ? 8 * below(16) : below(100);
    c.a = static_cast<Contiguous>(below(3));
    c.b = static_cast<Contiguous>(below(3));
    if (below(3) != 0) c.a = c.grouping == Grouping::kM ? kAlongDepth : kAlongOuter;
    c.pad = below(2) ? 8 : below(9);
    c.misalign = below(4) ? 0 : below(9);
    c.gather_a = below(2);
    c.gather_b = c.grouping == Grouping::kK && below(2);
    c.divisor = 1 + below(3);
    c.poison = below(8);
    c.out_dtype = below(2) ? KIMI_FLOAT32 : c.dtype;
    c.bias = c.grouping == Grouping::kM && below(2);
    c.accumulate = c.grouping == Grouping::kK && below(2);
    c.out_pad = below(2) ? 0 : below(9);
    c.out_misalign = below(2) ? 0 : below(9);
    c.activation = kActivations[below(3)];
    c.keep_gate_up = below(2);
    c.keep_hidden = below(3);
    check_product(c);
  }
}

// ---- sums that rounding enters ------------------------------------------------------------------

// The same bits in every fiber order; close to fp64; of fp32 operands the very sum of a plain loop.
template <class T>
void check_rounding(int64_t rows, int64_t depth, bool of_depth) {
  constexpr int64_t kCols = 24;
  std::mt19937 random(static_cast<unsigned>(depth));
  std::normal_distribution<float> normal;
  // Outer-major if K-grouped, else depth-major.
  std::vector<T> p(rows * depth), q(kCols * depth);
  for (T& v : p) v = from_float<T>(normal(random));
  for (T& v : q) v = from_float<T>(normal(random));
  std::vector<float> first;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    simt::settings().seed = seed;
    std::vector<float> out(rows * kCols);
    const int32_t offset = static_cast<int32_t>(of_depth ? depth : rows);
    Product x{};
    x.grouping = of_depth ? Grouping::kK : Grouping::kM;
    x.dtype = kDtype<T>;
    x.a = {p.data(), of_depth ? 1 : depth, of_depth ? rows : 1};
    x.b = {q.data(), of_depth ? 1 : depth, of_depth ? kCols : 1};
    x.groups = {&offset, offset, 1};
    x.rows = rows;
    x.depth = depth;
    x.cols = kCols;
    StoreParams params{out.data(), kCols, 0, KIMI_FLOAT32};
    params.wide = reinterpret_cast<uintptr_t>(out.data()) % 16 == 0;
    CHECK(store(x, params).is_ok());
    if (first.empty()) first = out;
    CHECK(out == first);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < kCols; ++j) {
      double exact = 0.0, size = 0.0;
      float plain = 0.0f;
      for (int64_t d = 0; d < depth; ++d) {
        const float a = to_float(p[of_depth ? d * rows + i : i * depth + d]);
        const float b = to_float(q[of_depth ? d * kCols + j : j * depth + d]);
        plain = std::fma(a, b, plain);
        exact += double{a} * b;
        size += std::fabs(double{a} * b);
      }
      const float got = first[static_cast<size_t>(i * kCols + j)];
      if (sizeof(T) == 4) CHECK(got == plain);
      CHECK(std::fabs(got - exact) <= 2e-6 * size);
    }
}

TEST(sums_in_fp32) {
  for (int64_t rows : {8, 56}) {
    check_rounding<float>(rows, 200, false);
    check_rounding<bf16>(rows, 200, false);
    check_rounding<fp16>(rows, 200, false);
  }
  check_rounding<float>(40, 104, true);
  check_rounding<bf16>(40, 104, true);
}

}  // namespace

TEST_MAIN()
