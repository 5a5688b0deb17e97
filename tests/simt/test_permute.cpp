// SPDX-License-Identifier: MIT
//
// The permutation's CUDA kernels, run on the host, against the definitions of permute.h in plain
// loops: bit for bit. Outputs are filled with a canary before, so that what is not written shows.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/dtype.h"
#include "permute/permute.h"
#include "permute_cases.h"
#include "simt.h"

namespace {

using namespace permute_cases;
using Bytes = std::vector<uint8_t>;

// ---- permute -----------------------------------------------------------------------------------

Bytes random_bytes(size_t n, std::mt19937& random) {
  Bytes bytes(n);
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(random());
  return bytes;
}

// Vectors of the library's allocator are aligned to 16 bytes; `misalign` moves x and y off it.
void compare_permute(const Plan& plan, int64_t row_bytes, int64_t stride, int misalign,
                     uint64_t seed) {
  std::mt19937 random = start(
      seed, "T " + std::to_string(plan.num_tokens) + " K " + std::to_string(plan.top_k) + " R " +
                std::to_string(plan.num_rows()) + " row_bytes " + std::to_string(row_bytes) +
                " stride " + std::to_string(stride) + " misalign " + std::to_string(misalign));
  const int64_t rows = plan.num_rows();
  const Bytes x = random_bytes(misalign + plan.num_tokens * stride + row_bytes, random);
  Bytes want(misalign + rows * row_bytes, 0xa5), got = want;
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t* to = want.data() + misalign + r * row_bytes;
    if (plan.source[r] < 0)
      std::fill_n(to, row_bytes, uint8_t{0});
    else
      std::copy_n(x.data() + misalign + plan.source[r] / plan.top_k * stride, row_bytes, to);
  }
  PermuteParams p{};
  p.x = x.data() + misalign;
  p.row_map = plan.row_map.data();
  p.source = plan.source.data();
  p.y = got.data() + misalign;
  p.num_tokens = plan.num_tokens;
  p.num_rows = rows;
  p.row_bytes = row_bytes;
  p.x_stride_bytes = stride;
  p.top_k = plan.top_k;
  CHECK(permute_cuda(p, nullptr).is_ok());
  require(got == want, "y");
}

TEST(permute_rows) {
  uint64_t seed = 0;
  for (int64_t row_bytes : {0, 1, 4, 7, 16, 40, 48, 1024, 4096, 4112, 14336})
    for (int variant = 0; variant < 6; ++variant) {
      const int k = variant == 0 ? 1 : variant == 1 ? 33 : 4 + variant;
      const int64_t tokens = ++seed % 7 == 0 ? 0 : 1 + seed % 6;
      const Plan plan = compare_plan({tokens, 3, k, variant % 3 == 0 ? 1 : 7, {}, {}, {}, {}},
                                     static_cast<Skew>(variant % 4), 0.2, seed);
      const int64_t stride = variant == 2 ? 0 : variant == 3 ? row_bytes + 16 : row_bytes;
      compare_permute(plan, row_bytes, stride, variant == 4 ? 4 : variant == 5 ? 1 : 0, seed);
    }
}

TEST(permute_more_tokens_and_padding_than_the_grid_holds) {
  for (uint64_t seed : {0, 1, 2, 3})
    compare_permute(compare_plan({300, 16, 2, 64, {}, {}, {}, {}}, kHot, 0.1, seed), 32, 32, 0,
                    seed);
}

// ---- unpermute and its backward ----------------------------------------------------------------

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Mostly ordinary; signed zeros and subnormals, whose products vanish; infinities and NaN.
float value(std::mt19937& random) {
  const float x = std::normal_distribution<float>(0.0f, 2.0f)(random);
  const float special[] = {0.0f, -0.0f, 1e-40f, -1e-40f, 6e-8f, -6e-8f, 3e38f, -INFINITY, kNaN};
  return random() % 16 == 0 ? special[random() % (random() % 8 == 0 ? 9 : 6)] : x;
}

template <class T>
std::vector<T> values(size_t n, std::mt19937& random) {
  std::vector<T> result(n);
  for (T& v : result) v = from_float<T>(value(random));
  return result;
}

// The same bits; NaN of any payload.
template <class T>
void require_same(const std::vector<T>& got, const std::vector<T>& want, const char* what) {
  require(got.size() == want.size(), what);
  for (size_t i = 0; i < want.size(); ++i) {
    const float a = to_float(got[i]), b = to_float(want[i]);
    if (bits_of(a) != bits_of(b) && !(a != a && b != b))
      require(false, (std::string(what) + "[" + std::to_string(i) + "] = " + std::to_string(a) +
                      ", expected " + std::to_string(b))
                         .c_str());
  }
}

struct Rows {
  int64_t hidden = 1;
  int gap = 0;       // elements between rows
  int misalign = 0;  // elements
  kimi_dtype dtype = KIMI_FLOAT32;
};

template <class T>
void compare_unpermute(const Plan& plan, const Rows& c, bool weighted, std::mt19937& random) {
  const int64_t stride = c.hidden + c.gap, tokens = plan.num_tokens;
  const std::vector<T> y = values<T>(c.misalign + plan.num_rows() * stride, random);
  const std::vector<float> weights = values<float>(plan.row_map.size(), random);
  std::vector<T> want(c.misalign + tokens * c.hidden, from_float<T>(-7.0f)), got = want;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; h < c.hidden; ++h) {
      float sum = 0.0f;
      for (int64_t pair = t * plan.top_k; pair < (t + 1) * plan.top_k; ++pair) {
        if (plan.row_map[pair] < 0) continue;
        const float v = to_float(y[c.misalign + plan.row_map[pair] * stride + h]);
        sum = weighted ? std::fma(weights[pair], v, sum) : sum + v;
      }
      want[c.misalign + t * c.hidden + h] = from_float<T>(sum);
    }
  UnpermuteParams p{};
  p.y = y.data() + c.misalign;
  p.row_map = plan.row_map.data();
  p.weights = weighted ? weights.data() : nullptr;
  p.x = got.data() + c.misalign;
  p.num_tokens = tokens;
  p.hidden = c.hidden;
  p.y_stride = stride;
  p.top_k = plan.top_k;
  p.dtype = c.dtype;
  CHECK(unpermute_cuda(p, nullptr).is_ok());
  require_same(got, want, "x");
}

template <class T>
void compare_backward(const Plan& plan, const Rows& c, std::mt19937& random) {
  const int64_t stride = c.hidden + c.gap, rows = plan.num_rows();
  const std::vector<T> grad_x = values<T>(c.misalign + plan.num_tokens * stride, random);
  const std::vector<T> y = values<T>(c.misalign + rows * stride, random);
  const std::vector<float> weights = values<float>(plan.row_map.size(), random);
  std::vector<T> want_y(c.misalign + rows * c.hidden, from_float<T>(-7.0f)), got_y = want_y;
  std::vector<float> want_weights(plan.row_map.size(), 0.0f), got_weights(want_weights.size(), -7);
  for (int64_t r = 0; r < rows; ++r) {
    T* to = want_y.data() + c.misalign + r * c.hidden;
    std::fill_n(to, c.hidden, T{});
    const int64_t pair = plan.source[r];
    if (pair < 0) continue;
    std::vector<float> partial(256, 0.0f);
    for (int64_t h = 0; h < c.hidden; ++h) {
      const float g = to_float(grad_x[c.misalign + pair / plan.top_k * stride + h]);
      to[h] = from_float<T>(weights[pair] * g);
      partial[h % 256] = std::fma(g, to_float(y[c.misalign + r * stride + h]), partial[h % 256]);
    }
    for (int half : {128, 64, 32, 16, 8, 4, 2, 1})
      for (int l = 0; l < half; ++l) partial[l] = partial[l] + partial[l + half];
    want_weights[pair] = partial[0];
  }
  UnpermuteBackwardParams p{};
  p.grad_x = grad_x.data() + c.misalign;
  p.y = y.data() + c.misalign;
  p.row_map = plan.row_map.data();
  p.source = plan.source.data();
  p.weights = weights.data();
  p.grad_y = got_y.data() + c.misalign;
  p.grad_weights = got_weights.data();
  p.num_tokens = plan.num_tokens;
  p.num_rows = rows;
  p.hidden = c.hidden;
  p.grad_x_stride = stride;
  p.y_stride = stride;
  p.top_k = plan.top_k;
  p.dtype = c.dtype;
  CHECK(unpermute_backward_cuda(p, nullptr).is_ok());
  require_same(got_y, want_y, "grad_y");
  require_same(got_weights, want_weights, "grad_weights");
}

void compare_both_ways(const Plan& shape, Skew skew, const Rows& c, uint64_t seed) {
  const Plan plan = compare_plan(shape, skew, 0.15, seed);
  std::mt19937 random = start(
      seed, g_case + " H " + std::to_string(c.hidden) + " gap " + std::to_string(c.gap) +
                " misalign " + std::to_string(c.misalign) + " dtype " + std::to_string(c.dtype));
  dispatch(c.dtype, [&]<class T>() {
    compare_unpermute<T>(plan, c, true, random);
    compare_unpermute<T>(plan, c, false, random);
    compare_backward<T>(plan, c, random);
  });
}

TEST(unpermute_and_backward) {
  uint64_t seed = 0;
  for (int64_t hidden : {0, 1, 7, 8, 12, 31, 32, 100, 255, 256, 264, 520, 1100, 2304, 2310})
    for (int k : {1, 2, 8, 9, 33})
      for (kimi_dtype dtype : {KIMI_FLOAT32, KIMI_BFLOAT16, KIMI_FLOAT16}) {
        const int64_t tokens = ++seed % 8 == 0 ? 0 : 1 + seed % 3;
        const int align = seed % 2 == 0 ? 1 : 5, gap = seed % 3 == 0 ? 8 : seed % 7 == 0;
        const int misalign = seed % 11 == 0;
        compare_both_ways({tokens, 3, k, align, {}, {}, {}, {}}, static_cast<Skew>(seed % 4),
                          {hidden, gap, misalign, dtype}, seed);
      }
}

TEST(unpermute_more_tokens_than_the_grid_holds) {
  for (uint64_t seed : {0, 1, 2, 3})
    compare_both_ways({200, 16, 4, 32, {}, {}, {}, {}}, kHot, {16, 0, 0, KIMI_BFLOAT16}, seed);
}

// ---- sort_chunks -------------------------------------------------------------------------------

void compare_chunks(int32_t chunks, int64_t row_bytes, int64_t gap, int64_t tail, uint64_t seed) {
  std::mt19937 random =
      start(seed, "C " + std::to_string(chunks) + " row_bytes " + std::to_string(row_bytes) +
                      " gap " + std::to_string(gap) + " tail " + std::to_string(tail));
  std::vector<int32_t> sizes(chunks), order(chunks);
  for (int32_t& s : sizes)  // few rows together: many chunks are empty
    s = random() % (1 + chunks / 300) != 0 ? 0 : static_cast<int32_t>(random() % 5);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  std::vector<int64_t> starts(chunks + 1, 0), natural;  // row of x of each sorted row
  for (int32_t c = 0; c < chunks; ++c) starts[c + 1] = starts[c] + sizes[c];
  for (int32_t c : order)
    for (int64_t row = starts[c]; row < starts[c + 1]; ++row) natural.push_back(row);

  const int64_t rows = starts[chunks] + tail, stride = row_bytes + gap;
  const Bytes x = random_bytes(rows * stride, random);
  for (int32_t inverse : {0, 1}) {
    Bytes want(rows * row_bytes, 0), got(want.size(), 0xa5);
    for (size_t r = 0; r < natural.size(); ++r) {
      const int64_t from = inverse ? static_cast<int64_t>(r) : natural[r];
      const int64_t to = inverse ? natural[r] : static_cast<int64_t>(r);
      std::copy_n(x.data() + from * stride, row_bytes, want.data() + to * row_bytes);
    }
    SortChunksParams p{};
    p.x = x.data();
    p.split_sizes = sizes.data();
    p.order = order.data();
    p.y = got.data();
    p.num_rows = rows;
    p.row_bytes = row_bytes;
    p.x_stride_bytes = stride;
    p.num_chunks = chunks;
    p.inverse = inverse;
    CHECK(sort_chunks_cuda(p, nullptr).is_ok());
    require(got == want, inverse ? "inverse" : "forward");
  }
}

TEST(chunks) {
  uint64_t seed = 0;
  for (int32_t count : {0, 1, 2, 5, 31, 384, 2048, 2049, 4097, 10000})
    for (int64_t row_bytes : {1, 4, 16, 36, 2064}) {
      ++seed;
      compare_chunks(count, row_bytes, seed % 3 == 0 ? 16 : 0, seed % 2 * 7, seed);
    }
}

TEST(most_chunks) { compare_chunks(65536, 16, 0, 3, 2); }

// ---- 64-bit rows -------------------------------------------------------------------------------

// The 38000 x 8 x 7168 bf16 rows of K2 lie 4.4 GB apart; pages that are not touched cost nothing.
struct Mapping {
  explicit Mapping(size_t size) : bytes(size) {
    at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
              -1, 0);
    if (at == MAP_FAILED) check::fail(__FILE__, __LINE__, "no address space");
  }
  ~Mapping() { munmap(at, bytes); }
  bf16* row(int64_t r, int64_t hidden) const { return static_cast<bf16*>(at) + r * hidden; }
  size_t bytes;
  void* at;
};

TEST(rows_beyond_32_bits) {
  std::mt19937 random = start(3, "38000 x 8 x 7168");
  constexpr int64_t kHidden = 7168, kRows = 38000 * 8;
  const int32_t last = kRows - 1, row_map[] = {last, 5};
  std::vector<int32_t> source(kRows, 0);  // nothing is padding but one row
  source[kRows - 2] = -1;
  const std::vector<bf16> x = values<bf16>(kHidden, random);
  const std::vector<float> weights = {0.75f, -2.0f};
  const Mapping y(kRows * kHidden * sizeof(bf16));
  std::memset(y.row(kRows - 2, kHidden), 0xa5, kHidden * sizeof(bf16));

  PermuteParams p{};
  p.x = x.data();
  p.row_map = row_map;
  p.source = source.data();
  p.y = y.at;
  p.num_tokens = 1;
  p.num_rows = kRows;
  p.row_bytes = p.x_stride_bytes = kHidden * sizeof(bf16);
  p.top_k = 2;
  CHECK(permute_cuda(p, nullptr).is_ok());
  CHECK(std::memcmp(y.row(last, kHidden), x.data(), p.row_bytes) == 0);
  CHECK(std::memcmp(y.row(5, kHidden), x.data(), p.row_bytes) == 0);
  for (int64_t h = 0; h < kHidden; ++h) CHECK(y.row(kRows - 2, kHidden)[h].bits == 0);

  std::vector<bf16> sum(kHidden), want(kHidden);
  for (int64_t h = 0; h < kHidden; ++h) want[h] = from_float<bf16>(-1.25f * to_float(x[h]));
  UnpermuteParams u{};
  u.y = y.at;
  u.row_map = row_map;
  u.weights = weights.data();
  u.x = sum.data();
  u.num_tokens = 1;
  u.hidden = u.y_stride = kHidden;
  u.top_k = 2;
  u.dtype = KIMI_BFLOAT16;
  CHECK(unpermute_cuda(u, nullptr).is_ok());
  for (int64_t h = 0; h < kHidden; ++h)
    if (const float w = to_float(want[h]); std::isfinite(w) && w != 0.0f)
      CHECK(std::abs(to_float(sum[h]) - w) <= std::abs(w) * 0.01f);

  const Mapping grad_y(y.bytes);
  float grad_weights[2];
  UnpermuteBackwardParams b{};
  b.grad_x = x.data();
  b.y = y.at;
  b.row_map = row_map;
  b.source = source.data();
  b.weights = weights.data();
  b.grad_y = grad_y.at;
  b.grad_weights = grad_weights;
  b.num_tokens = 1;
  b.num_rows = kRows;
  b.hidden = b.grad_x_stride = b.y_stride = kHidden;
  b.top_k = 2;
  b.dtype = KIMI_BFLOAT16;
  CHECK(unpermute_backward_cuda(b, nullptr).is_ok());
  CHECK(std::memcmp(&grad_weights[0], &grad_weights[1], sizeof(float)) == 0);
  for (int64_t h = 0; h < kHidden; ++h)
    if (const float g = to_float(x[h]); g == g) {
      CHECK(grad_y.row(last, kHidden)[h].bits == from_float<bf16>(0.75f * g).bits);
      CHECK(grad_y.row(5, kHidden)[h].bits == from_float<bf16>(-2.0f * g).bits);
    }

  // Two rows 2^32 bytes apart.
  if (y.bytes < (size_t{1} << 32) + 16) return;
  std::memcpy(static_cast<char*>(y.at) + (size_t{1} << 32), "sixteen bytes...", 16);
  const int32_t sizes[] = {1, 1}, order[] = {1, 0};
  char sorted[32];
  SortChunksParams s{};
  s.x = y.at;
  s.split_sizes = sizes;
  s.order = order;
  s.y = sorted;
  s.num_rows = 2;
  s.row_bytes = 16;
  s.x_stride_bytes = int64_t{1} << 32;
  s.num_chunks = 2;
  CHECK(sort_chunks_cuda(s, nullptr).is_ok());
  CHECK(std::memcmp(sorted, "sixteen bytes...", 16) == 0);
}

}  // namespace

TEST_MAIN()
