// SPDX-License-Identifier: MIT
//
// The plan's CUDA kernels, run on the host, against its definition.
#include <random>

#include "check.h"
#include "common/sm.h"
#include "permute_cases.h"

namespace {

using namespace permute_cases;

TEST(plan_of_one_block) {
  uint64_t seed = 0;
  for (int experts : {1, 2, 31, 33, 384, 511, 512, 513, 896, 1024})
    for (int k : {1, 3, 8, 32, 40})
      for (int align : {1, 16, 128}) {
        const int64_t tokens = ++seed % 6 == 0 ? 0 : seed % 5 == 0 ? 64 : 1 + seed % 29;
        const Skew skew = seed % 9 == 0 ? kNone : static_cast<Skew>(seed % 3);
        compare_plan({tokens, experts, k, align, {}, {}, {}, {}}, skew, seed % 4 * 0.2, seed);
      }
}

TEST(plan_of_several_blocks) {
  uint64_t seed = 0;
  for (int experts : {1, 48, 384, 600, 1024})
    for (int64_t tokens : {513, 600, 1024, 1500})
      for (Skew skew : {kBalanced, kHot, kOneExpert, kNone}) {
        const int align = ++seed % 2 == 0 ? 1 : static_cast<int>(3 * seed);
        compare_plan({tokens, experts, 8, align, {}, {}, {}, {}}, skew, seed % 3 * 0.1, seed);
      }
}

// On Hopper a cluster plans as many pairs as two launches do elsewhere.
TEST(plan_of_another_gpu) {
  CHECK(set_max_sm(80).is_ok());
  uint64_t seed = 40;
  for (int experts : {1, 48, 384, 1024})
    for (int64_t tokens : {3, 600, 1500})
      compare_plan({tokens, experts, 8, ++seed % 2 == 0 ? 1 : 24, {}, {}, {}, {}},
                   static_cast<Skew>(seed % 4), seed % 3 * 0.1, seed);
  CHECK(set_max_sm(0).is_ok());
}

TEST(plan_of_the_largest_cluster_and_beyond) {
  for (int64_t tokens : {8192, 8193}) {
    const uint64_t launches = simt::launches();
    compare_plan({tokens, 96, 16, 4, {}, {}, {}, {}}, tokens % 2 ? kHot : kOneExpert, 0.1, 7);
    CHECK(simt::launches() - launches == (tokens > 8192 ? 2 : 1));
  }
}

TEST(plan_of_the_most_blocks_and_long_runs) {
  compare_plan({40000, 7, 6, 16, {}, {}, {}, {}}, kHot, 0.1, 2);
  compare_plan({137 * 1024, 5, 1, 1, {}, {}, {}, {}}, kBalanced, 0.0, 3);
}

}  // namespace

TEST_MAIN()
