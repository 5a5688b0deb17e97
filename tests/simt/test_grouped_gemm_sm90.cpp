// SPDX-License-Identifier: MIT
//
// product_sm90, run on the host, against plain loops in fp64 (product_cases.h).
#include "common/dtype.h"
#include "product_cases.h"

namespace {

using namespace product_cases;

constexpr Kernel kKernel{product_sm90, serves_sm90};
constexpr kimi_dtype kTypes[] = {KIMI_BFLOAT16, KIMI_FLOAT16};

// It serves the case, and right.
void check_product(const Case& c) {
  if (!check_case(c, kKernel)) check::fail(__FILE__, __LINE__, "not served: " + c.text());
}

TEST(rows_store_of_few_rows) {
  uint64_t seed = 0;
  for (kimi_dtype dtype : kTypes)
    for (Contiguous q : {kAlongDepth, kAlongOuter})
      for (int variant = 0; variant < 3; ++variant) {
        Case c{.dtype = dtype, .offsets = {0, 1, 1, 18, 33}, .q = q, .seed = ++seed};
        if (variant == 1) c.offsets = {70, 70, 72};
        c.num_rows = variant == 1 ? 75 : 40;  // rows after the last group are zeroed
        c.cols = variant == 2 ? 264 : 72;
        c.depth = variant == 0 ? 600 : 104;
        c.bias = seed % 2 == 1;
        c.out_dtype = seed % 3 == 0 ? KIMI_FLOAT32 : dtype;
        c.gather_p = variant == 2;
        c.divisor = 3;
        c.poison = static_cast<int>(seed % 3);
        check_product(c);
      }
}

TEST(rows_store) {
  uint64_t seed = 20;
  for (kimi_dtype dtype : kTypes)
    for (Contiguous q : {kAlongDepth, kAlongOuter})
      for (int variant = 0; variant < 2; ++variant) {
        Case c{.dtype = dtype, .offsets = {199, 200}, .q = q, .seed = ++seed};
        c.num_rows = 210;
        c.cols = variant == 0 ? 264 : 128;
        c.depth = variant == 0 ? 328 : 136;
        c.gather_p = seed % 4 >= 2;
        c.divisor = 2;
        c.bias = variant == 1;
        c.out_dtype = seed % 3 == 0 ? KIMI_FLOAT32 : dtype;
        c.poison = 1;
        check_product(c);
      }
}

TEST(depth_store) {
  uint64_t seed = 160;
  for (kimi_dtype dtype : kTypes)
    for (int variant = 0; variant < 5; ++variant) {
      Case c{.dtype = dtype, .ragged = Ragged::kDepth, .offsets = {0, 5, 5, 200, 201, 201}};
      c.seed = ++seed;
      c.num_rows = 210;
      c.p = c.q = kAlongOuter;
      c.rows = variant == 4 ? 136 : 40;
      c.cols = variant >= 3 ? 264 : 72;
      c.accumulate = variant % 2 == 1;
      c.gather_p = variant == 0;
      c.gather_q = variant == 1 || variant == 4;
      c.divisor = 3;
      c.poison = variant == 0 ? 5 : 3;
      c.out_dtype = variant % 3 == 0 ? dtype : KIMI_FLOAT32;
      check_product(c);
    }
}

}  // namespace

TEST_MAIN()
