// SPDX-License-Identifier: MIT
//
// product_sm90, run on the host, against plain loops in fp64 (product_cases.h). Small products take
// only some of its kernels by themselves, so that the others are asked for here.
#include <optional>

#include "common/dtype.h"
#include "gemm/sm90/job.h"
#include "product_cases.h"

namespace {

using namespace product_cases;
using sm90::Shape;

constexpr kimi_dtype kTypes[] = {KIMI_BFLOAT16, KIMI_FLOAT16};

struct Force {
  std::optional<Shape> shape{};
  std::optional<bool> paired{};
};
Force g_force;

Status run_forced(const Product& p, void* stream) {
  sm90::Job job = sm90::make_job(p);
  job.shape = g_force.shape.value_or(job.shape);
  job.paired = g_force.paired.value_or(job.paired);
  return sm90::run_job(job, stream);
}

// It serves the case, and right.
void check_product(const Case& c, Force force = {}) {
  g_force = force;
  const bool chosen = !force.shape && !force.paired;
  if (!check_case(c, {chosen ? product_sm90 : run_forced, serves_sm90}))
    check::fail(__FILE__, __LINE__, "not served: " + c.text());
}

TEST(rows_store_of_few_rows) {
  uint64_t seed = 0;
  for (kimi_dtype dtype : kTypes)
    for (Contiguous q : {kAlongDepth, kAlongOuter})
      for (int variant = 0; variant < 4; ++variant) {
        Case c{.dtype = dtype, .offsets = {0, 1, 1, 18, 33}, .q = q, .seed = ++seed};
        if (variant % 2 == 1) c.offsets = {70, 70, 72};
        c.num_rows = variant % 2 == 1 ? 75 : 40;  // rows after the last group are zeroed
        c.cols = variant == 2 ? 264 : 72;
        c.depth = variant == 0 ? 600 : 104;
        c.bias = seed % 2 == 1;
        c.out_dtype = seed % 3 == 0 ? KIMI_FLOAT32 : dtype;
        c.gather_p = variant >= 2;
        c.divisor = 3;
        c.poison = static_cast<int>(seed % 3);
        check_product(c, variant == 3 ? Force{} : Force{.shape = Shape::kFew});
      }
}

TEST(rows_store) {
  uint64_t seed = 20;
  for (kimi_dtype dtype : kTypes)
    for (Contiguous q : {kAlongDepth, kAlongOuter})
      for (Shape shape : {Shape::kNarrow, Shape::kWide})
        for (bool paired : {false, true}) {
          Case c{.dtype = dtype, .offsets = {150, 153}, .q = q, .seed = ++seed};
          c.num_rows = 160;
          c.cols = seed % 3 == 0 ? 200 : 72;
          c.depth = 328;
          c.gather_p = seed % 4 == 1;
          c.divisor = 2;
          c.bias = seed % 4 == 2;  // or TMA stores
          c.out_dtype = seed % 3 == 0 ? KIMI_FLOAT32 : dtype;
          c.poison = 1;
          check_product(c, {shape, paired});
        }
}

// Many tiles of a block one after the other, of any number of stages.
TEST(rows_store_of_many_tiles) {
  uint64_t seed = 60;
  for (Shape shape : {Shape::kFew, Shape::kNarrow, Shape::kWide})
    for (bool paired : {false, true}) {
      if (paired && shape == Shape::kFew) continue;
      Case c{.offsets = {1, 1, 3, 8, 8, 9, 130, 131, 133}, .num_rows = 134, .seed = ++seed};
      c.cols = 520;
      c.depth = 8 << seed % 4;
      c.q = seed % 2 == 0 ? kAlongDepth : kAlongOuter;
      c.gather_p = seed % 3 == 0;
      c.poison = 3;
      check_product(c, {shape, paired});
    }
}

TEST(rows_more_groups_than_a_warp_has_lanes) {
  for (Shape shape : {Shape::kFew, Shape::kWide}) {
    Case c{.seed = 121};
    std::mt19937 random(5);
    int32_t end = 0;
    for (int e = 0; e < 70; ++e) {
      if (e > 30 && e < 66) end += random() % 3 == 0;
      if (e == 2 || e == 68) end += 20;
      c.offsets.push_back(end);
    }
    c.num_rows = end + 3;
    c.cols = 72;
    c.depth = 16;
    check_product(c, {shape, false});
  }
}

TEST(depth_store) {
  uint64_t seed = 160;
  for (kimi_dtype dtype : kTypes)
    for (int variant = 0; variant < 8; ++variant) {
      Case c{.dtype = dtype, .ragged = Ragged::kDepth, .offsets = {0, 5, 5, 200, 201, 201}};
      c.seed = ++seed;
      c.num_rows = 210;
      c.p = c.q = kAlongOuter;
      c.rows = variant % 4 == 0 ? 136 : 40;
      c.cols = variant == 3 ? 264 : 72;
      c.accumulate = variant % 2 == 1;
      c.gather_p = variant == 0 || variant == 5;
      c.gather_q = variant == 1 || variant == 4;
      c.divisor = 3;
      c.poison = variant == 0 ? 5 : 3;
      c.out_dtype = variant % 3 == 0 ? dtype : KIMI_FLOAT32;
      check_product(c, {{}, variant % 4 == 0});
    }
}

constexpr kimi_activation kActivations[] = {KIMI_ACTIVATION_SILU, KIMI_ACTIVATION_GELU,
                                            KIMI_ACTIVATION_SITU};

TEST(activate) {
  uint64_t seed = 200;
  for (kimi_dtype dtype : kTypes)
    for (int variant = 0; variant < 3; ++variant)
      for (kimi_activation activation : kActivations) {
        Case c{.dtype = dtype, .epilogue = Epilogue::kActivate, .activation = activation};
        c.seed = ++seed;
        c.offsets = variant == 0 ? std::vector<int32_t>{0, 1, 1, 18, 33}
                                 : std::vector<int32_t>{20, 20, 150};
        c.num_rows = c.offsets.back() + 5;  // rows after the last group are left alone
        c.cols = activation == KIMI_ACTIVATION_GELU   ? 19
                 : activation == KIMI_ACTIVATION_SILU ? 200
                                                      : 64;
        c.depth = variant == 0 ? 400 : 72;
        c.gather_p = seed % 2 == 0;
        c.divisor = 2;
        c.keep_gate_up = seed % 4 != 0;
        c.keep_hidden = seed % 4 != 1;
        c.poison = 2;
        check_product(c, {variant == 0 ? Shape::kFew : Shape::kWide, variant == 2});
      }
}

TEST(activate_backward) {
  uint64_t seed = 240;
  for (kimi_dtype dtype : kTypes)
    for (bool paired : {false, true})
      for (kimi_activation activation : kActivations) {
        Case c{.dtype = dtype, .epilogue = Epilogue::kActivateBackward, .activation = activation};
        c.seed = ++seed;
        c.offsets = {20, 20, 150};
        c.num_rows = 155;
        c.cols = activation == KIMI_ACTIVATION_GELU   ? 40
                 : activation == KIMI_ACTIVATION_SILU ? 160
                                                      : 264;
        c.q = kAlongOuter;
        c.depth = 72;
        c.gather_p = seed % 2 == 0;
        c.divisor = 2;
        c.out_misalign = seed % 3 == 0 ? 1 : 0;
        c.poison = 2;
        check_product(c, {{}, paired});
      }
}

kimi_status g_code;

bool serves_or_says_why(const Product& p) {
  if (!serves_sm90(p)) g_code = product_sm90(p, nullptr).code;
  return serves_sm90(p);
}

// What TMA and wgmma cannot take is refused, by product_sm90 too.
TEST(what_it_does_not_serve) {
  constexpr Kernel kKernel{product_sm90, serves_or_says_why};
  Case served{.offsets = {3, 5}, .num_rows = 5, .cols = 16, .depth = 16};
  CHECK(check_case(served, kKernel));
  std::vector<Case> refused(7, served);
  refused[0].misalign = 1;
  refused[1].pad = 1;
  refused[2].p = kAlongOuter;
  refused[3].q = kNeither;
  refused[4].depth = 12;  // gathered rows are copied by 16 bytes
  refused[4].pad = 4;
  refused[4].gather_p = true;
  refused[5].dtype = KIMI_FLOAT32;
  refused[6].offsets.clear();
  for (const Case& c : refused) {
    g_code = KIMI_OK;
    CHECK(!check_case(c, kKernel));
    CHECK(g_code == KIMI_INVALID_ARGUMENT);
  }
}

// Also that it serves what it should, and nothing else wrongly.
TEST(products_drawn_at_random) {
  int served = 0;
  for (uint64_t seed = 300; seed < 360; ++seed) {
    std::mt19937 random(static_cast<unsigned>(seed));
    const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    Case c{.dtype = kTypes[below(2)], .ragged = below(3) == 0 ? Ragged::kDepth : Ragged::kRows};
    c.seed = seed;
    if (c.ragged == Ragged::kRows) c.epilogue = static_cast<Epilogue>(below(3));
    int32_t end = 0;
    for (int e = below(6); e >= 0; --e) c.offsets.push_back(end += below(3) * below(90));
    c.num_rows = end + below(2) * below(20);
    c.rows = 8 * (1 + below(17));
    c.cols = below(4) ? 8 * (1 + below(17)) : 1 + below(140);
    c.depth = below(4) ? 8 * below(40) : below(100);
    c.p = c.ragged == Ragged::kRows ? kAlongDepth : kAlongOuter;
    c.q = c.ragged == Ragged::kDepth || below(2) ? kAlongOuter : kAlongDepth;
    c.pad = below(8) ? 8 : below(9);
    c.misalign = below(8) ? 0 : 4;
    c.gather_p = below(2);
    c.gather_q = c.ragged == Ragged::kDepth && !c.gather_p && below(2);
    c.divisor = 1 + below(3);
    c.poison = below(8);
    c.out_dtype = below(2) ? KIMI_FLOAT32 : c.dtype;
    c.bias = c.ragged == Ragged::kRows && below(2);
    c.accumulate = c.ragged == Ragged::kDepth && below(2);
    c.out_pad = below(2) ? 0 : below(9);
    c.out_misalign = below(2) ? 0 : below(9);
    c.activation = kActivations[below(3)];
    c.keep_gate_up = below(2);
    c.keep_hidden = below(3);
    const bool rows = c.epilogue == Epilogue::kStore && c.ragged == Ragged::kRows;
    g_force = {};
    if (rows) g_force.shape = static_cast<Shape>(below(3));
    if (rows && g_force.shape != Shape::kFew) g_force.paired = below(2);
    served += check_case(c, {run_forced, serves_sm90});
  }
  CHECK(served >= 25);
}

}  // namespace

TEST_MAIN()
