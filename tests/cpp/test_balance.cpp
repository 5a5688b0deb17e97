// SPDX-License-Identifier: MIT
// The losses through the C API: every instruction set and number of threads gives the portable
// engine's bits, in buffers of exactly the bytes that the API asks for (AddressSanitizer watches).
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "engines.h"
#include "kimi_ops.h"

namespace {

struct Case {
  int sequences, length, experts, k;
  kimi_dtype dtype;
  kimi_score_function function;
};

using Bytes = std::vector<unsigned char>;

constexpr int kBins = 50;

struct Results {
  float balance = 0, z = 0;
  std::vector<int32_t> counts, histogram;
  std::vector<float> log_sum_exp;
  Bytes balance_gradient, z_gradient;
  bool operator==(const Results& o) const {
    return std::memcmp(&balance, &o.balance, 4) == 0 && std::memcmp(&z, &o.z, 4) == 0 &&
           counts == o.counts && histogram == o.histogram && log_sum_exp == o.log_sum_exp &&
           balance_gradient == o.balance_gradient && z_gradient == o.z_gradient;
  }
};

// Finite values of either sign: fp32 in quarters, or 16-bit patterns around 0.01 to 2.
Bytes make_logits(const Case& c) {
  const size_t n = size_t(c.sequences) * c.length * c.experts;
  const bool wide = c.dtype == KIMI_FLOAT32;
  Bytes bytes(n * (wide ? 4 : 2));
  for (size_t i = 0; i < n; ++i) {
    const uint32_t random = uint32_t(i) * 2654435761u >> 12;
    const float x = float(random % 64) / 4 - 8;
    const uint16_t half = uint16_t(0x3000 + random % 0x1000 + (random & 0x1000 ? 0x8000 : 0));
    if (wide)
      std::memcpy(&bytes[4 * i], &x, 4);
    else
      std::memcpy(&bytes[2 * i], &half, 2);
  }
  return bytes;
}

template <class Params>
void describe(const Case& c, const Bytes& logits, Params& p) {
  p.logits = logits.data();
  p.num_tokens = c.sequences * c.length;
  p.logits_stride = p.num_experts = c.experts;
  p.coefficient = 0.5f;
  p.logits_dtype = c.dtype;
}

template <class Params>
void describe_sequences(const Case& c, Params& p) {
  p.num_sequences = c.sequences;
  p.top_k = c.k;
  p.score_function = c.function;
}

bool run(const Case& c, Results& r) {
  const Bytes logits = make_logits(c);
  const size_t tokens = size_t(c.sequences) * c.length;
  std::vector<int32_t> indices(tokens * c.k);
  for (size_t i = 0; i < indices.size(); ++i)
    indices[i] = int32_t(i * 2654435761u % (c.experts + 1)) - 1;
  r.counts.assign(size_t(c.sequences) * c.experts, -7);
  std::vector<int32_t> lengths(c.sequences, -7);
  r.log_sum_exp.assign(tokens, -7.0f);
  r.balance_gradient.assign(logits.size(), 7);
  r.z_gradient.assign(logits.size(), 7);
  const float grad = 3.0f;
  int32_t valid_tokens = 0;

  kimi_sequence_counts_params counts = {};
  counts.indices = indices.data();
  counts.tokens_per_expert = r.counts.data();
  counts.sequence_tokens = lengths.data();
  counts.num_tokens = int64_t(tokens);
  counts.num_sequences = c.sequences;
  counts.num_experts = c.experts;
  counts.top_k = c.k;

  kimi_sequence_balance_loss_params loss = {};
  describe(c, logits, loss);
  describe_sequences(c, loss);
  const kimi::test::Workspace workspace(loss, kimi_sequence_balance_loss_workspace_bytes);
  loss.loss = &r.balance;
  loss.tokens_per_expert = r.counts.data();
  loss.sequence_tokens = lengths.data();
  kimi_sequence_balance_loss_backward_params backward = {};
  describe(c, logits, backward);
  describe_sequences(c, backward);
  backward.grad_loss = &grad;
  backward.tokens_per_expert = r.counts.data();
  backward.sequence_tokens = lengths.data();
  backward.grad_logits = r.balance_gradient.data();

  kimi_z_loss_params z = {};
  describe(c, logits, z);
  const kimi::test::Workspace z_workspace(z, kimi_z_loss_workspace_bytes);
  z.loss = &r.z;
  z.log_sum_exp = r.log_sum_exp.data();
  z.valid_tokens = &valid_tokens;
  kimi_z_loss_backward_params z_backward = {};
  describe(c, logits, z_backward);
  z_backward.grad_loss = &grad;
  z_backward.log_sum_exp = r.log_sum_exp.data();
  z_backward.valid_tokens = &valid_tokens;
  z_backward.grad_logits = r.z_gradient.data();

  std::vector<float> cutoffs(tokens, 0.5f);
  const float bounds[] = {-1.0f, 1.0f};
  r.histogram.assign(size_t(c.experts) * kBins, 0);
  kimi_quantile_histogram_params quantile = {};
  quantile.logits = logits.data();
  quantile.cutoffs = cutoffs.data();
  quantile.bounds = bounds;
  quantile.histogram = r.histogram.data();
  quantile.num_tokens = int64_t(tokens);
  quantile.logits_stride = quantile.num_experts = c.experts;
  quantile.num_bins = kBins;
  quantile.logits_dtype = c.dtype;
  quantile.score_function = c.function;

  return kimi_sequence_counts(&counts, KIMI_DEVICE_CPU, nullptr) == KIMI_OK &&
         kimi_quantile_histogram(&quantile, KIMI_DEVICE_CPU, nullptr) == KIMI_OK &&
         kimi_sequence_balance_loss(&loss, KIMI_DEVICE_CPU, nullptr) == KIMI_OK &&
         kimi_sequence_balance_loss_backward(&backward, KIMI_DEVICE_CPU, nullptr) == KIMI_OK &&
         kimi_z_loss(&z, KIMI_DEVICE_CPU, nullptr) == KIMI_OK &&
         kimi_z_loss_backward(&z_backward, KIMI_DEVICE_CPU, nullptr) == KIMI_OK &&
         valid_tokens == int32_t(tokens);
}

}  // namespace

int main() {
  int failures = 0, runs = 0;
  for (int experts : {1, 7, 16, 33, 384, 1000, 1024})
    for (int length : {1, 5, 64, 131})
      for (int dtype : {0, 1, 2})
        for (int function : {0, 1, 2}) {
          const Case c{
              1 + length % 3, length, experts, 3, kimi_dtype(dtype), kimi_score_function(function)};
          Results want;
          bool fine = kimi_set_isa(KIMI_ISA_PORTABLE) == KIMI_OK && run(c, want);
          for (int isa = KIMI_ISA_PORTABLE; isa <= kimi_detected_isa(); ++isa)
            for (int threads : {1, 3}) {
              Results got;
              fine &= kimi_set_isa(kimi_isa(isa)) == KIMI_OK &&
                      kimi_set_num_threads(threads) == KIMI_OK && run(c, got) && got == want;
              ++runs;
              if (fine) continue;
              std::fprintf(stderr, "S %d E %d dtype %d function %d isa %s threads %d: %s\n",
                           c.length, c.experts, dtype, function, kimi_isa_name(kimi_isa(isa)),
                           threads, kimi_last_error());
              ++failures;
              fine = true;
            }
        }
  std::printf("balance: %d runs, %d failed\n", runs, failures);
  return failures == 0 ? 0 : 1;
}
