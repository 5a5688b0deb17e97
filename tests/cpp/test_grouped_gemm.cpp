// SPDX-License-Identifier: MIT
// grouped_gemm through the C API: small integers, whose sums are exact, so that every instruction
// set, stride order and number of threads must give the same numbers as a loop in double precision.
#include "engines.h"

namespace {

using namespace kimi::test;

struct Case {
  std::vector<int32_t> sizes;
  int64_t tail, k, n;
  kimi_dtype dtype, out_dtype;
  bool transposed, bias;  // transposed: the matrices lie as [E, N, K]
};

struct Problem {
  explicit Problem(const Case& c)
      : offsets(c.sizes.size()), experts(int32_t(c.sizes.size())), rows(c.tail) {
    int64_t end = 0;
    for (int32_t e = 0; e < experts; ++e) offsets[size_t(e)] = int32_t(end += c.sizes[size_t(e)]);
    rows += end;
  }
  int64_t begin(int32_t e) const { return e ? offsets[size_t(e) - 1] : 0; }
  int64_t end(int32_t e) const { return offsets[size_t(e)]; }

  std::vector<int32_t> offsets;
  int32_t experts;
  int64_t rows;
};

Tensor integers(int64_t n, kimi_dtype dtype, uint32_t seed) {
  Tensor x(n, dtype);
  Random random(seed);
  for (int64_t i = 0; i < n; ++i) x.set(i, random.small());
  return x;
}

double rounded(double x, kimi_dtype dtype) {
  Tensor one(1, dtype);
  one.set(0, x);
  return one.get(0);
}

// Element (e, k, n) of matrices that lie as [E, K, N] or, transposed, as [E, N, K].
int64_t place(const Case& c, int64_t e, int64_t k, int64_t n) {
  return e * c.k * c.n + (c.transposed ? n * c.k + k : k * c.n + n);
}

void forward(const Case& c) {
  const Problem problem(c);
  const Tensor a = integers(problem.rows * c.k, c.dtype, 1);
  const Tensor b = integers(problem.experts * c.k * c.n, c.dtype, 2);
  const Tensor bias = integers(problem.experts * c.n, c.dtype, 3);
  each_engine([&] {
    const Tensor out(problem.rows * c.n, c.out_dtype);
    kimi_grouped_gemm_params p = {};
    p.num_rows = problem.rows, p.k = c.k, p.n = c.n, p.num_experts = problem.experts;
    p.dtype = c.dtype, p.b_storage = kimi_storage(c.dtype), p.out_dtype = c.out_dtype;
    const Workspace workspace(p, kimi_grouped_gemm_workspace_bytes);
    if (c.k > 0) p.a = a.data.get(), p.b = b.data.get();  // empty ones may be NULL,
    p.offsets = problem.offsets.data();
    p.bias = c.bias ? bias.data.get() : nullptr;
    p.out = out.data.get();
    p.a_row_stride = c.k, p.a_k_stride = 1;
    p.b_expert_stride = std::max<int64_t>(c.k, 1) * c.n;  // and have the strides of torch's
    p.b_k_stride = c.transposed ? 1 : c.n, p.b_n_stride = c.transposed ? c.k : 1;
    check(kimi_grouped_gemm(&p, KIMI_DEVICE_CPU, nullptr) == KIMI_OK, "grouped_gemm");
    for (int32_t e = 0; e < problem.experts; ++e)
      for (int64_t r = problem.begin(e); r < problem.end(e); ++r)
        for (int64_t n = 0; n < c.n; ++n) {
          double sum = c.bias ? bias.get(e * c.n + n) : 0.0;
          for (int64_t k = 0; k < c.k; ++k) sum += a.get(r * c.k + k) * b.get(place(c, e, k, n));
          if (out.get(r * c.n + n) != rounded(sum, c.out_dtype))
            return check(false, "out[%d, %d]: %g, not %g", int(r), int(n), out.get(r * c.n + n),
                         sum);
        }
    for (int64_t i = problem.offsets.back() * c.n; i < problem.rows * c.n; ++i)
      if (out.get(i) != 0.0) return check(false, "a row past the groups is not zero");
  });
}

void wgrad(const Case& c, bool accumulate) {
  const Problem problem(c);
  const Tensor a = integers(problem.rows * c.k, c.dtype, 4);
  const Tensor dc = integers(problem.rows * c.n, c.dtype, 5);
  const Tensor before = integers(problem.experts * c.k * c.n, c.out_dtype, 6);
  each_engine([&] {
    const Tensor out = integers(problem.experts * c.k * c.n, c.out_dtype, 6);
    kimi_grouped_gemm_wgrad_params p = {};
    p.num_rows = problem.rows, p.k = c.k, p.n = c.n, p.num_experts = problem.experts;
    p.dtype = c.dtype, p.out_dtype = c.out_dtype, p.accumulate = accumulate;
    const Workspace workspace(p, kimi_grouped_gemm_wgrad_workspace_bytes);
    p.a = a.data.get(), p.dc = dc.data.get(), p.offsets = problem.offsets.data();
    p.out = out.data.get();
    p.a_row_stride = c.k, p.a_k_stride = 1, p.dc_row_stride = c.n, p.dc_n_stride = 1;
    p.out_expert_stride = c.k * c.n;
    p.out_k_stride = c.transposed ? 1 : c.n, p.out_n_stride = c.transposed ? c.k : 1;
    check(kimi_grouped_gemm_wgrad(&p, KIMI_DEVICE_CPU, nullptr) == KIMI_OK, "wgrad");
    for (int32_t e = 0; e < problem.experts; ++e)
      for (int64_t k = 0; k < c.k; ++k)
        for (int64_t n = 0; n < c.n; ++n) {
          const int64_t at = place(c, e, k, n);
          double sum = accumulate ? before.get(at) : 0.0;
          for (int64_t r = problem.begin(e); r < problem.end(e); ++r)
            sum += a.get(r * c.k + k) * dc.get(r * c.n + n);
          if (out.get(at) != rounded(sum, c.out_dtype))
            return check(false, "wgrad[%d, %d, %d]: %g, not %g", int(e), int(k), int(n),
                         out.get(at), sum);
        }
  });
}

void refusals() {
  const std::vector<std::vector<int32_t>> bad = {{3, 2}, {-1, 2}, {2, 5}};
  for (const auto& offsets : bad) {
    const Tensor a = integers(8, KIMI_FLOAT32, 1), b = integers(8, KIMI_FLOAT32, 2);
    const Tensor out = integers(8, KIMI_FLOAT32, 3);
    kimi_grouped_gemm_params p = {};
    p.num_rows = 4, p.k = 2, p.n = 2, p.num_experts = 2;
    p.a_row_stride = 2, p.a_k_stride = 1, p.b_expert_stride = 4, p.b_k_stride = 2, p.b_n_stride = 1;
    const Workspace workspace(p, kimi_grouped_gemm_workspace_bytes);
    p.a = a.data.get(), p.b = b.data.get(), p.out = out.data.get();
    p.offsets = offsets.data();
    check(kimi_grouped_gemm(&p, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT &&
              std::strstr(kimi_last_error(), "offsets: expected 0 <="),
          "bad offsets were taken");
    check(out.same_bits(integers(8, KIMI_FLOAT32, 3)), "a refused call wrote its output");
  }
}

}  // namespace

int main() {
  const std::vector<int32_t> sizes = {0, 1, 4, 0, 33, 17}, many = {300, 0, 5};
  for (const kimi_dtype dtype : {KIMI_FLOAT32, KIMI_BFLOAT16, KIMI_FLOAT16})
    for (const bool transposed : {false, true}) {
      for (const auto& [k, n] : {std::pair{1, 1}, {7, 33}, {70, 65}, {40, 7}}) {
        forward({sizes, 3, k, n, dtype, dtype, transposed, true});
        wgrad({sizes, 3, k, n, dtype, KIMI_FLOAT32, transposed, false}, true);
      }
      forward({sizes, 3, 0, 9, dtype, dtype, transposed, true});
      forward({many, 0, 600, 34, dtype, KIMI_FLOAT32, transposed, false});
      wgrad({many, 1, 34, 70, dtype, dtype, transposed, false}, false);
    }
  refusals();
  return report("test_grouped_gemm");
}
