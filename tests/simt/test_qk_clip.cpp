// SPDX-License-Identifier: MIT
//
// The kernels of QK-Clip, run on the host. Maxima of small integers, which are exact in every dtype
// and order, against plain loops; clipped rows against their definition, bit for bit.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "common/dtype.h"
#include "common/sm.h"
#include "qk_clip/max_logits.cuh"
#include "simt.h"

namespace {

using namespace kimi;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

enum class Order { kRows, kHeads, kColumns };  // [B,S,H,D], [B,H,S,D], [B,H,D,S] with a gap

struct Case {
  int64_t batch, heads, kv_heads, queries, keys, dim;
  bool causal;
  Order order = Order::kRows;
  float special = 0.0f;  // in the last key of head 0, batch 0
  // Logits are negative but, with causal, for the first key that a query does not see.
  bool edge = false;
};

// A tensor [B, H, S, D] in some order of memory; what lies beside its elements is NaN.
template <class T>
struct Operand {
  std::vector<T> storage;
  int64_t batch, head, row, col;

  Operand(int64_t b, int64_t h, int64_t s, int64_t d, Order order, std::mt19937& random) {
    const int64_t wide = (d + 7) / 8 * 8;
    row = order == Order::kRows ? h * wide : order == Order::kHeads ? wide : 1;
    head = order == Order::kRows ? wide : order == Order::kHeads ? s * wide : d * (s + 1);
    col = order == Order::kColumns ? s + 1 : 1;
    batch = h * s * wide + (order == Order::kColumns ? h * d + 3 : 0);
    storage.assign(static_cast<size_t>(b * batch + 16), from_float<T>(kNaN));
    for (int64_t i = 0; i < b * h * s * d; ++i)
      at(i / (h * s * d), i / (s * d) % h, i / d % s, i % d) =
          from_float<T>(static_cast<float>(static_cast<int>(random() % 7) - 3));
  }
  T* data() { return storage.data(); }
  T& at(int64_t b, int64_t h, int64_t s, int64_t d) {
    return storage[static_cast<size_t>(b * batch + h * head + s * row + d * col)];
  }
};

template <class T>
void compare(const Case& c, int sm, uint64_t seed) {
  simt::settings().seed = seed;
  CHECK(set_max_sm(sm).is_ok());
  std::mt19937 random(static_cast<unsigned>(seed));
  Operand<T> q(c.batch, c.heads, c.queries, c.dim, c.order, random);
  Operand<T> k(c.batch, c.kv_heads, c.keys, c.dim, c.order, random);
  if (c.edge)  // query i is 1 in column i, key j is 4 in that of the query before its first one
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t s = 0; s < c.keys; ++s)
          for (int64_t d = 0, last = c.dim - 1; d <= last; ++d) {
            const int64_t before = s - 1 - (c.keys - c.queries);
            if (s < c.queries) q.at(b, h, s, d) = from_float<T>(d == s || d == last ? 1.0f : 0.0f);
            k.at(b, h / (c.heads / c.kv_heads), s, d) =
                from_float<T>(d == last                 ? -1.0f
                              : d == before && c.causal ? 4.0f
                                                        : 0.0f);
          }
  if (c.special != 0.0f) k.at(0, 0, c.keys - 1, 0) = from_float<T>(c.special);
  AttentionMaxLogitsParams p{};
  p.q = q.data();
  p.k = k.data();
  p.batch = c.batch;
  p.heads = c.heads;
  p.kv_heads = c.kv_heads;
  p.queries = c.queries;
  p.keys = c.keys;
  p.dim = c.dim;
  p.q_batch_stride = q.batch;
  p.q_head_stride = q.head;
  p.q_row_stride = q.row;
  p.q_col_stride = q.col;
  p.k_batch_stride = k.batch;
  p.k_head_stride = k.head;
  p.k_row_stride = k.row;
  p.k_col_stride = k.col;
  p.scale = 0.5f;
  p.causal = c.causal;
  p.dtype = kDtype<T>;
  std::vector<float> largest(static_cast<size_t>(c.heads), 7.0f);
  p.max_logits = largest.data();
  CHECK(attention_max_logits_cuda(p, nullptr).is_ok());
  CHECK(sm != 90 || sizeof(T) == 4 || c.order == Order::kColumns || c.dim > 256 ||
        max_logits::serves_sm90(p));
  for (int64_t h = 0; h < c.heads; ++h) {
    float most = -kInf;
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t i = 0; i < c.queries; ++i)
        for (int64_t j = 0; j < (c.causal ? i + c.keys - c.queries + 1 : c.keys); ++j) {
          float sum = 0.0f;
          for (int64_t d = 0; d < c.dim; ++d)
            sum += to_float(q.at(b, h, i, d)) * to_float(k.at(b, h / (c.heads / c.kv_heads), j, d));
          most = max_nan(most, sum);
        }
    const float got = largest[static_cast<size_t>(h)], want = 0.5f * most;
    if (got != want && (got == got || want == want))
      check::fail(__FILE__, __LINE__,
                  "head " + std::to_string(h) + " of " + std::to_string(c.heads) + ", queries " +
                      std::to_string(c.queries) + ", keys " + std::to_string(c.keys) + ", dim " +
                      std::to_string(c.dim) + ", sm " + std::to_string(sm) + ", seed " +
                      std::to_string(seed) + ": " + std::to_string(got) + " for " +
                      std::to_string(want));
  }
}

const Case kCases[] = {
    {1, 1, 1, 1, 1, 1, true},
    {2, 4, 2, 33, 50, 40, true},
    {2, 2, 1, 5, 300, 192, true, Order::kHeads},
    {1, 2, 2, 150, 150, 72, true},
    {2, 1, 1, 130, 260, 16, false},
    {1, 2, 1, 140, 140, 24, true, Order::kHeads, kNaN},
    {1, 2, 1, 9, 17, 8, false, Order::kRows, kInf},
    {2, 2, 2, 19, 23, 13, true, Order::kColumns},
    {2, 2, 1, 150, 170, 192, true, Order::kRows, 0.0f, true},
    {2, 2, 2, 60, 60, 72, true, Order::kHeads, 0.0f, true},
    {1, 2, 2, 20, 40, 24, false, Order::kRows, 0.0f, true},
};

TEST(maxima_sm80) {
  uint64_t seed = 0;
  for (const Case& c : kCases) {
    compare<bf16>(c, 80, ++seed);
    compare<fp16>(c, 80, ++seed);
    compare<float>(c, 80, ++seed);
  }
  compare<bf16>({1, 1, 1, 3, 140, 264, true}, 80, ++seed);  // queries come along with the keys
  compare<float>({1, 2, 1, 129, 130, 132, true}, 80, ++seed);
}

TEST(maxima_sm90) {
  uint64_t seed = 0;
  for (const Case& c : kCases) {
    compare<bf16>(c, 90, ++seed);
    compare<fp16>(c, 90, seed + 4);
  }
  compare<bf16>({1, 1, 1, 600, 600, 40, true}, 90, ++seed);
  for (int i = 0; i < 4; ++i) {  // more tasks than blocks, and several tiles of keys for each
    Case c{1, 6, 6, 256, 520, 8, false};
    if (i == 0) c = {1, 7, 7, 129, 400, 256, true};
    compare<bf16>(c, 90, ++seed);
    const uint64_t of_all = simt::last_statistics().warpgroup_operations;
    const auto heads = static_cast<uint64_t>(std::exchange(c.heads, c.kv_heads = 1));
    compare<bf16>(c, 90, seed);
    CHECK(of_all <= heads * simt::last_statistics().warpgroup_operations);  // each task once
  }
}

// Keys that no query of a task sees are not multiplied.
TEST(causal_is_half_the_work) {
  const auto work = [](int sm, bool causal) {
    compare<bf16>({1, 1, 1, 1024, 1024, 8, causal}, sm, 5);
    const simt::Statistics s = simt::last_statistics();
    return static_cast<double>(sm == 80 ? s.warp_operations : s.warpgroup_operations);
  };
  for (int sm : {80, 90}) CHECK(work(sm, true) < 0.7 * work(sm, false));
}

// ---- clip_rows ---------------------------------------------------------------------------------

template <class T>
void compare_clip(int64_t cols, int64_t stride, int32_t members, int64_t first_row, uint64_t seed,
                  bool of_keys = false) {
  simt::settings().seed = seed;
  std::mt19937 random(static_cast<unsigned>(seed));
  constexpr int32_t kHeads = 36, kBlockRows = 5, kShared = 2, kWhole = 2;
  const int32_t of_block = of_keys ? members : 1, blocks = kHeads / of_block;  // heads
  const int64_t rows = blocks * kBlockRows - first_row - (first_row > 0 ? 3 : 0);
  const kimi_clip_layer layers[] = {{4, 1}, {kHeads, members}};
  std::vector<float> maxima(4 + kHeads), gamma(4 + kHeads, -7.0f);
  for (float& s : maxima) {
    const float some[] = {kNaN, kInf, -kInf, -900.0f, 0.0f, 3.0f};
    s = random() % 2 == 0 ? some[random() % 6] : static_cast<float>(random() % 400);
  }
  std::vector<T> weight(static_cast<size_t>(rows * stride)), bias(4 * kBlockRows);
  for (std::vector<T>* x : {&weight, &bias})
    for (T& v : *x) v = from_float<T>(static_cast<float>(random() % 1000) / 997.0f);
  std::vector<T> want_weight = weight, want_bias = bias;
  std::vector<float> want_gamma;
  for (int32_t h = 0; h < 4; ++h) want_gamma.push_back(gamma_of(maxima.data(), h, 1, 100.0f));
  for (int32_t h = 0; h < kHeads; ++h)
    want_gamma.push_back(gamma_of(maxima.data() + 4, h, members, 100.0f));
  const auto factor = [&](int64_t row, const float* of, int64_t heads, float power) {
    const int64_t in = row % kBlockRows;
    const float g = of[row / kBlockRows * heads];
    return in < kShared ? power_of(g, power) : in < kShared + kWhole ? g : 1.0f;
  };
  for (int64_t r = 0; r < 4 * kBlockRows; ++r)
    if (const float f = factor(r, want_gamma.data(), 1, 0.25f); f != 1.0f)
      want_bias[size_t(r)] = from_float<T>(to_float(bias[size_t(r)]) * f);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c)
      if (const float f = factor(first_row + r, want_gamma.data() + 4, of_block, 0.5f); f != 1.0f)
        want_weight[size_t(r * stride + c)] =
            from_float<T>(to_float(weight[size_t(r * stride + c)]) * f);
  const kimi_clip_weight weights[] = {
      {bias.data(), 0, 4 * kBlockRows, 1, 1, 0, 4, kBlockRows, kShared, kWhole, 0.25f, kDtype<T>},
      {weight.data(), first_row, rows, cols, stride, 1, blocks, kBlockRows, kShared, kWhole, 0.5f,
       kDtype<T>}};
  ClipRowsParams p{layers, weights, maxima.data(), gamma.data(), 2, 2, 100.0f};
  CHECK(clip_rows_cuda(p, nullptr).is_ok());
  const auto same = [](const auto& a, const auto& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
  };
  CHECK(same(gamma, want_gamma));
  CHECK(same(bias, want_bias));
  CHECK(same(weight, want_weight));
}

TEST(clipped_rows) {
  uint64_t seed = 0;
  for (int64_t cols : {1, 8, 37, 300}) {
    compare_clip<float>(cols, cols + 4, 1, 0, ++seed);
    compare_clip<bf16>(cols, (cols + 7) / 8 * 8, 3, 13, ++seed);
    compare_clip<fp16>(cols, cols, 36, 7, ++seed);
    compare_clip<bf16>(cols, cols, 4, 7, ++seed, true);
  }
}

TEST(gamma_and_its_powers) {
  const float maxima[] = {200.0f, 400.0f, kNaN, 50.0f};
  CHECK(gamma_of(maxima, 0, 1, 100.0f) == 0.5f && gamma_of(maxima, 0, 2, 100.0f) == 0.25f);
  CHECK(gamma_of(maxima, 2, 2, 100.0f) == 1.0f);
  CHECK(power_of(0.25f, 0.5f) == 0.5f && power_of(0.3f, 1.0f) == 0.3f);
  CHECK(power_of(0.0f, 0.0f) == 1.0f && power_of(1.0f, 0.3f) == 1.0f);
}

// More layers, or weights, than one table holds: several launches.
TEST(many_layers) {
  for (const auto& [count, of_layer] : {std::pair{70, 1}, {30, 3}, {2, 70}}) {
    const size_t weights_count = static_cast<size_t>(count * of_layer);
    std::vector<kimi_clip_layer> layers(static_cast<size_t>(count), {1, 1});
    std::vector<float> values(weights_count, 1.0f), maxima, gamma(layers.size());
    std::vector<kimi_clip_weight> weights;
    for (size_t i = 0; i < weights_count; ++i) {
      const int layer = static_cast<int>(i) / of_layer;
      if (static_cast<int>(i) % of_layer == 0) maxima.push_back(static_cast<float>(9 + layer));
      weights.push_back({&values[i], 0, 1, 1, 1, layer, 1, 1, 0, 1, 1.0f, KIMI_FLOAT32});
    }
    const ClipRowsParams p{layers.data(), weights.data(),   maxima.data(), gamma.data(),
                           count,         count * of_layer, 9.5f};
    simt::settings().seed = 1;
    CHECK(clip_rows_cuda(p, nullptr).is_ok());
    for (size_t i = 0; i < weights_count; ++i) {
      const size_t layer = i / static_cast<size_t>(of_layer);
      CHECK(values[i] == (layer > 0 ? 9.5f / maxima[layer] : 1.0f));
      CHECK(gamma[layer] == values[i]);
    }
  }
}

}  // namespace

TEST_MAIN()
