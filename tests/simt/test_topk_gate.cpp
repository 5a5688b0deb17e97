// SPDX-License-Identifier: MIT
//
// The gate's CUDA kernels, run on the host, against the portable CPU engine: bit for bit.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "common/dtype.h"
#include "common/sm.h"
#include "device/estimate.cuh"
#include "simt.h"
#include "topk_gate/filter.h"
#include "topk_gate/score.h"
#include "topk_gate/topk_gate.h"

namespace {

using namespace kimi;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Case {
  int tokens = 1, experts = 1, k = 1, groups = 1, topk_groups = 1, group_score_topk = 1;
  kimi_dtype dtype = KIMI_FLOAT32;
  kimi_score_function function = KIMI_SCORE_SIGMOID;
  bool bias = false, valid = false, renormalize = true, by_logits = false;
  int gap = 0;  // logits_stride - E

  std::string text() const {
    return "T " + std::to_string(tokens) + " E " + std::to_string(experts) + " K " +
           std::to_string(k) + " groups " + std::to_string(groups) + "/" +
           std::to_string(topk_groups) + "/" + std::to_string(group_score_topk) + " dtype " +
           std::to_string(dtype) + " function " + std::to_string(function) + (bias ? " bias" : "") +
           (valid ? " valid" : "") + (by_logits ? " by logits" : "") + " seed " +
           std::to_string(simt::settings().seed);
  }
};

// Continuous, tied on a coarse grid, saturated, or full of infinities and NaN: row by row.
float logit(std::mt19937& random, int kind) {
  const float x = std::normal_distribution<float>(0.0f, 3.0f)(random);
  switch (kind) {
    case 0:
      return x;
    case 1:
      return std::round(x) / 2;
    case 2:
      return 15.0f * x;
    case 3: {
      const float special[] = {kNaN, -kInf, kInf, 0.0f, -0.0f, x, -100.0f, 1e30f};
      return special[random() % 8];
    }
    case 4:  // a few that count, among those that do not
      return random() % 16 == 0 ? x : kNaN;
    case 5:  // closer than estimates can tell
      return 1.0f + static_cast<float>(random() % 40) * 0x1p-23f;
    case 6:
      return kNaN;
    default:
      return -kInf;
  }
}

template <class T>
std::vector<T> make_logits(const Case& c, std::mt19937& random) {
  if (c.tokens == 0) return {};
  const int stride = c.experts + c.gap;
  std::vector<T> logits(static_cast<size_t>(c.tokens - 1) * stride + c.experts,
                        from_float<T>(kNaN));
  for (int t = 0; t < c.tokens; ++t) {
    const int kind = static_cast<int>(random() % 8);
    for (int e = 0; e < c.experts; ++e)
      logits[static_cast<size_t>(t) * stride + e] = from_float<T>(logit(random, kind));
  }
  return logits;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

void require(bool condition, const Case& c, const char* what) {
  if (!condition) check::fail(__FILE__, __LINE__, std::string(what) + " differ: " + c.text());
}

template <class T>
void compare(const Case& c, std::mt19937& random) {
  const std::vector<T> logits = make_logits<T>(c, random);
  std::vector<float> bias(c.experts);
  for (float& b : bias) b = logit(random, random() % 50 == 0 ? 3 : 1) / 8;
  std::vector<uint8_t> valid(c.tokens);
  for (uint8_t& v : valid) v = random() % 3 != 0;
  const size_t slots = static_cast<size_t>(c.tokens) * c.k;

  TopkGateParams p{};
  p.logits = logits.data();
  p.expert_bias = c.bias ? bias.data() : nullptr;
  p.valid = c.valid ? valid.data() : nullptr;
  p.num_tokens = c.tokens;
  p.logits_stride = c.experts + c.gap;
  p.num_experts = c.experts;
  p.top_k = c.k;
  p.num_groups = c.groups;
  p.topk_groups = c.topk_groups;
  p.group_score_topk = c.group_score_topk;
  p.renormalize = c.renormalize;
  p.scaling_factor = 2.827f;
  p.logits_dtype = c.dtype;
  p.score_function = c.function;
  p.select_logits = c.by_logits;

  std::vector<float> weights[2];
  std::vector<int32_t> indices[2], counts[2];
  for (int engine : {0, 1}) {
    weights[engine].assign(slots, -7.0f);
    indices[engine].assign(slots, -7);
    counts[engine].assign(c.experts,
                          engine == 0 ? 0 : -7);  // the kernel zeroes, the CPU engine adds
    p.weights = weights[engine].data();
    p.indices = indices[engine].data();
    p.tokens_per_expert = counts[engine].data();
    if (engine == 0)
      gate::kPortableEngine.forward(p, 0, c.tokens, p.tokens_per_expert);
    else
      CHECK(topk_gate_cuda(p, nullptr).is_ok());
  }
  require(same_bits(indices[0], indices[1]), c, "indices");
  require(same_bits(weights[0], weights[1]), c, "weights");
  require(same_bits(counts[0], counts[1]), c, "counts");
  if (c.tokens == 0) return;

  for (int32_t& id : indices[0])  // slots without an expert take no part
    if (const int32_t bad[] = {-1, c.experts, 100'000'000, INT32_MIN}; random() % 8 == 0)
      id = bad[random() % 4];
  if (random() % 3 == 0)  // given ids may name an expert twice
    for (int32_t& id : indices[0])
      if (random() % 4 == 0)
        id = indices[0][static_cast<size_t>(&id - indices[0].data()) / c.k * c.k];
  TopkGateGivenParams given{};
  given.logits = logits.data();
  given.given = indices[0].data();
  given.valid = p.valid;
  given.num_tokens = c.tokens;
  given.logits_stride = p.logits_stride;
  given.num_experts = c.experts;
  given.top_k = c.k;
  given.renormalize = c.renormalize;
  given.scaling_factor = p.scaling_factor;
  given.logits_dtype = c.dtype;
  given.score_function = c.function;
  std::vector<int32_t> found[2];
  for (int engine : {0, 1}) {
    weights[engine].assign(slots, -7.0f);
    found[engine].assign(slots, -7);
    counts[engine].assign(c.experts, engine == 0 ? 0 : -7);
    given.weights = weights[engine].data();
    given.indices = found[engine].data();
    given.tokens_per_expert = counts[engine].data();
    if (engine == 0)
      gate::kPortableEngine.given(given, 0, c.tokens, given.tokens_per_expert);
    else
      CHECK(topk_gate_given_cuda(given, nullptr).is_ok());
  }
  require(same_bits(found[0], found[1]), c, "given indices");
  require(same_bits(weights[0], weights[1]), c, "weights of given ids");
  require(same_bits(counts[0], counts[1]), c, "counts of given ids");
  std::vector<float> grad(slots);
  for (float& g : grad) g = logit(random, 0);
  TopkGateBackwardParams b{};
  b.grad_weights = grad.data();
  b.logits = logits.data();
  b.indices = indices[0].data();
  b.num_tokens = c.tokens;
  b.logits_stride = p.logits_stride;
  b.num_experts = c.experts;
  b.top_k = c.k;
  b.renormalize = c.renormalize;
  b.scaling_factor = p.scaling_factor;
  b.logits_dtype = c.dtype;
  b.score_function = c.function;
  std::vector<T> gradients[2];
  for (int engine : {0, 1}) {
    gradients[engine].assign(static_cast<size_t>(c.tokens) * c.experts, from_float<T>(-7.0f));
    b.grad_logits = gradients[engine].data();
    if (engine == 0)
      gate::kPortableEngine.backward(b, 0, c.tokens);
    else
      CHECK(topk_gate_backward_cuda(b, nullptr).is_ok());
  }
  // Where every score of a row is 0 the gradient is inf - inf: NaN on both sides, its sign bit
  // free.
  for (size_t i = 0; i < gradients[0].size(); ++i) {
    const float x = to_float(gradients[0][i]), y = to_float(gradients[1][i]);
    require((x != x && y != y) || bits_of(x) == bits_of(y), c, "gradients");
  }
}

void compare(const Case& c, uint64_t seed) {
  simt::settings().seed = seed;
  std::mt19937 random(static_cast<unsigned>(seed * 7919 + 13));
  dispatch(c.dtype, [&]<class T>() { compare<T>(c, random); });
}

TEST(all_sizes_and_score_functions) {
  uint64_t seed = 0;
  for (int experts : {1, 2, 7, 31, 32, 33, 64, 65, 256, 257, 384, 385, 500, 896, 1024})
    for (int k : {1, 2, 6, 8, 16, 31, 32})
      for (int function : {0, 1, 2}) {
        if (k > experts) continue;
        Case c;
        // Few tokens have a launch of their own.
        c.tokens =
            ++seed % 2 != 0 ? 65 + static_cast<int>(seed % 3) : 1 + static_cast<int>(seed % 17);
        c.experts = experts;
        c.k = k;
        c.function = static_cast<kimi_score_function>(function);
        c.dtype = static_cast<kimi_dtype>(seed % 3);
        c.bias = seed % 2;
        c.valid = seed % 7 == 0;
        c.renormalize = seed % 4 != 0;
        c.by_logits = seed % 5 == 0;
        c.gap = static_cast<int>(seed % 3);
        compare(c, seed);
      }
}

TEST(groups) {
  uint64_t seed = 0;
  const int shapes[][5] = {{256, 8, 4, 2, 8},    {256, 8, 8, 1, 3}, {384, 1, 1, 2, 8},
                           {384, 6, 2, 3, 8},    {64, 16, 3, 4, 6}, {60, 5, 2, 12, 9},
                           {1024, 4, 1, 2, 32},  {7, 7, 3, 1, 3},   {900, 100, 40, 2, 9},
                           {1024, 1024, 9, 1, 9}};
  for (const auto& [experts, groups, topk_groups, group_score_topk, k] : shapes)
    for (int variant = 0; variant < 12; ++variant) {
      Case c;
      ++seed;
      c.tokens = (seed % 2 == 0 ? 1 : 65) + static_cast<int>(seed % 19);
      c.experts = experts;
      c.groups = groups;
      c.topk_groups = topk_groups;
      c.group_score_topk = group_score_topk;
      c.k = k;
      c.function = static_cast<kimi_score_function>(variant % 3);
      c.dtype = static_cast<kimi_dtype>(variant / 3 % 3);
      c.bias = variant % 2;
      c.valid = variant == 5;
      c.by_logits = variant > 8;
      compare(c, seed);
    }
}

TEST(no_tokens) {
  Case c;
  c.tokens = 0;
  c.experts = 384;
  c.k = 8;
  compare(c, 1);
}

TEST(one_launch_for_few_tokens) {
  struct Limit {
    int sm, tokens;
  };
  for (const Limit limit : {Limit{0, 64}, Limit{80, 16}})
    for (const int beyond : {0, 1}) {
      CHECK(set_max_sm(limit.sm).is_ok());
      Case c;
      c.tokens = limit.tokens + beyond;
      c.experts = 40;
      c.k = 4;
      c.valid = true;
      compare(c, 3);
    }
  CHECK(set_max_sm(0).is_ok());
}

// Estimates at the edge of what the instructions promise, each way.
template <int kExp2, int kReciprocal>
struct OffBy : CudaOps {
  static float exp2_estimate(float a) {
    const float e = static_cast<float>(std::exp2(double{a}) * (1 + kExp2 * 0x1p-22));
    return e < 0x1p-126f ? 0.0f : e;
  }
  static float reciprocal_estimate(float a) {
    const float r = static_cast<float>((1 + kReciprocal * 0x1p-22) / double{a});
    return r < 0x1p-126f ? 0.0f : r;
  }
};

template <class O>
void check_estimate(float z) {
  const float estimate = gate::sigmoid_estimate<O>(z), score = math::sigmoid<CudaOps>(z);
  for (const float bias : {0.0f, -0.7f, 0.3f, 5.0f, -1e4f}) {
    const double a = add_rn(estimate, bias), c = add_rn(score, bias);
    if (std::abs(a - c) > double{gate::kSigmoidError} * std::max(1.0, std::abs(a)))
      check::fail(__FILE__, __LINE__, "z = " + std::to_string(z));
  }
}

TEST(estimates_keep_their_bound) {
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 32749) {
    const float z = float_of(static_cast<uint32_t>(bits));
    if (z != z) continue;
    check_estimate<OffBy<1, 1>>(z);
    check_estimate<OffBy<1, -1>>(z);
    check_estimate<OffBy<-1, 1>>(z);
    check_estimate<OffBy<-1, -1>>(z);
    check_estimate<EstimateOps>(z);
  }
  CHECK(std::abs(gate::sigmoid_estimate<EstimateOps>(kInf) - 1.0f) <= 0x1p-22f);
  CHECK(gate::sigmoid_estimate<EstimateOps>(-kInf) < 1e-37f);
  CHECK(std::isnan(gate::sigmoid_estimate<EstimateOps>(kNaN)));
}

// The K-th choice is as small as its estimate allows, another's estimate as small as that choice
// allows: it still is a candidate, and the bound is hardly lower than it must be.
TEST(candidates_hold_the_best) {
  std::mt19937 random(11);
  for (const double error : {double{gate::kSigmoidError}, 0x1p-10, 0x1p-4})
    for (int i = 0; i < 20000; ++i) {
      const float tau = std::normal_distribution<float>(0.0f, i % 2 ? 0.5f : 40.0f)(random);
      const auto margin = [&](double x) { return error * std::max(1.0, std::abs(x)); };
      const double kth = tau - margin(tau);
      double low = kth - 4 * margin(tau), high = kth;  // low + its margin < kth <= high + its
      while (high - low > 1e-3 * margin(tau)) {
        const double middle = (low + high) / 2;
        (middle + margin(middle) < kth ? low : high) = middle;
      }
      const double bound = gate::candidates_from<CudaOps>(tau, static_cast<float>(error));
      CHECK(low >= bound);
      CHECK(bound >= tau - 2.6 * margin(tau));
    }
  CHECK(std::isnan(gate::candidates_from<CudaOps>(kInf, gate::kSigmoidError)));
  CHECK(std::isnan(gate::candidates_from<CudaOps>(kNaN, gate::kSigmoidError)));
}

TEST(more_tokens_than_the_grid_holds_at_once) {
  Case c;
  c.tokens = 500;  // the host runner holds 5 blocks of 8 warps
  c.experts = 64;
  c.k = 6;
  for (uint64_t seed : {0, 1, 2, 3}) compare(c, seed);
}

// Two Newton steps from an estimate within one ulp give 1/d for every d in [1, 2] but the one that
// math/functions.h defines.
TEST(reciprocal_from_an_estimate) {
  for (uint32_t bits = bits_of(1.0f); bits <= bits_of(2.0f); ++bits) {
    const float d = float_of(bits), want = 1.0f / d;
    if (d > 0x1.fffffcp0f && d < 2.0f) continue;
    for (uint32_t error : {~0u, 0u, 1u}) {
      float r = float_of(bits_of(want) + error);
      r = fma_rn(r, fma_rn(-d, r, 1.0f), r);
      r = fma_rn(r, fma_rn(-d, r, 1.0f), r);
      if (r != want) check::fail(__FILE__, __LINE__, "d = " + std::to_string(d));
    }
  }
}

}  // namespace

TEST_MAIN()
