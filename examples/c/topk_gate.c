/* SPDX-License-Identifier: MIT
 * The smallest use: a router's scores, its experts, and what a forgotten field is answered with.
 */
#include <kimi_ops.h>
#include <stdio.h>
#include <string.h>

int main(void) {
  const float logits[2][4] = {{0.0f, 2.0f, 1.0f, -1.0f}, {3.0f, 0.0f, 0.0f, 1.0f}};
  float weights[2][2];
  int32_t indices[2][2], tokens_per_expert[4];
  if (strcmp(kimi_version(), KIMI_OPS_VERSION) != 0) {
    fprintf(stderr, "headers %s, library %s\n", KIMI_OPS_VERSION, kimi_version());
    return 1;
  }

  kimi_topk_gate_params p = {0};
  p.logits = logits;
  p.logits_dtype = KIMI_FLOAT32;
  p.num_tokens = 2;
  p.num_experts = 4;
  p.top_k = 2;
  p.num_groups = p.topk_groups = 1;
  p.renormalize = 1;
  p.scaling_factor = 1.0f;
  p.weights = &weights[0][0];
  p.indices = &indices[0][0];
  p.tokens_per_expert = tokens_per_expert;
  if (kimi_topk_gate(&p, KIMI_DEVICE_CPU, NULL) != KIMI_INVALID_ARGUMENT) return 1;
  printf("refused: %s\n", kimi_last_error());
  p.logits_stride = 4;
  if (kimi_topk_gate(&p, KIMI_DEVICE_CPU, NULL) != KIMI_OK) {
    fprintf(stderr, "%s\n", kimi_last_error());
    return 1;
  }
  for (int t = 0; t < 2; ++t)
    printf("token %d: experts %d %d, weights %.4f %.4f\n", t, indices[t][0], indices[t][1],
           weights[t][0], weights[t][1]);
  const int32_t expected[2][2] = {{1, 2}, {0, 3}};
  return memcmp(indices, expected, sizeof indices) == 0 ? 0 : 1;
}
