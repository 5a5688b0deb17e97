// SPDX-License-Identifier: MIT
// fused_experts' launches on the host runner, forward and backward, against loops in double
// precision; workspace and outputs of exactly their bytes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "common/dtype.h"
#include "common/sm.h"
#include "fused_experts/fused_experts.h"
#include "gemm/sm90/job.h"
#include "simt.h"

namespace {

using namespace kimi;
using Doubles = std::vector<double>;

struct Case {
  int64_t tokens, hidden, width;
  int32_t experts, top_k;
  kimi_activation activation;
  bool saved;  // [g; u] by the forward, or computed again
  bool biased = false, weights_first = false;
  bool shifted = false;  // the bias of [g; u] begins where 16 bytes do not
};

constexpr kimi_activation_numbers kNumbers = {4, 25, 1.702f, 1, 1.5f, 1.2f, 1};

struct Plan {
  std::vector<int32_t> row_map, source, offsets;

  // Pair i goes to expert i * 5 mod (E + 1); the last one of these stands for a dropped pair.
  explicit Plan(const Case& c) : row_map(c.tokens * c.top_k, -1), source(row_map.size(), -1) {
    int32_t row = 0;
    for (int32_t e = 0; e < c.experts; ++e) {
      for (size_t i = 0; i < row_map.size(); ++i)
        if (static_cast<int32_t>(i * 5 % (c.experts + 1)) == e)
          source[row] = static_cast<int32_t>(i), row_map[i] = row++;
      offsets.push_back(row);
    }
  }
};

// What the kernels get, and the same values as doubles.
template <class T>
struct Values {
  std::vector<T> stored;
  Doubles exact;

  Values(int64_t n, double scale, std::mt19937& random) : stored(n), exact(n) {
    for (int64_t i = 0; i < n; ++i) {
      stored[i] =
          from_float<T>(static_cast<float>(scale * std::normal_distribution<double>()(random)));
      exact[i] = to_float(stored[i]);
    }
  }
};

template <class T>
struct Layer {
  Values<T> x, dy, w_gate_up, w_down, b_gate_up, b_down;
  std::vector<T> shifted;  // b_gate_up behind one element
  std::vector<float> weights;

  Layer(const Case& c, std::mt19937& random)
      : x(c.tokens * c.hidden, 1.0, random),
        dy(c.tokens * c.hidden, 1.0, random),
        w_gate_up(c.experts * 2 * c.width * c.hidden, 0.3, random),
        w_down(c.experts * c.hidden * c.width, 0.3, random),
        b_gate_up(c.experts * 2 * c.width, c.biased ? 1.0 : 0.0, random),
        b_down(c.experts * c.hidden, c.biased && !c.weights_first ? 1.0 : 0.0, random),
        shifted(b_gate_up.stored.size() + 1),
        weights(c.tokens * c.top_k) {
    std::copy(b_gate_up.stored.begin(), b_gate_up.stored.end(), shifted.begin() + 1);
    for (float& w : weights) w = std::uniform_real_distribution<float>(0.2f, 2.0f)(random);
  }
};

double value(kimi_activation kind, double g, double u) {
  if (kind == KIMI_ACTIVATION_GELU) return g * 0.5 * std::erfc(-g / std::sqrt(2.0)) * u;
  const double s = 1 / (1 + std::exp(-g));
  if (kind == KIMI_ACTIVATION_SILU) return g * s * u;
  if (kind == KIMI_ACTIVATION_RELU2) return g > 0 ? g * g * u : 0;
  if (kind == KIMI_ACTIVATION_GELU_TANH)
    return 0.5 * g * (1 + std::tanh(std::sqrt(2 / std::acos(-1)) * (g + 0.044715 * g * g * g))) * u;
  if (kind == KIMI_ACTIVATION_SWIGLU) {
    const double c = std::fmin(g, kNumbers.gate_limit), limit = kNumbers.up_limit;
    const double a = c / (1 + std::exp(-double{kNumbers.alpha} * c));
    return std::fmin(a, kNumbers.silu_limit) *
           (std::fmax(-limit, std::fmin(limit, u)) + kNumbers.shift);
  }
  return 4 * std::tanh(g / 4) * s * 25 * std::tanh(u / 25);
}

struct Outputs {
  Doubles y, dx, grad_w_gate_up, grad_w_down, grad_weights, grad_b_gate_up, grad_b_down;

  explicit Outputs(const Case& c)
      : y(c.tokens * c.hidden),
        dx(c.tokens * c.hidden),
        grad_w_gate_up(c.experts * 2 * c.width * c.hidden),
        grad_w_down(c.experts * c.hidden * c.width),
        grad_weights(c.tokens * c.top_k),
        grad_b_gate_up(c.experts * 2 * c.width),
        grad_b_down(c.experts * c.hidden) {}
};

// One row of expert e: everything that it adds.
template <class T>
void add_row(const Case& c, const Layer<T>& l, int32_t e, int32_t pair, Outputs& out) {
  const int64_t t = pair / c.top_k, H = c.hidden, F = c.width;
  const double* x = &l.x.exact[t * H];
  const double* dy = &l.dy.exact[t * H];
  const double* up = &l.w_gate_up.exact[e * 2 * F * H];
  const double* down = &l.w_down.exact[e * H * F];
  const double weight = l.weights[pair];
  for (int64_t i = 0; i < H; ++i) {
    const double bias = l.b_down.exact[e * H + i];
    out.y[t * H + i] += weight * bias;
    out.grad_weights[pair] += dy[i] * bias;
    out.grad_b_down[e * H + i] += weight * dy[i];
  }
  for (int64_t f = 0; f < F; ++f) {
    double g = l.b_gate_up.exact[e * 2 * F + f], u = l.b_gate_up.exact[e * 2 * F + F + f], dh = 0;
    for (int64_t i = 0; i < H; ++i) {
      g += x[i] * up[f * H + i];
      u += x[i] * up[(F + f) * H + i];
      dh += dy[i] * down[i * F + f];
    }
    const double h = value(c.activation, g, u), step = 1e-5;
    const double dg = (value(c.activation, g + step, u) - value(c.activation, g - step, u)) /
                      (2 * step) * weight * dh;
    const double du = (value(c.activation, g, u + step) - value(c.activation, g, u - step)) /
                      (2 * step) * weight * dh;
    out.grad_weights[pair] += dh * h;
    out.grad_b_gate_up[e * 2 * F + f] += dg;
    out.grad_b_gate_up[e * 2 * F + F + f] += du;
    for (int64_t i = 0; i < H; ++i) {
      out.y[t * H + i] += weight * down[i * F + f] * h;
      out.dx[t * H + i] += dg * up[f * H + i] + du * up[(F + f) * H + i];
      out.grad_w_gate_up[(e * 2 * F + f) * H + i] += dg * x[i];
      out.grad_w_gate_up[(e * 2 * F + F + f) * H + i] += du * x[i];
      out.grad_w_down[(e * H + i) * F + f] += dy[i] * weight * h;
    }
  }
}

template <class T>
void compare(const Case& c, const char* what, const std::vector<T>& ours, const Doubles& exact,
             double bound) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    difference += std::pow(to_float(ours[i]) - exact[i], 2);
    norm += exact[i] * exact[i];
  }
  if (!(std::sqrt(difference) <= bound * std::sqrt(norm)))
    check::fail(__FILE__, __LINE__,
                std::string(what) + ": error " + std::to_string(std::sqrt(difference / norm)) +
                    ", T " + std::to_string(c.tokens) + " H " + std::to_string(c.hidden) + " F " +
                    std::to_string(c.width) + " activation " + std::to_string(c.activation) +
                    " sm " + std::to_string(max_sm()));
}

template <class T, class Params>
void fill(Params& p, const Case& c, const Layer<T>& l, const Plan& plan) {
  const int64_t H = c.hidden, F = c.width;
  const auto storage = static_cast<kimi_storage>(kDtype<T>);
  p.x = l.x.stored.data(), p.x_stride = H;
  p.w_gate_up = {l.w_gate_up.stored.data(), nullptr, 2 * F * H, H, 1, storage};
  p.w_down = {l.w_down.stored.data(), nullptr, H * F, F, 1, storage};
  p.b_gate_up = c.shifted ? &l.shifted[1] : c.biased ? l.b_gate_up.stored.data() : nullptr;
  p.b_down = c.biased && !c.weights_first ? l.b_down.stored.data() : nullptr;
  p.weights = l.weights.data(), p.row_map = plan.row_map.data();
  p.source = plan.source.data(), p.offsets = plan.offsets.data();
  p.num_tokens = c.tokens, p.hidden = H, p.width = F, p.num_experts = c.experts;
  p.numbers = kNumbers, p.top_k = c.top_k, p.dtype = kDtype<T>, p.activation = c.activation;
}

template <class T>
void run(const Case& c, uint64_t seed) {
  std::mt19937 random(static_cast<unsigned>(seed));
  simt::settings().seed = seed;
  const Layer<T> l(c, random);
  const Plan plan(c);
  Outputs exact(c);
  for (int32_t e = 0; e < c.experts; ++e)
    for (int32_t r = e ? plan.offsets[e - 1] : 0; r < plan.offsets[e]; ++r)
      add_row(c, l, e, plan.source[r], exact);

  const T poison = from_float<T>(NAN);
  const int64_t rows = c.tokens * c.top_k;
  std::vector<T> y(exact.y.size(), poison), gate_up(c.saved ? rows * 2 * c.width : 0, poison);
  FusedExpertsParams p{};
  fill(p, c, l, plan);
  p.weights_first = c.weights_first;
  std::vector<char> workspace(fused_experts_workspace_bytes_cuda(p), '\xff');
  p.y = y.data(), p.gate_up = c.saved ? gate_up.data() : nullptr, p.workspace = workspace.data();
  CHECK(fused_experts_cuda(p, nullptr).is_ok());

  FusedExpertsBackwardParams b{};
  fill(b, c, l, plan);
  b.gate_up = p.gate_up;
  std::vector<char> scratch(fused_experts_backward_workspace_bytes_cuda(b), '\xff');
  std::vector<T> dx(exact.dx.size(), poison), grad_w_gate_up(exact.grad_w_gate_up.size(), poison),
      grad_w_down(exact.grad_w_down.size(), poison);
  std::vector<float> grad_weights(rows, NAN);
  b.dy = l.dy.stored.data(), b.dy_stride = c.hidden;
  b.dx = dx.data(), b.grad_w_gate_up = grad_w_gate_up.data();
  b.grad_w_down = grad_w_down.data(), b.grad_weights = grad_weights.data();
  std::vector<T> grad_b_gate_up(exact.grad_b_gate_up.size(), poison),
      grad_b_down(exact.grad_b_down.size(), poison);
  b.grad_b_gate_up = grad_b_gate_up.data(), b.grad_b_down = grad_b_down.data();
  b.workspace = scratch.data();
  CHECK(fused_experts_backward_cuda(b, nullptr).is_ok());

  const double bound = sizeof(T) == 4 ? 1e-5 : std::is_same_v<T, fp16> ? 2e-3 : 1.5e-2;
  // Rounding carries some of [g; u] over a limit, where the slope jumps.
  const bool jumps = c.activation == KIMI_ACTIVATION_SWIGLU && std::is_same_v<T, bf16>;
  const double slopes = jumps ? 4e-2 : bound;
  compare(c, "y", y, exact.y, bound);
  compare(c, "dx", dx, exact.dx, slopes);
  compare(c, "grad_w_gate_up", grad_w_gate_up, exact.grad_w_gate_up, slopes);
  compare(c, "grad_w_down", grad_w_down, exact.grad_w_down, bound);
  compare(c, "grad_weights", grad_weights, exact.grad_weights, bound);
  compare(c, "grad_b_gate_up", grad_b_gate_up, exact.grad_b_gate_up, slopes);
  compare(c, "grad_b_down", grad_b_down, exact.grad_b_down, bound);
}

constexpr Case kCases[] = {
    {37, 72, 40, 5, 3, KIMI_ACTIVATION_SILU, true},    // 16 bytes divide everything
    {37, 64, 48, 9, 2, KIMI_ACTIVATION_GELU, false},   // [g; u] again
    {19, 33, 21, 4, 3, KIMI_ACTIVATION_SITU, true},    // nothing is divided
    {150, 64, 72, 3, 2, KIMI_ACTIVATION_SILU, false},  // more rows than a tile
    {1, 64, 64, 40, 1, KIMI_ACTIVATION_SILU, true},    // most experts without rows
    {37, 72, 40, 5, 3, KIMI_ACTIVATION_SWIGLU, true, true},
    {19, 33, 21, 4, 3, KIMI_ACTIVATION_GELU_TANH, false, true},
    {37, 64, 48, 5, 2, KIMI_ACTIVATION_RELU2, true},
    {37, 72, 40, 5, 3, KIMI_ACTIVATION_SILU, true, true},
    {37, 72, 40, 5, 3, KIMI_ACTIVATION_SILU, true, true, true},
    {37, 72, 40, 5, 3, KIMI_ACTIVATION_SILU, true, false, true},
    {37, 72, 40, 5, 3, KIMI_ACTIVATION_SILU, true, true, false, true},
};

template <class T>
void run_all() {
  for (int sm : {0, 80}) {
    CHECK(set_max_sm(sm).is_ok());
    uint64_t seed = 0;
    for (const Case& c : kCases) run<T>(c, seed++);
  }
  CHECK(set_max_sm(0).is_ok());
}

TEST(forward_and_backward_in_bf16) { run_all<bf16>(); }
TEST(forward_and_backward_in_fp16) { run_all<fp16>(); }
TEST(forward_and_backward_in_fp32) { run_all<float>(); }

// Tokens are permuted once before each product that would gather them: forward one, backward dy, x
// and, where [g; u] is computed again, x before that.
TEST(wide_experts_with_many_rows_are_permuted) {
  gemm::sm90::trial().permute = 72;
  for (bool saved : {true, false}) {
    const Case c = {60, 64, 72, 3, 2, KIMI_ACTIVATION_SILU, saved};
    const auto count = [&](int gather) {
      gemm::sm90::trial().gather = gather;
      const uint64_t before = simt::launches();
      run<bf16>(c, 3);
      return simt::launches() - before;
    };
    CHECK(count(119) == count(120) + (saved ? 3 : 4));
    gemm::sm90::trial().permute = 73;
    CHECK(count(119) == count(120));
    gemm::sm90::trial().permute = 72;
  }
  gemm::sm90::trial() = {};
}

TEST(no_tokens_give_zero_gradients_of_the_matrices) {
  const Case c = {0, 64, 32, 3, 2, KIMI_ACTIVATION_SILU, false};
  run<bf16>(c, 0);
}

}  // namespace

TEST_MAIN()
