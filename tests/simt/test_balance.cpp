// SPDX-License-Identifier: MIT
//
// The losses' CUDA kernels and the bias rule's, run on the host, against the portable CPU engine
// with the sums over runs written out again: bit for bit.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "balance/balance.h"
#include "check.h"
#include "common/dtype.h"
#include "simt.h"

namespace {

using namespace kimi;
using balance::kPortableEngine;
using balance::kRun;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Case {
  int sequences = 1, length = 1, experts = 1, k = 1;
  kimi_dtype dtype = KIMI_FLOAT32;
  kimi_score_function function = KIMI_SCORE_SIGMOID;
  bool valid = false, offsets = false;
  int gap = 0;  // logits_stride - E

  int tokens() const { return sequences * length; }
  std::string text() const {
    return "N " + std::to_string(sequences) + " S " + std::to_string(length) + " E " +
           std::to_string(experts) + " K " + std::to_string(k) + " dtype " + std::to_string(dtype) +
           " function " + std::to_string(function) + (valid ? " valid" : "") +
           (offsets ? " offsets" : "") + " seed " + std::to_string(simt::settings().seed);
  }
};

void require(bool condition, const Case& c, const char* what) {
  if (!condition) check::fail(__FILE__, __LINE__, std::string(what) + " differ: " + c.text());
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
bool same_bits(float a, float b) { return bits_of(a) == bits_of(b); }

// Continuous, small, saturated, or full of infinities and NaN: row by row. The gap is NaN.
template <class T>
std::vector<T> make_logits(const Case& c, std::mt19937& random) {
  const int stride = c.experts + c.gap;
  std::vector<T> logits(static_cast<size_t>(c.tokens()) * stride, from_float<T>(kNaN));
  std::normal_distribution<float> normal(0.0f, 3.0f);
  for (int t = 0; t < c.tokens(); ++t) {
    const int kind = static_cast<int>(random() % 8);
    for (int e = 0; e < c.experts; ++e) {
      const float x = normal(random), special[] = {kNaN, -kInf, 0.0f, -0.0f, x, -100.0f};
      const float z = kind == 0   ? 15.0f * x
                      : kind == 1 ? x * 1e-6f
                      : kind == 2 ? special[e == 0 ? 4 : random() % 6]
                                  : x;
      logits[static_cast<size_t>(t) * stride + e] = from_float<T>(z);
    }
  }
  return logits;
}

template <class Params, class T>
void describe(const Case& c, const std::vector<T>& logits, Params& p) {
  p.logits = logits.data();
  p.num_tokens = c.tokens();
  p.logits_stride = c.experts + c.gap;
  p.num_experts = c.experts;
  p.coefficient = 0.37f;
  p.logits_dtype = c.dtype;
}

template <class T>
void compare_balance_loss(const Case& c, std::mt19937& random) {
  const std::vector<T> logits = make_logits<T>(c, random);
  std::vector<int32_t> indices(static_cast<size_t>(c.tokens()) * c.k);
  for (int32_t& id : indices) id = static_cast<int32_t>(random() % (c.experts + 2)) - 1;
  std::vector<uint8_t> valid(c.tokens());
  for (uint8_t& v : valid) v = random() % 4 != 0;
  std::vector<int32_t> ends(c.sequences);  // some sequences are empty, some tokens are in none
  for (int32_t& end : ends) end = static_cast<int32_t>(random() % (c.tokens() + 1));
  std::sort(ends.begin(), ends.end());

  std::vector<int32_t> want_counts(static_cast<size_t>(c.sequences) * c.experts);
  std::vector<int32_t> want_tokens(c.sequences);
  for (int t = 0; t < c.tokens(); ++t) {
    int n = c.offsets ? 0 : t / c.length;
    while (c.offsets && n < c.sequences && ends[n] <= t) ++n;
    if (n == c.sequences || (c.valid && !valid[t])) continue;
    ++want_tokens[n];
    for (int i = t * c.k; i < (t + 1) * c.k; ++i)
      if (indices[i] >= 0 && indices[i] < c.experts) ++want_counts[n * c.experts + indices[i]];
  }
  std::vector<int32_t> counts(want_counts.size(), -7), tokens(c.sequences, -7);
  SequenceCountsParams n{};
  n.indices = indices.data();
  n.tokens_per_expert = counts.data();
  n.sequence_tokens = tokens.data();
  n.num_tokens = c.tokens();
  n.num_experts = c.experts;
  n.top_k = c.k;
  const auto sequences = [&](auto& params) {
    params.offsets = c.offsets ? ends.data() : nullptr;
    params.valid = c.valid ? valid.data() : nullptr;
    params.num_sequences = c.sequences;
  };
  sequences(n);
  CHECK(sequence_counts_cuda(n, nullptr).is_ok());
  require(counts == want_counts, c, "counts");
  require(tokens == want_tokens, c, "tokens");

  const auto describe_loss = [&](auto& params) {
    describe(c, logits, params);
    sequences(params);
    params.tokens_per_expert = counts.data();
    params.sequence_tokens = tokens.data();
    params.top_k = c.k;
    params.score_function = c.function;
  };
  SequenceBalanceLossParams p{};
  describe_loss(p);
  float want = 0.0f, loss = -7.0f;
  for (int begin = 0; begin < c.tokens(); begin += kRun)
    want += kPortableEngine.sum_terms(p, begin, std::min(begin + kRun, c.tokens()));
  want *= balance::loss_scale(p);
  std::vector<char> workspace(balance::workspace_bytes(c.tokens()));  // ASan holds its end
  p.loss = &loss;
  p.workspace = workspace.data();
  CHECK(sequence_balance_loss_cuda(p, nullptr).is_ok());
  require(same_bits(loss, want), c, "balance losses");
  if (c.tokens() == 0) return;

  const float grad_loss = 1234.5f;
  SequenceBalanceLossBackwardParams b{};
  describe_loss(b);
  b.grad_loss = &grad_loss;
  std::vector<T> gradients[2];
  for (std::vector<T>& gradient : gradients) {
    gradient.assign(static_cast<size_t>(c.tokens()) * c.experts, from_float<T>(-7.0f));
    b.grad_logits = gradient.data();
    if (&gradient == gradients)
      kPortableEngine.balance_gradient(b, 0, c.tokens());
    else
      CHECK(sequence_balance_loss_backward_cuda(b, nullptr).is_ok());
  }
  require(same_bits(gradients[0], gradients[1]), c, "gradients of the balance loss");
}

template <class T>
void compare_histogram(const Case& c, std::mt19937& random) {
  const std::vector<T> logits = make_logits<T>(c, random);
  std::vector<float> cutoffs(c.tokens());
  for (float& cutoff : cutoffs) cutoff = std::normal_distribution<float>(0.5f, 0.5f)(random);
  std::vector<uint8_t> valid(c.tokens());
  for (uint8_t& v : valid) v = random() % 3 != 0;
  const float bounds[] = {-0.5f, 0.75f};
  QuantileHistogramParams p{};
  p.logits = logits.data();
  p.cutoffs = cutoffs.data();
  p.bounds = bounds;
  p.valid = c.valid ? valid.data() : nullptr;
  p.num_tokens = c.tokens();
  p.logits_stride = c.experts + c.gap;
  p.num_experts = c.experts;
  p.num_bins = 1 + static_cast<int>(random() % 40);
  p.logits_dtype = c.dtype;
  p.score_function = c.function;
  std::vector<int32_t> want(static_cast<size_t>(c.experts) * p.num_bins, 3), got = want;
  std::vector<float> s(c.experts + 16);
  const float per_unit = static_cast<float>(p.num_bins) / (bounds[1] - bounds[0]);
  for (int t = 0; t < c.tokens(); ++t) {
    if (c.valid && !valid[t]) continue;
    kPortableEngine.scores(p, t, s.data());
    for (int e = 0; e < c.experts; ++e) {
      const float bin = std::floor((cutoffs[t] - s[e] - bounds[0]) * per_unit);
      const int last = p.num_bins - 1;
      ++want[e * p.num_bins + (bin > 0.0f ? std::min(last, static_cast<int>(bin)) : 0)];
    }
  }
  p.histogram = got.data();
  CHECK(quantile_histogram_cuda(p, nullptr).is_ok());
  require(got == want, c, "histograms");
}

template <class T>
void compare_z_loss(const Case& c, std::mt19937& random) {
  const std::vector<T> logits = make_logits<T>(c, random);
  std::vector<uint8_t> valid(c.tokens());
  for (uint8_t& v : valid) v = random() % 3 != 0;
  ZLossParams p{};
  describe(c, logits, p);
  p.valid = c.valid ? valid.data() : nullptr;
  std::vector<float> want_lse(c.tokens(), -7.0f), lse(c.tokens(), -7.0f);
  p.log_sum_exp = want_lse.data();
  float sum = 0.0f;
  for (int t = 0; t < c.tokens(); t += kRun)
    sum += kPortableEngine.sum_squares(p, t, std::min(t + kRun, c.tokens()));
  int32_t want_valid = 0;
  for (uint8_t v : valid) want_valid += v || !c.valid;

  float loss = -7.0f;
  int32_t valid_tokens = -7;
  std::vector<char> workspace(balance::workspace_bytes(c.tokens()));
  p.loss = &loss;
  p.log_sum_exp = lse.data();
  p.valid_tokens = &valid_tokens;
  p.workspace = workspace.data();
  CHECK(z_loss_cuda(p, nullptr).is_ok());
  require(valid_tokens == want_valid, c, "valid tokens");
  require(same_bits(lse, want_lse), c, "log-sum-exps");
  require(same_bits(loss, balance::z_scale(p.coefficient, want_valid) * sum), c, "z losses");
  if (c.tokens() == 0) return;

  const float grad_loss = 1234.5f;
  ZLossBackwardParams b{};
  describe(c, logits, b);
  b.grad_loss = &grad_loss;
  b.log_sum_exp = lse.data();
  b.valid_tokens = &valid_tokens;
  std::vector<T> gradients[2];
  for (std::vector<T>& gradient : gradients) {
    gradient.assign(static_cast<size_t>(c.tokens()) * c.experts, from_float<T>(-7.0f));
    b.grad_logits = gradient.data();
    if (&gradient == gradients)
      kPortableEngine.z_gradient(b, 0, c.tokens());
    else
      CHECK(z_loss_backward_cuda(b, nullptr).is_ok());
  }
  require(same_bits(gradients[0], gradients[1]), c, "gradients of the z loss");
}

void compare(const Case& c, uint64_t seed) {
  simt::settings().seed = seed;
  std::mt19937 random(static_cast<unsigned>(seed * 7919 + 13));
  dispatch(c.dtype, [&]<class T>() {
    compare_balance_loss<T>(c, random);
    compare_z_loss<T>(c, random);
    if (c.tokens() > 0) compare_histogram<T>(c, random);
  });
}

TEST(all_sizes_and_score_functions) {
  uint64_t seed = 0;
  for (int experts : {1, 2, 31, 32, 33, 255, 256, 257, 384, 500, 896, 1024})
    for (int length : {1, 7, 8, 9, 63, 64, 65, 130})
      for (int function : {0, 1, 2}) {
        Case c;
        c.sequences = 1 + static_cast<int>(++seed % 3);
        c.length = length;
        c.experts = experts;
        if (c.tokens() * experts > 40'000) continue;
        c.k = 1 + static_cast<int>(seed % 8);
        c.function = static_cast<kimi_score_function>(function);
        c.dtype = static_cast<kimi_dtype>(seed / 3 % 3);
        c.valid = seed % 2;
        c.offsets = seed % 5 < 2;
        c.gap = static_cast<int>(seed % 4);
        compare(c, seed);
      }
}

TEST(many_short_sequences) {
  Case c;
  c.sequences = 100;  // more than a warp adds at once
  c.length = 3;
  c.experts = 20;
  c.k = 4;
  for (uint64_t seed : {0, 1, 2, 3}) {
    c.offsets = seed % 2;
    c.valid = seed > 1;
    compare(c, seed);
  }
}

TEST(more_runs_than_a_block_fetches_at_once) {
  Case c;
  c.length = kRun * 256 + 1;
  c.experts = 2;
  std::mt19937 random(1);
  compare_z_loss<float>(c, random);
}

TEST(no_tokens) {
  Case c;
  c.sequences = 3;
  c.length = 0;
  c.experts = 384;
  c.k = 8;
  compare(c, 1);
}

template <class Count>
void compare_bias_rule(int experts, bool centered, uint64_t seed) {
  simt::settings().seed = seed;
  std::mt19937 random(static_cast<unsigned>(seed));
  std::vector<Count> counts(experts);
  int64_t total = 0, drift = 0;
  for (Count& n : counts) total += n = static_cast<Count>(random() % 7);
  std::vector<float> bias(experts, 0.25f), want(experts);
  std::vector<int> direction(experts);
  for (int e = 0; e < experts; ++e) {
    const int64_t share = int64_t{experts} * counts[e];
    drift += direction[e] = total > share ? 1 : total < share ? -1 : 0;
  }
  const float mean = centered ? static_cast<float>(drift) / static_cast<float>(experts) : 0.0f;
  for (int e = 0; e < experts; ++e)
    want[e] = 0.25f + 0.001f * (static_cast<float>(direction[e]) - mean);
  UpdateExpertBiasParams p{};
  p.bias = bias.data();
  p.tokens_per_expert = counts.data();
  p.num_experts = experts;
  p.rate = 0.001f;
  p.counts_are_int64 = sizeof(Count) == 8;
  p.centered = centered;
  CHECK(update_expert_bias_cuda(p, nullptr).is_ok());
  CHECK(same_bits(bias, want));
}

TEST(bias_rule) {
  uint64_t seed = 0;
  for (int experts : {0, 1, 31, 32, 33, 384, 1500})
    for (bool centered : {false, true}) {
      compare_bias_rule<int32_t>(experts, centered, ++seed);
      compare_bias_rule<int64_t>(experts, centered, ++seed);
    }
}

}  // namespace

TEST_MAIN()
