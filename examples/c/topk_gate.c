/* SPDX-License-Identifier: MIT
 * The gate from C: cc topk_gate.c -I<package>/include -L<package> -lkimi_ops
 * (python -c "import kimi_ops, os; print(os.path.dirname(kimi_ops.__file__))" prints <package>).
 */
#include <stdio.h>

#include "kimi_ops.h"

int main(void) {
  const float logits[2][4] = {{0.0f, 2.0f, 1.0f, -1.0f}, {3.0f, 0.0f, 0.0f, 1.0f}};
  float weights[2][2];
  int32_t indices[2][2], tokens_per_expert[4];

  kimi_topk_gate_params p = {0};
  p.logits = logits;
  p.logits_dtype = KIMI_FLOAT32;
  p.logits_stride = 4;
  p.num_tokens = 2;
  p.num_experts = 4;
  p.top_k = 2;
  p.num_groups = p.topk_groups = 1;
  p.renormalize = 1;
  p.scaling_factor = 1.0f;
  p.weights = &weights[0][0];
  p.indices = &indices[0][0];
  p.tokens_per_expert = tokens_per_expert;
  if (kimi_topk_gate(&p, KIMI_DEVICE_CPU, NULL) != KIMI_OK) {
    fprintf(stderr, "%s\n", kimi_last_error());
    return 1;
  }
  for (int t = 0; t < 2; ++t)
    printf("token %d: experts %d %d, weights %.4f %.4f\n", t, indices[t][0], indices[t][1],
           weights[t][0], weights[t][1]);
  return indices[0][0] == 1 && indices[0][1] == 2 && indices[1][0] == 0 && indices[1][1] == 3 ? 0
                                                                                              : 1;
}
