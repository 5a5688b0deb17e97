// SPDX-License-Identifier: MIT
// What the tests of the C API share: expectations with the last error, and a gate's arguments.
#pragma once

#include <cstdio>
#include <cstring>
#include <vector>

#include "engines.h"
#include "kimi_ops.h"

namespace kimi::test {

inline void expect(bool ok, const char* what, int line) {
  if (ok) return;
  std::fprintf(stderr, "line %d: %s (last error: %s)\n", line, what, kimi_last_error());
  ++failures;
}
#define EXPECT(condition) ::kimi::test::expect((condition), #condition, __LINE__)

inline bool error_has(const char* text) { return std::strstr(kimi_last_error(), text) != nullptr; }

struct Gate {
  static constexpr int kTokens = 300, kExperts = 96, kK = 8;
  std::vector<float> logits = std::vector<float>(kTokens * kExperts);
  std::vector<float> weights = std::vector<float>(kTokens * kK);
  std::vector<int32_t> indices = std::vector<int32_t>(kTokens * kK), counts{};
  kimi_topk_gate_params p = {};

  explicit Gate(size_t seed = 0) : counts(kExperts) {
    for (size_t i = 0; i < logits.size(); ++i)
      logits[i] = float((i + seed * 977) * 2654435761u % 1000) / 250 - 2;
    p.logits = logits.data();
    p.weights = weights.data();
    p.indices = indices.data();
    p.tokens_per_expert = counts.data();
    p.num_tokens = kTokens;
    p.logits_stride = p.num_experts = kExperts;
    p.top_k = kK;
    p.num_groups = p.topk_groups = p.renormalize = 1;
    p.scaling_factor = 1.0f;
  }
  kimi_status run(kimi_device device = KIMI_DEVICE_CPU) {
    return kimi_topk_gate(&p, device, nullptr);
  }
};

}  // namespace kimi::test
