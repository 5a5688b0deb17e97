/* SPDX-License-Identifier: MIT
 * A step of MuonClip on a CPU: momentum, Newton-Schulz, the update; then the query rows of a head
 * whose attention logits are too large are scaled down.
 */
#include <math.h>

#include "example.h"

enum { kRows = 16, kCols = 48, kSteps = 5, kHeads = 2, kDim = kRows / kHeads, kQueries = 10 };

/* grad [m, n] -> weight, momentum changed in place. */
static void step(float* weight, const float* grad, float* momentum, double lr, double decay) {
  const int64_t size = kRows * kCols, shape[4] = {kRows, kCols, kCols, kCols};
  float* update = (float*)memory(size * sizeof(float));
  const void* grads[] = {grad};
  void *buffers[] = {momentum}, *weights[] = {weight};
  float* updates[] = {update};

  kimi_muon_momentum_params m = {0};
  m.grads = grads;
  m.buffers = buffers;
  m.updates = updates;
  m.sizes = &size;
  m.count = 1;
  m.momentum = 0.95;
  m.nesterov = 1;
  check(kimi_muon_momentum(&m, KIMI_DEVICE_CPU, NULL));

  float coefficients[kSteps][3];
  for (int i = 0; i < kSteps; ++i) {
    coefficients[i][0] = 3.4445f;
    coefficients[i][1] = -4.7750f;
    coefficients[i][2] = 2.0315f;
  }
  const void* in[] = {update};
  void* out[] = {update};
  kimi_newton_schulz_params n = {0};
  n.g = in;
  n.x = out;
  n.coefficients = &coefficients[0][0];
  n.num_matrices = 1;
  n.rows = kRows;
  n.cols = n.g_row_stride = n.x_row_stride = kCols;
  n.g_col_stride = n.x_col_stride = 1;
  n.steps = kSteps;
  n.eps = 1e-7f;
  n.method = KIMI_NEWTON_SCHULZ_SYMMETRIC;
  n.workspace_bytes = kimi_newton_schulz_workspace_bytes(&n, KIMI_DEVICE_CPU);
  n.workspace = memory(n.workspace_bytes);
  check(kimi_newton_schulz(&n, KIMI_DEVICE_CPU, NULL));

  const double rate = lr * 0.2 * sqrt(kCols); /* the root mean square of an AdamW step */
  kimi_muon_update_params u = {0};
  u.params = weights;
  u.directions = in;
  u.shapes = shape;
  u.rates = &rate;
  u.count = 1;
  u.decay = lr * decay;
  check(kimi_muon_update(&u, KIMI_DEVICE_CPU, NULL));
}

/* The largest logit of each head: queries weight x, the keys given. */
static void largest_logits(const float* weight, const float* x, const float* keys, float* most) {
  float q[kHeads][kQueries][kDim];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kQueries; ++t) {
      double sum = 0;
      for (int c = 0; c < kCols; ++c) sum += weight[r * kCols + c] * x[t * kCols + c];
      q[r / kDim][t][r % kDim] = (float)sum;
    }
  kimi_attention_max_logits_params p = {0};
  p.q = q;
  p.k = keys;
  p.max_logits = most;
  p.batch = 1;
  p.heads = p.kv_heads = kHeads;
  p.queries = p.keys = kQueries;
  p.dim = p.q_row_stride = p.k_row_stride = kDim;
  p.q_head_stride = p.k_head_stride = kQueries * kDim;
  p.q_col_stride = p.k_col_stride = 1;
  p.scale = 1.0f / sqrtf(kDim);
  p.workspace_bytes = kimi_attention_max_logits_workspace_bytes(&p, KIMI_DEVICE_CPU);
  p.workspace = memory(p.workspace_bytes);
  check(kimi_attention_max_logits(&p, KIMI_DEVICE_CPU, NULL));
}

int main(void) {
  float *weight = numbers(kRows * kCols, 1), *grad = numbers(kRows * kCols, 2);
  const float *x = numbers(kQueries * kCols, 3), *keys = numbers(kHeads * kQueries * kDim, 4);
  float* momentum = (float*)memory(kRows * kCols * sizeof(float));
  float before[kHeads], after[kHeads], gamma[kHeads];
  const float first = weight[0];
  step(weight, grad, momentum, 0.02, 0.1);
  printf("weight[0] %.4f -> %.4f\n", first, weight[0]);

  largest_logits(weight, x, keys, before);
  const kimi_clip_layer layer = {kHeads, 1};
  kimi_clip_weight w = {0}; /* here the keys are fixed, so the queries take gamma alone */
  w.weight = weight;
  w.rows = kRows;
  w.cols = w.row_stride = kCols;
  w.blocks = kHeads;
  w.block_rows = w.whole = kDim;
  w.power = 0.5f;
  kimi_clip_rows_params clip = {0};
  clip.layers = &layer;
  clip.weights = &w;
  clip.max_logits = before;
  clip.gamma = gamma;
  clip.num_layers = clip.num_weights = 1;
  clip.tau = 0.5f * fmaxf(before[0], before[1]);
  check(kimi_clip_rows(&clip, KIMI_DEVICE_CPU, NULL));
  largest_logits(weight, x, keys, after);
  for (int h = 0; h < kHeads; ++h)
    printf("head %d: largest logit %.3f -> %.3f, tau %.3f\n", h, before[h], after[h], clip.tau);
  const float most = fmaxf(after[0], after[1]);
  return weight[0] != first && fabsf(most - clip.tau) < 1e-4f * clip.tau ? 0 : 1;
}
