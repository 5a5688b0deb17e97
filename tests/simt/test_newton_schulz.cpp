// SPDX-License-Identifier: MIT
//
// The CUDA chains run on the host: near to the iteration in fp64, and the same bits whatever the
// order of the threads, the orientation, the company and the scale of a matrix.
#include "newton_schulz_cases.h"

namespace {

using namespace newton_schulz_cases;

TEST(on_chip_is_near_to_fp64) {
  const int64_t shapes[][2] = {{1, 1}, {1, 70}, {7, 2}, {33, 65}, {64, 40}, {16, 130}};
  for (const auto& [rows, cols] : shapes)
    for (kimi_dtype dtype : kDtypes)
      for (kimi_newton_schulz_method method : kMethods)
        near({.rows = rows, .cols = cols, .method = method, .dtype = dtype});
  near({.rows = 128, .cols = 130});
  near({.rows = 100, .cols = 97, .dtype = KIMI_BFLOAT16, .restarts = {1, 2, 3, 4}});
}

TEST(stacks_are_near_to_fp64) {
  for (kimi_newton_schulz_method method : {KIMI_NEWTON_SCHULZ_SYMMETRIC, KIMI_NEWTON_SCHULZ_GRAM}) {
    near({.rows = 66,
          .cols = 72,
          .count = 2,
          .method = method,
          .dtype = KIMI_FLOAT32,
          .at_once = 2});
    near({.rows = 129, .cols = 136, .method = method, .at_once = 1});
  }
  near({.rows = 136,
        .cols = 130,
        .dtype = KIMI_BFLOAT16,
        .x_dtype = KIMI_BFLOAT16,
        .restarts = {2, 4},
        .at_once = 1});
}

TEST(clusters_are_near_to_fp64) {
  near({.rows = 129, .cols = 136});
  near({.rows = 129, .cols = 131, .method = KIMI_NEWTON_SCHULZ_SYMMETRIC, .steps = 2});
  near({.rows = 177, .cols = 160, .dtype = KIMI_BFLOAT16, .restarts = {1}, .steps = 2});  // tall
  near({.rows = 192, .cols = 195, .restarts = {2}, .steps = 3, .turned = true});
  near({.rows = 193,
        .cols = 193,
        .method = KIMI_NEWTON_SCHULZ_STANDARD,
        .dtype = KIMI_BFLOAT16,
        .steps = 1});
  near({.rows = 256, .cols = 257, .restarts = {1}, .steps = 2});
  near({.rows = 65, .cols = 67, .dtype = KIMI_FLOAT32});
  near({.rows = 128,
        .cols = 129,
        .method = KIMI_NEWTON_SCHULZ_STANDARD,
        .dtype = KIMI_FLOAT32,
        .steps = 2});
}

TEST(a_step_without_its_last_coefficient) {
  for (kimi_newton_schulz_method method : kMethods)
    for (int64_t at_once : {0, 2})
      near({.rows = 20,
            .cols = 40,
            .count = 2,
            .method = method,
            .restarts = {2},
            .cubic = true,
            .at_once = at_once});
}

TEST(any_dtypes_strides_and_addresses) {
  for (kimi_dtype dtype : {KIMI_FLOAT32, KIMI_FLOAT16})
    for (kimi_dtype in : kDtypes)
      for (kimi_dtype out : kDtypes)
        for (int64_t at_once : {0, 3}) {
          if (at_once && (dtype == KIMI_FLOAT32) != (in == out)) continue;
          Case c{.rows = 21, .cols = 34, .count = 3, .dtype = dtype, .g_dtype = in, .x_dtype = out};
          c.at_once = at_once;
          c.turned = in == out;
          c.pad = in == KIMI_FLOAT32 ? 2 : 3;
          c.misalign = out == KIMI_BFLOAT16;
          c.scattered = in != KIMI_FLOAT16;
          if (out != KIMI_FLOAT32) c.restarts = {2, 3};
          std::vector<Numbers> matrices;
          for (unsigned e = 0; e < 3; ++e) {
            matrices.push_back(randoms(21 * 34, e));
            for (double& v : matrices.back()) v = to_float(from_float<bf16>(static_cast<float>(v)));
          }
          const std::vector<Numbers> images = run(c, matrices);
          for (size_t e = 0; e < 3; ++e)
            require(relative(images[e], exact(c, matrices[e])) < 0.02, c, "error");
        }
}

// All roads: on chip, in clusters, and matrices as a stack, which each product gives a whole tile.
template <class Body>
void each_road(const Body& body) {
  for (kimi_dtype dtype : kDtypes) {
    body(Case{.rows = 19, .cols = 45, .count = 3, .dtype = dtype});
    body(Case{.rows = 19,
              .cols = 45,
              .count = 3,
              .method = KIMI_NEWTON_SCHULZ_STANDARD,
              .dtype = dtype,
              .steps = 2});
  }
  body(Case{.rows = 70, .cols = 133, .count = 3, .restarts = {1}, .steps = 2, .clusters = true});
  body(Case{.rows = 9,
            .cols = 20,
            .count = 3,
            .method = KIMI_NEWTON_SCHULZ_STANDARD,
            .dtype = KIMI_FLOAT32,
            .steps = 2,
            .clusters = true});
  body(Case{.rows = 9, .cols = 20, .count = 3, .restarts = {1}, .steps = 2, .at_once = 5});
  body(Case{.rows = 9,
            .cols = 20,
            .count = 3,
            .method = KIMI_NEWTON_SCHULZ_STANDARD,
            .dtype = KIMI_FLOAT32,
            .steps = 1,
            .at_once = 5});
  for (kimi_newton_schulz_method method : {KIMI_NEWTON_SCHULZ_STANDARD, KIMI_NEWTON_SCHULZ_GRAM})
    body(Case{.rows = 9,
              .cols = 20,
              .count = 3,
              .method = method,
              .restarts = {1},
              .steps = 2,
              .aol = true});
}

TEST(aol_is_near_to_fp64) {
  const int64_t shapes[][2] = {{1, 9}, {9, 1}, {20, 36}, {33, 18}};
  for (const auto& [rows, cols] : shapes)
    for (kimi_dtype dtype : kDtypes)
      for (kimi_newton_schulz_method method :
           {KIMI_NEWTON_SCHULZ_SYMMETRIC, KIMI_NEWTON_SCHULZ_GRAM})
        near({.rows = rows,
              .cols = cols,
              .count = 2,
              .method = method,
              .dtype = dtype,
              .restarts = {2},
              .steps = 4,
              .aol = true});
  near({.rows = 136, .cols = 130, .restarts = {2}, .steps = 4, .aol = true});
}

// A row of zeros, one of 2^-12 of the norm, whose products with itself fp16 cannot hold, and others.
TEST(aol_of_rows_of_any_size) {
  for (kimi_dtype dtype : kDtypes) {
    Case c{.rows = 6, .cols = 20, .dtype = dtype, .restarts = {2}, .steps = 4, .aol = true};
    Numbers g = randoms(c.rows * c.cols, 8);
    for (int64_t j = 0; j < c.cols; ++j) {
      g[size_t(j)] = 0;
      g[size_t(c.cols + j)] *= 0x1p-12;
      g[size_t(2 * c.cols + j)] *= 64;
    }
    const Numbers image = run(c, {g})[0], wanted = exact(c, g);
    require(relative(image, wanted) < (dtype == KIMI_FLOAT32 ? 1e-3 : 0.1), c, "error");
    const auto row = [&](const Numbers& x, int64_t i) {
      return Numbers(x.begin() + i * c.cols, x.begin() + (i + 1) * c.cols);
    };
    require(row(image, 0) == Numbers(size_t(c.cols)), c, "a row of zeros");
    require(relative(row(image, 1), row(wanted, 1)) < 0.15, c, "a small row");
    c.rows = c.cols = 2;  // no product but its own, which fp16 holds as 2^14 times that alone
    const Numbers apart = run(c, {{1, 0, 0, 0x1p-14}})[0];
    require(std::abs(apart[3] - apart[0]) < 0.05, c, "a small row that is orthogonal to the rest");
  }
}

TEST(bits_do_not_depend_on_company_place_or_threads) {
  each_road([](Case c) {
    std::vector<Numbers> matrices;
    for (unsigned e = 0; e < 3; ++e) matrices.push_back(randoms(c.rows * c.cols, e));
    const std::vector<Numbers> images = run(c, matrices);
    for (uint64_t seed = 4; seed < 8; ++seed) {
      c.seed = seed;
      std::rotate(matrices.begin(), matrices.begin() + 1, matrices.end());
      const std::vector<Numbers> again = run(c, matrices);
      for (size_t e = 0; e < 3; ++e)
        require(same(again[e], images[(e + seed - 3) % 3]), c, "another place");
    }
    std::rotate(matrices.begin(), matrices.begin() + 2, matrices.end());
    if (c.at_once) {
      c.at_once = 2;
      require(run(c, matrices) == images, c, "two at once");
    }
    c.count = 1;
    require(same(run(c, {matrices[1]})[0], images[1]), c, "alone");
  });
}

// One block, four and two of them (the host runner holds three clusters of four), and the products
// of a stack by the same instructions.
TEST(bits_do_not_depend_on_the_blocks_of_a_matrix) {
  for (kimi_dtype dtype : kDtypes)
    for (kimi_newton_schulz_method method :
         {KIMI_NEWTON_SCHULZ_STANDARD, KIMI_NEWTON_SCHULZ_GRAM}) {
      const int64_t rows = method == KIMI_NEWTON_SCHULZ_GRAM ? 63 : 21;
      Case c{.rows = rows, .cols = 90, .method = method, .dtype = dtype, .restarts = {1}};
      c.steps = 3;
      const Numbers g = randoms(c.rows * c.cols, 3);
      const Numbers image = run(c, {g})[0];
      c.clusters = true;
      require(same(run(c, {g})[0], image), c, "four blocks");
      c.count = 4;
      for (const Numbers& other : run(c, std::vector<Numbers>(4, g)))
        require(same(other, image), c, "two blocks");
      c.count = c.at_once = 1;
      CHECK(set_max_sm(80).is_ok());
      const Numbers of_stack = run(c, {g})[0];
      CHECK(set_max_sm(0).is_ok());
      require(same(of_stack, image), c, "stack");
    }
}

TEST(bits_do_not_depend_on_orientation_or_scale) {
  each_road([](Case c) {
    c.count = 1;
    const Numbers g = randoms(c.rows * c.cols, 5);
    const Numbers image = run(c, {g})[0];
    Case turned = c;
    turned.turned = true;
    turned.pad = 3;
    require(same(run(turned, {g})[0], image), c, "columns contiguous");
    Case tall = c;
    std::swap(tall.rows, tall.cols);
    Numbers transposed(g.size()), expected(g.size());
    for (int64_t i = 0; i < c.rows; ++i)
      for (int64_t j = 0; j < c.cols; ++j) {
        transposed[size_t(j * c.rows + i)] = g[size_t(i * c.cols + j)];
        expected[size_t(j * c.rows + i)] = image[size_t(i * c.cols + j)];
      }
    require(same(run(tall, {transposed})[0], expected), c, "tall");
    for (int power : {-140, -60, 100}) {
      Numbers scaled = g;
      // few bits, that 2^-140 can hold
      for (double& v : scaled) v = std::round(v * 8) / 8;
      const Numbers small = run(c, {scaled})[0];
      for (double& v : scaled) v = std::ldexp(v, power);
      require(same(run(c, {scaled})[0], small), c, "scaled");
    }
  });
}

TEST(zero_is_zero_and_nan_stays_in_its_matrix) {
  each_road([](Case c) {
    std::vector<Numbers> matrices(3, Numbers(size_t(c.rows * c.cols)));
    matrices[1] = randoms(c.rows * c.cols, 1);
    matrices[2] = matrices[1];
    matrices[2][7] = kNaN;
    const std::vector<Numbers> images = run(c, matrices);
    require(images[0] == matrices[0], c, "zero");
    require(relative(images[1], exact(c, matrices[1])) < 0.2, c, "beside");
    require(std::all_of(images[2].begin(), images[2].end(), [](double v) { return v != v; }), c,
            "NaN");
    c.count = 1;
    c.eps = 100.0f;
    require(relative(run(c, {matrices[1]})[0], exact(c, matrices[1])) < 0.05, c, "eps");
    c.eps = 0.0f;
    if (c.aol) return;                          // rows of 1e-30 of the norm count as zero there
    Numbers row = randoms(c.rows * c.cols, 2);  // one row that is all of the norm
    for (int64_t j = 0; j < c.cols; ++j) row[size_t(j)] *= 1e30;
    require(relative(run(c, {row})[0], exact(c, row)) < 0.02, c, "one huge row");
  });
}

TEST(more_matrices_than_fit_in_the_parameters_of_a_launch) {
  Case c{.rows = 1, .cols = 2, .count = newton_schulz_cuda::kMostMatrices + 2, .steps = 1};
  c.restarts = {};
  std::vector<Numbers> matrices;
  for (int64_t e = 0; e < c.count; ++e) matrices.push_back(randoms(2, unsigned(e)));
  const std::vector<Numbers> images = run(c, matrices);
  for (int64_t e = 0; e < c.count; ++e)
    require(relative(images[size_t(e)], exact(c, matrices[size_t(e)])) < 0.01, c, "error");
}

TEST(stacks_after_the_first_with_outputs_anywhere) {
  near({.rows = 9,
        .cols = 12,
        .count = 6,
        .restarts = {},
        .steps = 1,
        .scattered = true,
        .at_once = 3});
}

// The norm of a large matrix is a sum over several blocks.
TEST(a_norm_of_many_blocks) {
  near({.rows = 1,
        .cols = 8300,
        .method = KIMI_NEWTON_SCHULZ_STANDARD,
        .dtype = KIMI_FLOAT32,
        .steps = 1,
        .cubic = true,
        .at_once = 1});
}

// Warp operations that a step of 32 x 64 costs on chip. A step of 16 in depth is 4 ldmatrix and 8 mma
// for a tile of 32 x 32: 4 of them for X X^T, 2 for its square and 2 for each half of the image. A
// tile on the diagonal has a barrier before it is mirrored.
TEST(a_step_on_chip_multiplies_no_more_than_it_must) {
  const auto work = [](int steps) {
    const Case c{.rows = 32, .cols = 64, .method = KIMI_NEWTON_SCHULZ_STANDARD, .steps = steps};
    run(c, {randoms(32 * 64, 1)});
    return simt::last_statistics().warp_operations;
  };
  CHECK(work(3) - work(2) == uint64_t{32} * (12 * (4 + 2 + 2 * 2) + 2));
}

TEST(launches) {
  const auto launches = [](const Case& c) {
    const uint64_t before = simt::last_statistics().launches;
    run(c, std::vector<Numbers>(size_t(c.count), randoms(c.rows * c.cols, 1)));
    return simt::last_statistics().launches - before;
  };
  Case c{.rows = 9, .cols = 20, .count = 3};
  CHECK(launches(c) == 1);
  c.at_once = 3;
  CHECK(launches(c) == 2 + 18);
  c.scattered = true;
  CHECK(launches(c) == 2 + 18 + 1);
  c.scattered = false;
  c.at_once = 2;
  CHECK(launches(c) == 2 * (2 + 18));
  c.method = KIMI_NEWTON_SCHULZ_STANDARD;
  CHECK(launches(c) == 2 * (2 + 15));
  c.aol = true;
  CHECK(launches(c) == 2 * (2 + 3 + 15));
}

TEST(clusters_are_for_hopper_and_what_fits) {
  const auto launches = [](int64_t rows, kimi_dtype dtype) {
    const Case c{.rows = rows,
                 .cols = 260,
                 .method = KIMI_NEWTON_SCHULZ_STANDARD,
                 .dtype = dtype,
                 .steps = 1,
                 .cubic = true};
    const uint64_t before = simt::last_statistics().launches;
    run(c, {Numbers(size_t(c.rows * c.cols))});
    return simt::last_statistics().launches - before;
  };
  CHECK(launches(256, KIMI_BFLOAT16) == 1 && launches(128, KIMI_FLOAT32) == 1);
  CHECK(launches(257, KIMI_BFLOAT16) == 2 + 3 && launches(129, KIMI_FLOAT32) == 2 + 3);
  CHECK(set_max_sm(80).is_ok());
  CHECK(launches(129, KIMI_BFLOAT16) == 2 + 3 && launches(128, KIMI_BFLOAT16) == 1);
  CHECK(set_max_sm(0).is_ok());
}

}  // namespace

TEST_MAIN()
