// SPDX-License-Identifier: MIT
//
// Plans for kernels that run on the host: ids of every skew, the plan that permute.h defines for them
// in plain loops, and that of the kernels.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "permute/permute.h"
#include "simt.h"

namespace permute_cases {

using namespace kimi;

inline std::string g_case;  // what a failure prints

inline void require(bool condition, const char* what) {
  if (!condition)
    check::fail(
        __FILE__, __LINE__,
        std::string(what) + ": " + g_case + " seed " + std::to_string(simt::settings().seed));
}

inline std::mt19937 start(uint64_t seed, std::string text) {
  simt::settings().seed = seed;
  g_case = std::move(text);
  return std::mt19937(static_cast<unsigned>(seed * 7919 + 13));
}

struct Plan {
  int64_t num_tokens = 0;
  int num_experts = 1, top_k = 1, align = 1;
  std::vector<int32_t> row_map, source, offsets, tokens_per_expert;

  int64_t num_rows() const { return num_tokens * top_k + int64_t{num_experts} * (align - 1); }
};

// Every expert's pairs in order, then its padding, then the rest.
inline Plan define_plan(const std::vector<int32_t>& ids, Plan plan) {
  plan.row_map.assign(ids.size(), -1);
  for (int32_t e = 0; e < plan.num_experts; ++e) {
    int32_t count = 0;
    for (size_t pair = 0; pair < ids.size(); ++pair) {
      if (ids[pair] != e) continue;
      plan.row_map[pair] = static_cast<int32_t>(plan.source.size());
      plan.source.push_back(static_cast<int32_t>(pair));
      ++count;
    }
    while (plan.source.size() % plan.align != 0) plan.source.push_back(-1);
    plan.offsets.push_back(static_cast<int32_t>(plan.source.size()));
    plan.tokens_per_expert.push_back(count);
  }
  plan.source.resize(plan.num_rows(), -1);
  return plan;
}

enum Skew { kBalanced, kHot, kOneExpert, kNone };

inline std::vector<int32_t> make_ids(const Plan& shape, Skew skew, double drop,
                                     std::mt19937& random) {
  std::vector<int32_t> ids(shape.num_tokens * shape.top_k);
  const int32_t experts = shape.num_experts, wrong[] = {-1, experts, INT32_MIN, INT32_MAX};
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  for (int32_t& id : ids) {
    const int32_t any = static_cast<int32_t>(random() % experts);
    id = skew == kOneExpert ? experts / 2 : skew == kHot && uniform(random) < .6 ? any % 2 : any;
    if (skew == kNone || uniform(random) < drop) id = wrong[random() % 4];
  }
  return ids;
}

inline Plan run_plan(const std::vector<int32_t>& ids, Plan plan) {
  plan.row_map.assign(ids.size(), -7);
  plan.source.assign(plan.num_rows(), -7);
  plan.offsets.assign(plan.num_experts, -7);
  plan.tokens_per_expert.assign(plan.num_experts, -7);
  PermutePlanParams p{};
  p.num_tokens = plan.num_tokens;
  p.num_experts = plan.num_experts;
  p.top_k = plan.top_k;
  p.align = plan.align;
  const size_t words = (permute_plan_workspace_bytes_cuda(p) + 3) / 4;
  std::vector<int32_t> workspace(words, -7);  // ASan holds its end
  p.indices = ids.data();
  p.row_map = plan.row_map.data();
  p.source = plan.source.data();
  p.offsets = plan.offsets.data();
  p.tokens_per_expert = plan.tokens_per_expert.data();
  p.workspace = workspace.data();
  CHECK(permute_plan_cuda(p, nullptr).is_ok());
  return plan;
}

inline Plan compare_plan(const Plan& shape, Skew skew, double drop, uint64_t seed) {
  std::mt19937 random = start(
      seed, "T " + std::to_string(shape.num_tokens) + " E " + std::to_string(shape.num_experts) +
                " K " + std::to_string(shape.top_k) + " align " + std::to_string(shape.align) +
                " skew " + std::to_string(skew) + " drop " + std::to_string(drop));
  const std::vector<int32_t> ids = make_ids(shape, skew, drop, random);
  const Plan want = define_plan(ids, shape), got = run_plan(ids, shape);
  require(got.row_map == want.row_map, "row_map");
  require(got.source == want.source, "source");
  require(got.offsets == want.offsets, "offsets");
  require(got.tokens_per_expert == want.tokens_per_expert, "tokens_per_expert");
  return want;
}

}  // namespace permute_cases
