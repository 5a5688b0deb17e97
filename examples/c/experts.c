/* SPDX-License-Identifier: MIT
 * The routed experts of one layer on a CPU: gate, plan, experts. The first token is computed again
 * by plain loops.
 */
#include <math.h>

#include "example.h"

enum { kTokens = 40, kHidden = 32, kWidth = 24, kExperts = 8, kTopK = 2 };

static double dot(const float* a, const float* b, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += (double)a[i] * b[i];
  return sum;
}

int main(void) {
  const float* x = numbers(kTokens * kHidden, 1);                       /* [T, H] */
  const float* router = numbers(kExperts * kHidden, 2);                 /* [E, H] */
  const float* w_gate_up = numbers(kExperts * 2 * kWidth * kHidden, 3); /* [E, 2F, H] */
  const float* w_down = numbers(kExperts * kHidden * kWidth, 4);        /* [E, H, F] */
  float logits[kTokens][kExperts], weights[kTokens][kTopK], y[kTokens][kHidden];
  int32_t indices[kTokens][kTopK], row_map[kTokens][kTopK], source[kTokens * kTopK];
  int32_t offsets[kExperts], tokens_per_expert[kExperts];
  for (int t = 0; t < kTokens; ++t)
    for (int e = 0; e < kExperts; ++e)
      logits[t][e] = (float)dot(x + t * kHidden, router + e * kHidden, kHidden);

  /* One call gates and plans: where each chosen token's row goes, grouped by expert. */
  kimi_gate_plan_params g = {0};
  g.gate.logits = logits;
  g.gate.logits_dtype = KIMI_FLOAT32;
  g.gate.logits_stride = g.gate.num_experts = kExperts;
  g.gate.num_tokens = kTokens;
  g.gate.top_k = kTopK;
  g.gate.num_groups = g.gate.topk_groups = 1;
  g.gate.renormalize = 1;
  g.gate.scaling_factor = 2.5f;
  g.gate.weights = &weights[0][0];
  g.gate.indices = &indices[0][0];
  g.gate.tokens_per_expert = tokens_per_expert;
  g.row_map = &row_map[0][0];
  g.source = source;
  g.offsets = offsets;
  g.workspace_bytes = kimi_gate_plan_workspace_bytes(&g, KIMI_DEVICE_CPU);
  g.workspace = memory(g.workspace_bytes);
  check(kimi_gate_plan(&g, KIMI_DEVICE_CPU, NULL));

  kimi_fused_experts_params p = {0};
  p.x = x;
  p.x_stride = p.hidden = kHidden;
  p.w_gate_up.data = w_gate_up;
  p.w_gate_up.expert_stride = 2 * kWidth * kHidden;
  p.w_gate_up.row_stride = kHidden;
  p.w_gate_up.column_stride = 1;
  p.w_down.data = w_down;
  p.w_down.expert_stride = kHidden * kWidth;
  p.w_down.row_stride = kWidth;
  p.w_down.column_stride = 1;
  p.weights = &weights[0][0];
  p.row_map = &row_map[0][0];
  p.source = source;
  p.offsets = offsets;
  p.y = y;
  p.num_tokens = kTokens;
  p.width = kWidth;
  p.num_experts = kExperts;
  p.top_k = kTopK;
  p.activation = KIMI_ACTIVATION_SILU;
  p.workspace_bytes = kimi_fused_experts_workspace_bytes(&p, KIMI_DEVICE_CPU);
  p.workspace = memory(p.workspace_bytes);
  check(kimi_fused_experts(&p, KIMI_DEVICE_CPU, NULL));

  double worst = 0;
  for (int i = 0; i < kHidden; ++i) {
    double sum = 0;
    for (int k = 0; k < kTopK; ++k) {
      const int e = indices[0][k];
      const float* both = w_gate_up + e * 2 * kWidth * kHidden;
      for (int f = 0; f < kWidth; ++f) {
        const double gate = dot(x, both + f * kHidden, kHidden);
        const double up = dot(x, both + (kWidth + f) * kHidden, kHidden);
        sum +=
            weights[0][k] * w_down[(e * kHidden + i) * kWidth + f] * gate / (1 + exp(-gate)) * up;
      }
    }
    worst = fmax(worst, fabs(sum - y[0][i]));
  }
  printf("%d tokens to %d of %d experts; the first differs from plain loops by %.1e\n", kTokens,
         kTopK, kExperts, worst);
  return worst < 1e-4 ? 0 : 1;
}
