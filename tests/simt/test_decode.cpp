// SPDX-License-Identifier: MIT
//
// The experts of few tokens as a chain of launches that overlap: gate and plan in one, the two
// products, the sum. Bits are those of the ops one after the other.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "common/dtype.h"
#include "common/sm.h"
#include "fused_experts/fused_experts.h"
#include "simt.h"
#include "topk_gate/gate_plan.h"

namespace {

using namespace kimi;

struct Case {
  int64_t tokens;
  int32_t experts, top_k;
  int32_t groups = 1;
  bool valid = false;
  kimi_score_function function = KIMI_SCORE_SIGMOID;
};

struct Router {
  std::vector<float> logits, bias, weights;
  std::vector<uint8_t> valid;
  std::vector<int32_t> indices, tokens_per_expert, row_map, source, offsets;
  std::vector<char> workspace;
  GatePlanParams p{};

  Router(const Case& c, std::mt19937& random)
      : logits(c.tokens * c.experts),
        bias(c.experts),
        weights(c.tokens * c.top_k, -7.0f),
        valid(c.tokens, 1),
        indices(weights.size(), -7),
        tokens_per_expert(c.experts, -7),
        row_map(indices),
        source(indices),
        offsets(tokens_per_expert) {
    // Coarse: many choices tie.
    for (float& z : logits) z = std::round(std::normal_distribution<float>(0.0f, 3.0f)(random)) / 2;
    for (float& b : bias) b = static_cast<float>(random() % 3) / 8;
    if (c.valid)
      for (uint8_t& v : valid) v = random() % 3 != 0;
    p.gate.num_tokens = c.tokens;
    p.gate.logits_stride = p.gate.num_experts = c.experts;
    p.gate.top_k = c.top_k;
    p.gate.num_groups = c.groups;
    p.gate.topk_groups = c.groups > 1 ? 2 : 1;
    p.gate.group_score_topk = 2;
    p.gate.renormalize = 1;
    p.gate.scaling_factor = 2.827f;
    p.gate.logits_dtype = KIMI_FLOAT32;
    p.gate.score_function = c.function;
    point();
    workspace.resize(permute_plan_workspace_bytes_cuda(gate::plan_of(p)));
    p.workspace = workspace.data();
  }
  Router(const Router& other) : Router(other, other.p) {}

  std::vector<std::vector<int32_t>> ids() const {
    std::vector<int32_t> bits(weights.size());
    if (!bits.empty()) std::memcpy(bits.data(), weights.data(), bits.size() * sizeof(float));
    return {bits, indices, tokens_per_expert, row_map, source, offsets};
  }

 private:
  Router(const Router& other, const GatePlanParams& params)
      : logits(other.logits),
        bias(other.bias),
        weights(other.weights),
        valid(other.valid),
        indices(other.indices),
        tokens_per_expert(other.tokens_per_expert),
        row_map(other.row_map),
        source(other.source),
        offsets(other.offsets),
        workspace(other.workspace),
        p(params) {
    point();
    p.workspace = workspace.data();
  }
  void point() {
    p.gate.logits = logits.data();
    p.gate.expert_bias = bias.data();
    p.gate.valid = valid.data();
    p.gate.weights = weights.data();
    p.gate.indices = indices.data();
    p.gate.tokens_per_expert = tokens_per_expert.data();
    p.row_map = row_map.data();
    p.source = source.data();
    p.offsets = offsets.data();
  }
};

template <class Work>
uint64_t launches(Work work) {
  const uint64_t before = simt::launches();
  work();
  return simt::launches() - before;
}

constexpr Case kGates[] = {
    {1, 384, 8},
    {16, 384, 8},
    {17, 40, 8, 1, true},
    {64, 24, 4, 4, true},
    {33, 896, 16, 1, false, KIMI_SCORE_SOFTMAX},
    {5, 7, 7, 1, true, KIMI_SCORE_SQRTSOFTPLUS},
    {3, 1, 1},
    {0, 12, 3},
};

TEST(gate_and_plan_in_one_launch_give_the_bits_of_two) {
  uint64_t seed = 0;
  for (int sm : {0, 80})
    for (const Case& c : kGates) {
      CHECK(set_max_sm(sm).is_ok());
      simt::settings().seed = seed++;
      std::mt19937 random(static_cast<unsigned>(seed));
      Router together(c, random), apart(together);
      const uint64_t count = launches([&] { CHECK(gate_plan_cuda(together.p, nullptr).is_ok()); });
      CHECK(topk_gate_cuda(apart.p.gate, nullptr).is_ok());
      CHECK(permute_plan_cuda(gate::plan_of(apart.p), nullptr).is_ok());
      CHECK(count == (sm == 0 || c.tokens <= 16 ? 1 : 2));
      CHECK(together.ids() == apart.ids());
    }
  CHECK(set_max_sm(0).is_ok());
}

TEST(more_tokens_or_groups_than_one_launch_takes) {
  for (const Case& c : {Case{2, 1024, 4}, Case{65, 20, 4}, Case{2, 1024, 4, 512}}) {
    std::mt19937 random(5);
    Router together(c, random), apart(together);
    const uint64_t most = c.tokens > 64 || c.groups > 1 ? 2 : 1;
    CHECK(launches([&] { CHECK(gate_plan_cuda(together.p, nullptr).is_ok()); }) == most);
    CHECK(topk_gate_cuda(apart.p.gate, nullptr).is_ok());
    CHECK(permute_plan_cuda(gate::plan_of(apart.p), nullptr).is_ok());
    CHECK(together.ids() == apart.ids());
  }
}

// One layer, of several stages of depth and tiles.
struct Layer {
  static constexpr int64_t kHidden = 128, kWidth = 192;
  std::vector<bf16> x, w_gate_up, w_down, y;
  std::vector<char> workspace;
  FusedExpertsParams p{};

  Layer(const Case& c, std::mt19937& random)
      : x(c.tokens * kHidden),
        w_gate_up(c.experts * 2 * kWidth * kHidden),
        w_down(c.experts * kHidden * kWidth) {
    for (std::vector<bf16>* values : {&x, &w_gate_up, &w_down})
      for (bf16& v : *values)
        v = from_float<bf16>(std::normal_distribution<float>(0.0f, 0.3f)(random));
    p.x = x.data(), p.x_stride = kHidden;
    p.w_gate_up = {w_gate_up.data(), nullptr, 2 * kWidth * kHidden,
                   kHidden,          1,       KIMI_STORAGE_BFLOAT16};
    p.w_down = {w_down.data(), nullptr, kHidden * kWidth, kWidth, 1, KIMI_STORAGE_BFLOAT16};
    p.num_tokens = c.tokens, p.hidden = kHidden, p.width = kWidth, p.num_experts = c.experts;
    p.top_k = c.top_k, p.dtype = KIMI_BFLOAT16, p.activation = KIMI_ACTIVATION_SILU;
    workspace.resize(fused_experts_workspace_bytes_cuda(p));
  }

  // From poison to y, as bits.
  std::vector<uint16_t> run(Router router, bool together, bool overlapped) {
    std::fill(workspace.begin(), workspace.end(), '\xff');
    y.assign(x.size(), from_float<bf16>(NAN));
    p.y = y.data(), p.workspace = workspace.data();
    p.weights = router.p.gate.weights, p.row_map = router.p.row_map;
    p.source = router.p.source, p.offsets = router.p.offsets;
    const auto work = [&] {
      if (together) {
        CHECK(gate_plan_cuda(router.p, nullptr).is_ok());
      } else {
        CHECK(topk_gate_cuda(router.p.gate, nullptr).is_ok());
        CHECK(permute_plan_cuda(gate::plan_of(router.p), nullptr).is_ok());
      }
      CHECK(fused_experts_cuda(p, nullptr).is_ok());
    };
    overlapped ? simt::overlapped(work) : work();
    std::vector<uint16_t> bits(y.size());
    std::memcpy(bits.data(), y.data(), bits.size() * sizeof(bf16));
    return bits;
  }
};

TEST(a_layer_whose_launches_overlap_gives_the_bits_of_one_whose_do_not) {
  uint64_t seed = 0;
  for (const Case& c : {Case{1, 6, 2}, Case{18, 5, 3, 1, true}}) {
    std::mt19937 random(static_cast<unsigned>(c.tokens));
    Layer layer(c, random);
    const Router router(c, random);
    const std::vector<uint16_t> serial = layer.run(router, false, false);
    for (int resident : {2, 64})
      for (int i = 0; i < 2; ++i) {
        simt::settings().seed = seed++;
        simt::settings().resident_blocks = resident;
        CHECK(layer.run(router, true, true) == serial);
      }
    simt::settings().resident_blocks = 2;
  }
}

TEST(a_layer_takes_four_launches) {
  const Case c{1, 6, 2};
  std::mt19937 random(1);
  Layer layer(c, random);
  const Router router(c, random);
  CHECK(launches([&] { (void)layer.run(router, true, false); }) == 4);
  CHECK(launches([&] { (void)layer.run(router, false, false); }) == 5);  // and a memset
}

}  // namespace

TEST_MAIN()
