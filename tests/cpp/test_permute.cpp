// SPDX-License-Identifier: MIT
// The permutation through the C API: every instruction set and number of threads gives the portable
// engine's bits, in buffers of exactly the bytes that the API asks for (AddressSanitizer watches).
#include <cstdio>
#include <cstring>
#include <vector>

#include "engines.h"
#include "kimi_ops.h"

namespace {

using Bytes = std::vector<unsigned char>;

struct Case {
  int tokens, k, experts, align, hidden;
  kimi_dtype dtype;
};

struct Results {
  std::vector<int32_t> row_map, source, offsets, counts;
  Bytes rows, tokens, grad_rows, sorted;
  std::vector<float> grad_weights;
  bool operator==(const Results&) const = default;
};

// Finite: fp32 in quarters, 16-bit patterns around 0.01 to 2.
Bytes values(size_t n, kimi_dtype dtype, uint32_t seed) {
  Bytes bytes(n * (dtype == KIMI_FLOAT32 ? 4 : 2));
  for (size_t i = 0; i < n; ++i) {
    const uint32_t random = (uint32_t(i) + seed) * 2654435761u >> 12;
    const float x = float(random % 64) / 4 - 8;
    const uint16_t half = uint16_t(0x3000 + random % 0x1000 + (random & 0x1000 ? 0x8000 : 0));
    if (dtype == KIMI_FLOAT32)
      std::memcpy(&bytes[4 * i], &x, 4);
    else
      std::memcpy(&bytes[2 * i], &half, 2);
  }
  return bytes;
}

bool run(const Case& c, Results& r) {
  const int pairs = c.tokens * c.k, rows = pairs + c.experts * (c.align - 1);
  const int bytes = c.hidden * (c.dtype == KIMI_FLOAT32 ? 4 : 2);
  std::vector<int32_t> ids(pairs);
  for (int i = 0; i < pairs; ++i) ids[i] = int(uint32_t(i) * 40503u % (c.experts + 2)) - 1;
  r.row_map.resize(pairs);
  r.source.resize(rows);
  r.offsets.resize(c.experts);
  r.counts.resize(c.experts);
  kimi_permute_plan_params plan = {};
  plan.num_tokens = c.tokens, plan.top_k = c.k, plan.num_experts = c.experts, plan.align = c.align;
  const kimi::test::Workspace workspace(plan, kimi_permute_plan_workspace_bytes);
  plan.indices = ids.data(), plan.row_map = r.row_map.data(), plan.source = r.source.data();
  plan.offsets = r.offsets.data(), plan.tokens_per_expert = r.counts.data();
  if (kimi_permute_plan(&plan, KIMI_DEVICE_CPU, nullptr) != KIMI_OK) return false;

  const Bytes x = values(size_t(c.tokens) * c.hidden, c.dtype, 1);
  r.rows.resize(size_t(rows) * bytes);
  kimi_permute_params copy = {};
  copy.x = x.data(), copy.row_map = r.row_map.data(), copy.source = r.source.data();
  copy.y = r.rows.data(), copy.num_tokens = c.tokens, copy.num_rows = rows;
  copy.row_bytes = copy.x_stride_bytes = bytes, copy.top_k = c.k;
  if (kimi_permute(&copy, KIMI_DEVICE_CPU, nullptr) != KIMI_OK) return false;

  std::vector<float> weights(pairs);
  for (int i = 0; i < pairs; ++i) weights[i] = 0.1f * float(i % 7) - 0.2f;
  r.tokens.resize(x.size());
  kimi_unpermute_params sum = {};
  sum.y = r.rows.data(), sum.row_map = r.row_map.data(), sum.weights = weights.data();
  sum.x = r.tokens.data(), sum.num_tokens = c.tokens, sum.hidden = sum.y_stride = c.hidden;
  sum.top_k = c.k, sum.dtype = c.dtype;
  if (kimi_unpermute(&sum, KIMI_DEVICE_CPU, nullptr) != KIMI_OK) return false;

  const Bytes grad = values(size_t(c.tokens) * c.hidden, c.dtype, 99);
  r.grad_rows.resize(r.rows.size());
  r.grad_weights.resize(pairs);
  kimi_unpermute_backward_params back = {};
  back.grad_x = grad.data(), back.y = r.rows.data(), back.row_map = r.row_map.data();
  back.source = r.source.data(), back.weights = weights.data(), back.grad_y = r.grad_rows.data();
  back.grad_weights = r.grad_weights.data(), back.num_tokens = c.tokens, back.num_rows = rows;
  back.hidden = back.grad_x_stride = back.y_stride = c.hidden, back.top_k = c.k;
  back.dtype = c.dtype;
  if (kimi_unpermute_backward(&back, KIMI_DEVICE_CPU, nullptr) != KIMI_OK) return false;

  const std::vector<int32_t> sizes = {1, 0, c.tokens > 3 ? 2 : 0}, order = {2, 0, 1};
  r.sorted.resize(x.size());
  kimi_sort_chunks_params chunks = {};
  chunks.x = x.data(), chunks.split_sizes = sizes.data(), chunks.order = order.data();
  chunks.y = r.sorted.data(), chunks.num_rows = c.tokens, chunks.num_chunks = 3;
  chunks.row_bytes = chunks.x_stride_bytes = bytes;
  return kimi_sort_chunks(&chunks, KIMI_DEVICE_CPU, nullptr) == KIMI_OK;
}

}  // namespace

int main() {
  int failures = 0;
  for (const Case& c :
       {Case{1, 1, 1, 1, 1, KIMI_FLOAT32}, Case{5, 3, 7, 4, 255, KIMI_BFLOAT16},
        Case{33, 8, 16, 1, 257, KIMI_FLOAT16}, Case{700, 4, 40, 16, 300, KIMI_BFLOAT16},
        Case{3000, 4, 384, 1, 65, KIMI_FLOAT32},
        Case{4200, 8, 64, 3, 520, KIMI_BFLOAT16}}) {  // the last around the cache
    Results want;
    (void)kimi_set_isa(KIMI_ISA_PORTABLE);
    (void)kimi_set_num_threads(1);
    bool ok = run(c, want);
    for (int isa = KIMI_ISA_PORTABLE; isa <= kimi_detected_isa(); ++isa)
      for (int threads : {1, 2, 5}) {
        Results got;
        ok = ok && kimi_set_isa(kimi_isa(isa)) == KIMI_OK &&
             kimi_set_num_threads(threads) == KIMI_OK && run(c, got) && got == want;
        if (!ok)
          std::fprintf(stderr, "T %d, H %d, %s, %d threads (%s)\n", c.tokens, c.hidden,
                       kimi_isa_name(kimi_isa(isa)), threads, kimi_last_error());
        failures += !ok;
        ok = true;
      }
  }
  if (failures == 0) std::puts("permute: all passed");
  return failures == 0 ? 0 : 1;
}
