// SPDX-License-Identifier: MIT
// QK-Clip through the C API. Small integers are exact in every dtype, so the maxima are compared
// bit for bit with a loop, on every instruction set and number of threads.
#include "engines.h"

using namespace kimi::test;

namespace {

struct Case {
  int64_t batch, heads, kv_heads, queries, keys, dim;
};

void test_maxima(const Case& c, kimi_dtype dtype, bool causal, bool with_nan) {
  // Rows of a head lie `heads` rows apart, as projections leave them.
  Tensor q(c.batch * c.queries * c.heads * c.dim, dtype);
  Tensor k(c.batch * c.keys * c.kv_heads * c.dim, dtype);
  Random random(5);
  for (int64_t i = 0; i < c.batch * c.queries * c.heads * c.dim; ++i) q.set(i, random.small());
  for (int64_t i = 0; i < c.batch * c.keys * c.kv_heads * c.dim; ++i) k.set(i, random.small());
  // A NaN in the last key: the causal maximum of one query a batch sees it.
  if (with_nan) k.set(((c.keys - 1) * c.kv_heads) * c.dim, std::nan(""));
  kimi_attention_max_logits_params p = {};
  p.q = q.data.get(), p.k = k.data.get();
  p.batch = c.batch, p.heads = c.heads, p.kv_heads = c.kv_heads;
  p.queries = c.queries, p.keys = c.keys, p.dim = c.dim;
  p.q_batch_stride = c.queries * c.heads * c.dim, p.q_head_stride = c.dim;
  p.q_row_stride = c.heads * c.dim, p.q_col_stride = 1;
  p.k_batch_stride = c.keys * c.kv_heads * c.dim, p.k_head_stride = c.dim;
  p.k_row_stride = c.kv_heads * c.dim, p.k_col_stride = 1;
  p.scale = 0.5f, p.causal = causal, p.dtype = dtype;
  const Workspace workspace(p, kimi_attention_max_logits_workspace_bytes);
  Tensor maxima(c.heads, KIMI_FLOAT32);
  p.max_logits = static_cast<float*>(maxima.at(0));
  bool ok = kimi_attention_max_logits(&p, KIMI_DEVICE_CPU, nullptr) == KIMI_OK;
  for (int64_t h = 0; h < c.heads; ++h) {
    double most = -INFINITY;
    const int64_t kv = h / (c.heads / c.kv_heads);
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t i = 0; i < c.queries; ++i)
        for (int64_t j = 0; j < (causal ? i + c.keys - c.queries + 1 : c.keys); ++j) {
          double sum = 0;
          for (int64_t d = 0; d < c.dim; ++d)
            sum += q.get(((b * c.queries + i) * c.heads + h) * c.dim + d) *
                   k.get(((b * c.keys + j) * c.kv_heads + kv) * c.dim + d);
          most = sum > most || sum != sum ? sum : most;
          if (sum != sum) i = c.queries, j = c.keys, b = c.batch;
        }
    const double got = maxima.get(h);
    ok = ok && (most != most ? got != got : got == 0.5 * most);
  }
  check(ok, "maxima: heads %d of %d, queries %d, keys %d, dim %d, dtype %d, causal %d, NaN %d",
        int(c.heads), int(c.kv_heads), int(c.queries), int(c.keys), int(c.dim), int(dtype), causal,
        with_nan);
}

void test_clip(kimi_dtype dtype) {
  constexpr int64_t kHeads = 3, kRows = 5, kCols = 37, kStride = 40, kFirst = 2;
  Tensor weight(kHeads * kRows * kStride, dtype), before(kHeads * kRows * kStride, dtype);
  Random random(6);
  for (int64_t i = 0; i < kHeads * kRows * kStride; ++i) {
    weight.set(i, random.unit());
    before.set(i, weight.get(i));
  }
  before.set(2 * kRows * kStride, std::nan(""));  // a head whose gamma is 1
  weight.set(2 * kRows * kStride, std::nan(""));
  const float maxima[kHeads] = {40.0f, 160.0f, -INFINITY};
  float gamma[kHeads] = {};
  const kimi_clip_layer layer = {kHeads, 1};
  kimi_clip_weight w = {};
  w.weight = weight.at(kFirst * kStride), w.first_row = kFirst, w.rows = kHeads * kRows - kFirst;
  w.cols = kCols, w.row_stride = kStride, w.blocks = kHeads, w.block_rows = kRows;
  w.shared = 3, w.whole = 1, w.power = 0.5f, w.dtype = dtype;
  kimi_clip_rows_params p = {};
  p.layers = &layer, p.weights = &w, p.max_logits = maxima, p.gamma = gamma;
  p.num_layers = p.num_weights = 1, p.tau = 10.0f;
  bool ok = kimi_clip_rows(&p, KIMI_DEVICE_CPU, nullptr) == KIMI_OK;
  ok = ok && gamma[0] == 0.25f && gamma[1] == 0.0625f && gamma[2] == 1.0f;
  for (int64_t i = kFirst * kStride; i < 2 * kRows * kStride; ++i) {
    const int64_t in = i / kStride % kRows, col = i % kStride;
    const float factor = gamma[i / (kRows * kStride)];
    if (in < 4 && col < kCols)
      before.set(i, double(float(before.get(i)) * (in < 3 ? std::sqrt(factor) : factor)));
  }
  check(ok && weight.same_bits(before), "clip_rows, dtype %d", int(dtype));
  w.rows = kHeads * kRows;
  check(kimi_clip_rows(&p, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT, "rows past a head");
}

}  // namespace

int main() {
  each_engine([] {
    for (kimi_dtype dtype : {KIMI_FLOAT32, KIMI_BFLOAT16, KIMI_FLOAT16}) {
      for (bool causal : {false, true})
        for (bool with_nan : {false, true})
          for (const Case& c :
               {Case{1, 1, 1, 1, 1, 1}, Case{2, 4, 2, 33, 33, 5}, Case{1, 2, 1, 40, 170, 24},
                Case{1, 1, 1, 520, 520, 1}, Case{1, 1, 1, 3, 5, 530}})
            test_maxima(c, dtype, causal, with_nan);
      test_clip(dtype);
    }
  });
  return report("qk_clip");
}
