// SPDX-License-Identifier: MIT
// fused_experts through the C API, forward and backward: every instruction set against a loop in
// double precision, the same bits for any number of threads, buffers of exactly their bytes.
#include "engines.h"

namespace {

using namespace kimi::test;

struct Case {
  int64_t tokens, hidden, width;
  int32_t experts, top_k;
  kimi_dtype dtype;
  kimi_activation activation;
  bool saved, biased = false;
};

struct Layer {
  explicit Layer(const Case& c)
      : x(c.tokens * c.hidden, c.dtype),
        dy(c.tokens * c.hidden, c.dtype),
        w_gate_up(c.experts * 2 * c.width * c.hidden, c.dtype),
        w_down(c.experts * c.hidden * c.width, c.dtype),
        b_gate_up(c.experts * 2 * c.width, c.dtype),
        b_down(c.experts * c.hidden, c.dtype),
        weights(size_t(c.tokens * c.top_k)),
        row_map(weights.size()),
        source(weights.size(), -1),
        offsets(size_t(c.experts)) {
    Random random(7);
    for (const Tensor* t : {&x, &dy, &w_gate_up, &w_down, &b_gate_up, &b_down})
      for (int64_t i = 0; i < int64_t(t->size) / (c.dtype == KIMI_FLOAT32 ? 4 : 2); ++i)
        t->set(i, t == &b_gate_up || t == &b_down ? c.biased * random.unit()
                                                  : random.unit() / (t == &x ? 1.0 : 4.0));
    for (float& w : weights) w = float(random.unit());
    // Pair i goes to expert i * 5 mod (E + 1); the last one of these stands for a dropped pair.
    std::vector<int32_t> expert(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) expert[i] = int32_t(i * 5 % size_t(c.experts + 1));
    int32_t row = 0;
    for (int32_t e = 0; e < c.experts; ++e) {
      for (size_t i = 0; i < weights.size(); ++i)
        if (expert[i] == e) source[size_t(row)] = int32_t(i), row_map[i] = row++;
      offsets[size_t(e)] = row;
    }
    for (size_t i = 0; i < weights.size(); ++i)
      if (expert[i] == c.experts) row_map[i] = -1;
  }
  kimi_expert_weights matrices(const Tensor& w, int64_t rows, int64_t columns) const {
    return {w.data.get(), nullptr, rows * columns, columns, 1, kimi_storage(w.dtype)};
  }

  Tensor x, dy, w_gate_up, w_down, b_gate_up, b_down;
  std::vector<float> weights;
  std::vector<int32_t> row_map, source, offsets;
};

double activation(kimi_activation kind, double g, double u) {
  if (kind == KIMI_ACTIVATION_GELU) return g * 0.5 * std::erfc(-g / std::sqrt(2.0)) * u;
  const double s = 1 / (1 + std::exp(-g));
  if (kind == KIMI_ACTIVATION_SILU) return g * s * u;
  if (kind == KIMI_ACTIVATION_RELU2) return g > 0 ? g * g * u : 0;
  if (kind == KIMI_ACTIVATION_GELU_TANH)
    return 0.5 * g * (1 + std::tanh(std::sqrt(2 / std::acos(-1)) * (g + 0.044715 * g * g * g))) * u;
  if (kind == KIMI_ACTIVATION_SWIGLU)  // limits of 0.5
    return std::fmin(std::fmin(g, 0.5) / (1 + std::exp(-2 * std::fmin(g, 0.5))), 0.25) *
           (std::fmax(-0.5, std::fmin(0.5, u)) + 1);
  return 4 * std::tanh(g / 4) * s * 25 * std::tanh(u / 25);
}

// y [T, H] in double precision. Gradients are compared between engines here, with autograd in
// Python.
std::vector<double> expected(const Case& c, const Layer& l) {
  std::vector<double> y(size_t(c.tokens * c.hidden), 0.0);
  for (int32_t e = 0; e < c.experts; ++e)
    for (int32_t r = e ? l.offsets[size_t(e) - 1] : 0; r < l.offsets[size_t(e)]; ++r) {
      const int64_t t = l.source[size_t(r)] / c.top_k;
      std::vector<double> h(size_t(c.width));
      for (int64_t f = 0; f < c.width; ++f) {
        const int64_t at = e * 2 * c.width + f;
        double g = l.b_gate_up.get(at), u = l.b_gate_up.get(at + c.width);
        for (int64_t i = 0; i < c.hidden; ++i) {
          const double x = l.x.get(t * c.hidden + i);
          g += x * l.w_gate_up.get((e * 2 * c.width + f) * c.hidden + i);
          u += x * l.w_gate_up.get((e * 2 * c.width + c.width + f) * c.hidden + i);
        }
        h[size_t(f)] = activation(c.activation, g, u);
      }
      for (int64_t i = 0; i < c.hidden; ++i) {
        double sum = l.b_down.get(e * c.hidden + i);
        for (int64_t f = 0; f < c.width; ++f)
          sum += h[size_t(f)] * l.w_down.get((e * c.hidden + i) * c.width + f);
        y[size_t(t * c.hidden + i)] += double(l.weights[size_t(l.source[size_t(r)])]) * sum;
      }
    }
  return y;
}

struct Results {
  Tensor y, gate_up, dx, grad_w_gate_up, grad_w_down, grad_b_gate_up, grad_b_down;
  std::vector<float> grad_weights;

  explicit Results(const Case& c)
      : y(c.tokens * c.hidden, c.dtype),
        gate_up(c.tokens * c.top_k * 2 * c.width, c.dtype),
        dx(c.tokens * c.hidden, c.dtype),
        grad_w_gate_up(c.experts * 2 * c.width * c.hidden, c.dtype),
        grad_w_down(c.experts * c.hidden * c.width, c.dtype),
        grad_b_gate_up(c.experts * 2 * c.width, c.dtype),
        grad_b_down(c.experts * c.hidden, c.dtype),
        grad_weights(size_t(c.tokens * c.top_k)) {}
};

template <class Params>
void fill(Params& p, const Case& c, const Layer& l) {
  p.num_tokens = c.tokens, p.hidden = c.hidden, p.width = c.width, p.num_experts = c.experts;
  p.numbers = {4, 25, 2, 1, 0.5f, 0.25f, 0.5f}, p.top_k = c.top_k, p.dtype = c.dtype,
  p.activation = c.activation;
  p.x = l.x.data.get(), p.x_stride = c.hidden;
  p.w_gate_up = l.matrices(l.w_gate_up, 2 * c.width, c.hidden);
  p.w_down = l.matrices(l.w_down, c.hidden, c.width);
  p.b_gate_up = c.biased ? l.b_gate_up.data.get() : nullptr;
  p.b_down = c.biased ? l.b_down.data.get() : nullptr;
  p.weights = l.weights.data(), p.row_map = l.row_map.data();
  p.source = l.source.data(), p.offsets = l.offsets.data();
}

void run(const Case& c, const Layer& l, Results& r) {
  kimi_fused_experts_params p = {};
  fill(p, c, l);
  const Workspace workspace(p, kimi_fused_experts_workspace_bytes);
  p.y = r.y.data.get(), p.gate_up = c.saved ? r.gate_up.data.get() : nullptr;
  check(kimi_fused_experts(&p, KIMI_DEVICE_CPU, nullptr) == KIMI_OK, "fused_experts");

  kimi_fused_experts_backward_params b = {};
  fill(b, c, l);
  b.dy = l.dy.data.get(), b.dy_stride = c.hidden;
  b.gate_up = c.saved ? r.gate_up.data.get() : nullptr;
  const Workspace scratch(b, kimi_fused_experts_backward_workspace_bytes);
  b.dx = r.dx.data.get(), b.grad_w_gate_up = r.grad_w_gate_up.data.get();
  b.grad_w_down = r.grad_w_down.data.get(), b.grad_weights = r.grad_weights.data();
  b.grad_b_gate_up = r.grad_b_gate_up.data.get(), b.grad_b_down = r.grad_b_down.data.get();
  check(kimi_fused_experts_backward(&b, KIMI_DEVICE_CPU, nullptr) == KIMI_OK, "backward");
}

double distance(const Tensor& x, const Tensor& y, int64_t n) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < n; ++i) {
    difference += (x.get(i) - y.get(i)) * (x.get(i) - y.get(i));
    norm += y.get(i) * y.get(i);
  }
  return std::sqrt(difference / norm);
}

void test(const Case& c) {
  const Layer l(c);
  const double tolerance = c.dtype == KIMI_FLOAT32 ? 2e-6 : c.dtype == KIMI_FLOAT16 ? 2e-3 : 1.5e-2;
  const std::vector<double> exact = expected(c, l);
  check(kimi_set_isa(KIMI_ISA_PORTABLE) == KIMI_OK, "set_isa");
  Results portable(c);
  run(c, l, portable);
  each_engine([&] {
    Results one(c), r(c);
    const int threads = kimi_num_threads();
    run(c, l, r);
    double difference = 0, norm = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
      difference += std::pow(r.y.get(int64_t(i)) - exact[i], 2);
      norm += exact[i] * exact[i];
    }
    check(std::sqrt(difference / norm) < tolerance, "y: error %g", std::sqrt(difference / norm));
    const int64_t matrix = c.experts * c.hidden * c.width;
    check(distance(r.dx, portable.dx, c.tokens * c.hidden) < tolerance, "dx");
    check(distance(r.grad_w_gate_up, portable.grad_w_gate_up, 2 * matrix) < tolerance,
          "dw_gate_up");
    check(distance(r.grad_w_down, portable.grad_w_down, matrix) < tolerance, "dw_down");
    check(distance(r.grad_b_gate_up, portable.grad_b_gate_up, 2 * c.experts * c.width) < tolerance,
          "db_gate_up");
    for (int32_t e = 0; e < c.experts; ++e)
      for (int64_t i = 0; i < c.hidden; ++i) {
        double sum = 0;
        for (int32_t row = e ? l.offsets[size_t(e) - 1] : 0; row < l.offsets[size_t(e)]; ++row) {
          const int32_t pair = l.source[size_t(row)];
          sum += double(l.weights[size_t(pair)]) * l.dy.get(pair / c.top_k * c.hidden + i);
        }
        const double got = r.grad_b_down.get(e * c.hidden + i);
        check(std::abs(got - sum) < tolerance, "db_down: %g, not %g", got, sum);
      }
    check(kimi_set_num_threads(1) == KIMI_OK, "set_num_threads");
    run(c, l, one);
    check(kimi_set_num_threads(threads) == KIMI_OK, "set_num_threads");
    check(r.y.same_bits(one.y) && r.dx.same_bits(one.dx) && r.grad_weights == one.grad_weights &&
              r.grad_w_gate_up.same_bits(one.grad_w_gate_up) &&
              r.grad_w_down.same_bits(one.grad_w_down) &&
              r.grad_b_gate_up.same_bits(one.grad_b_gate_up) &&
              r.grad_b_down.same_bits(one.grad_b_down),
          "the bits depend on the number of threads");
  });
}

}  // namespace

int main() {
  for (const kimi_dtype dtype : {KIMI_FLOAT32, KIMI_BFLOAT16, KIMI_FLOAT16}) {
    test({23, 40, 34, 5, 3, dtype, KIMI_ACTIVATION_SILU, true});
    test({9, 7, 3, 4, 2, dtype, KIMI_ACTIVATION_GELU, false});
    test({1, 33, 65, 3, 2, dtype, KIMI_ACTIVATION_SITU, true});
    test({40, 17, 50, 1, 1, dtype, KIMI_ACTIVATION_SILU, false});
    test({9, 16, 20, 3, 2, dtype, KIMI_ACTIVATION_GELU_TANH, true});
    test({9, 16, 20, 3, 2, dtype, KIMI_ACTIVATION_RELU2, false});
    test({9, 16, 20, 3, 2, dtype, KIMI_ACTIVATION_SWIGLU, true});
    test({23, 40, 34, 5, 3, dtype, KIMI_ACTIVATION_SILU, true, true});
    test({1, 33, 65, 3, 2, dtype, KIMI_ACTIVATION_GELU, false, true});  // an expert without rows
  }
  return report("test_fused_experts");
}
