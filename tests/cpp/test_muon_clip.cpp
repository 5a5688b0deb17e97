// SPDX-License-Identifier: MIT
// The optimizer's passes through the C API: every instruction set and number of threads gives the
// portable engine's bits, and those are the formulas of muon_clip.h.
#include "engines.h"

using namespace kimi::test;

namespace {

constexpr int64_t kSizes[] = {1, 15, 40000, 0, 70001};
constexpr int64_t kCount = 5;

// Tensors of kSizes, of one dtype.
struct List {
  std::vector<Tensor> tensors;
  std::vector<void*> addresses;

  List(kimi_dtype dtype, uint32_t seed, bool positive = false) {
    Random random(seed);
    for (int64_t n : kSizes) {
      tensors.emplace_back(n, dtype);
      for (int64_t i = 0; i < n; ++i) {
        const double x = random.unit();
        tensors.back().set(i, positive ? x * x : x);
      }
      addresses.push_back(tensors.back().data.get());
    }
  }
  template <class T = void>
  T* const* list() {
    return reinterpret_cast<T* const*>(addresses.data());
  }
};

struct Results {
  List param, grad, buffer, update, exp_avg, exp_avg_sq, copy;
  double squares[kCount] = {}, plain_squares[kCount] = {}, measured[2 * kCount] = {-1};
  float steps[kCount] = {0, 1, 2, 3, 4}, factor = 0;

  Results(kimi_dtype param_dtype, kimi_dtype grad_dtype, kimi_dtype buffer_dtype)
      : param(param_dtype, 1),
        grad(grad_dtype, 2),
        buffer(buffer_dtype, 3),
        update(KIMI_FLOAT32, 4),
        exp_avg(KIMI_FLOAT32, 5),
        exp_avg_sq(KIMI_FLOAT32, 6, true),
        copy(KIMI_BFLOAT16, 7) {}

  bool same_bits(const Results& other) const {
    const List* mine[] = {&param, &buffer, &update, &exp_avg, &exp_avg_sq, &copy};
    const List* others[] = {&other.param,   &other.buffer,     &other.update,
                            &other.exp_avg, &other.exp_avg_sq, &other.copy};
    bool same = std::memcmp(squares, other.squares, sizeof squares) == 0 &&
                std::memcmp(plain_squares, other.plain_squares, sizeof squares) == 0 &&
                std::memcmp(measured, other.measured, sizeof measured) == 0 &&
                std::memcmp(steps, other.steps, sizeof steps) == 0 && factor == other.factor;
    for (int l = 0; l < 6; ++l)
      for (int64_t t = 0; t < kCount; ++t)
        same = same && mine[l]->tensors[size_t(t)].same_bits(others[l]->tensors[size_t(t)]);
    return same;
  }
};

constexpr double kMomentum = 0.95, kRate = 0.02, kDecay = 0.01;
constexpr double kLr = 1e-2, kBeta1 = 0.9, kBeta2 = 0.95, kEps = 1e-8, kWeightDecay = 0.1;

bool run(Results& r, bool nesterov, bool maximize, bool cautious) {
  kimi_muon_momentum_params momentum = {};
  momentum.grads = r.grad.list<const void>(), momentum.buffers = r.buffer.list();
  momentum.updates = r.update.list<float>(), momentum.sizes = kSizes;
  momentum.count = kCount, momentum.momentum = kMomentum;
  momentum.nesterov = nesterov, momentum.maximize = maximize;
  momentum.grad_dtype = r.grad.tensors[0].dtype, momentum.buffer_dtype = r.buffer.tensors[0].dtype;
  if (kimi_muon_momentum(&momentum, KIMI_DEVICE_CPU, nullptr) != KIMI_OK) return false;

  // Rows of 7 of the long tensors, 10 and 7 apart; the others whole.
  const int64_t shapes[] = {1,  1, 1, 1, 3, 5, 5, 5,     4000,  7,
                            10, 7, 0, 3, 3, 3, 1, 70001, 70001, 70001};
  const double rates[] = {kRate, kRate, kRate, kRate, kRate};
  kimi_muon_update_params update = {};
  update.params = r.param.list(), update.directions = r.update.list<const void>();
  update.copies = r.copy.list(), update.shapes = shapes, update.rates = rates;
  update.count = kCount, update.decay = kDecay, update.cautious = cautious;
  update.param_dtype = r.param.tensors[0].dtype, update.direction_dtype = KIMI_FLOAT32;
  if (kimi_muon_update(&update, KIMI_DEVICE_CPU, nullptr) != KIMI_OK) return false;

  // Flags are written to the first of two places each.
  const int64_t pieces[] = {0, 2, 2, 4, 4, 6, 6, 8, 8, 10}, places[] = {0, 1, 2, 3, 4};
  std::vector<float*> steps;
  for (float& step : r.steps) steps.push_back(&step);
  kimi_adamw_params adamw = {};
  adamw.params = r.param.list(), adamw.grads = r.grad.list<const void>();
  adamw.exp_avgs = r.exp_avg.list<float>(), adamw.exp_avg_sqs = r.exp_avg_sq.list<float>();
  adamw.sizes = kSizes, adamw.steps = steps.data(), adamw.count = kCount, adamw.lr = kLr;
  adamw.beta1 = kBeta1, adamw.beta2 = kBeta2, adamw.eps = kEps, adamw.weight_decay = kWeightDecay;
  adamw.maximize = maximize, adamw.cautious = cautious;
  adamw.param_dtype = r.param.tensors[0].dtype, adamw.grad_dtype = r.grad.tensors[0].dtype;
  adamw.squares = r.measured, adamw.pieces = pieces, adamw.measure = 1;
  if (kimi_adamw(&adamw, KIMI_DEVICE_CPU, nullptr) != KIMI_INVALID_ARGUMENT) return false;
  const Workspace of_adamw(adamw, kimi_adamw_workspace_bytes);
  if (kimi_adamw(&adamw, KIMI_DEVICE_CPU, nullptr) != KIMI_OK) return false;

  kimi_squares_params squares = {};
  squares.x = r.update.list<const void>(), squares.sizes = kSizes, squares.count = kCount;
  squares.places = places, squares.squares = r.squares, squares.dtype = KIMI_FLOAT32;
  const Workspace of_squares(squares, kimi_squares_workspace_bytes);
  if (kimi_squares(&squares, KIMI_DEVICE_CPU, nullptr) != KIMI_OK) return false;
  squares.x = r.grad.list<const void>(), squares.dtype = r.grad.tensors[0].dtype;
  squares.squares = r.plain_squares;
  if (kimi_squares(&squares, KIMI_DEVICE_CPU, nullptr) != KIMI_OK) return false;

  kimi_clip_factor_params clip = {};
  const int64_t whole[] = {0, 1, 1, 2, 2, 3, 3, 4, 4, 5};
  clip.squares = r.plain_squares, clip.pieces = whole, clip.count = kCount, clip.factor = &r.factor;
  clip.max_norm = 1.0;
  const Workspace of_clip(clip, kimi_clip_factor_workspace_bytes);
  return kimi_clip_factor(&clip, KIMI_DEVICE_CPU, nullptr) == KIMI_OK;
}

bool close(double got, double want, double relative) {
  return std::fabs(got - want) <= relative * (std::fabs(want) + 1);
}

// The formulas in fp64, on the tensors where every pass sees all elements.
void test_formulas(Results& r, const Results& start, bool nesterov, bool maximize, bool cautious,
                   double ulp) {
  bool ok = true;
  for (size_t t : {0, 1, 4})
    for (int64_t i = 0; i < kSizes[t]; ++i) {
      const double g = (maximize ? -1 : 1) * start.grad.tensors[t].get(i);
      const double b = start.buffer.tensors[t].get(i) * kMomentum + g * (1 - kMomentum);
      const double u = nesterov ? g * (1 - kMomentum) + b * kMomentum : b;
      double p = start.param.tensors[t].get(i);
      p = p * (cautious && u * p <= 0 ? 1 : 1 - kDecay) - kRate * u;
      ok = ok && close(r.buffer.tensors[t].get(i), b, ulp) &&
           close(r.update.tensors[t].get(i), u, 1e-6);
      ok = ok && close(r.copy.tensors[t].get(i), p, 1.0 / 64);
      const double m = start.exp_avg.tensors[t].get(i) * kBeta1 + g * (1 - kBeta1);
      const double v = start.exp_avg_sq.tensors[t].get(i) * kBeta2 + g * g * (1 - kBeta2);
      const double step = double(t + 1);
      const double root = std::sqrt(v) / std::sqrt(1 - std::pow(kBeta2, step)) + kEps;
      p = p * (cautious && m * p <= 0 ? 1 : 1 - kLr * kWeightDecay) -
          kLr / (1 - std::pow(kBeta1, step)) * m / root;
      ok = ok && close(r.exp_avg.tensors[t].get(i), m, 1e-6) &&
           close(r.exp_avg_sq.tensors[t].get(i), v, 1e-6) &&
           close(r.param.tensors[t].get(i), p, 2 * ulp);
    }
  double all = 0;
  for (size_t t = 0; t < kCount; ++t) {
    double sum = 0, plain = 0;
    for (int64_t i = 0; i < kSizes[t]; ++i) {
      sum += r.update.tensors[t].get(i) * r.update.tensors[t].get(i);
      plain += r.grad.tensors[t].get(i) * r.grad.tensors[t].get(i);
    }
    all += plain;
    ok = ok && close(r.squares[t], sum, 1e-12) && close(r.plain_squares[t], plain, 1e-12) &&
         r.measured[2 * t] == 0 && r.steps[t] == float(t + 1);
  }
  ok = ok && close(r.factor, 1 / std::sqrt(all), 1e-6);
  // Elements between the rows of a strided parameter stay as they were, but for AdamW's pass.
  ok = ok && r.copy.tensors[2].get(8) == start.copy.tensors[2].get(8);
  check(ok, "formulas: nesterov %d, maximize %d, cautious %d", nesterov, maximize, cautious);
}

void test_refusals() {
  kimi_muon_momentum_params momentum = {};
  momentum.count = 1;
  check(kimi_muon_momentum(&momentum, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT,
        "no lists");
  Results r(KIMI_FLOAT32, KIMI_FLOAT32, KIMI_FLOAT32);
  momentum.grads = r.grad.list<const void>(), momentum.buffers = r.buffer.list();
  momentum.updates = r.update.list<float>(), momentum.sizes = kSizes, momentum.momentum = 1.5;
  check(kimi_muon_momentum(&momentum, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT,
        "a momentum over 1");
  momentum.momentum = 0.5, momentum.squares = r.squares;
  check(kimi_muon_momentum(&momentum, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT,
        "squares without pieces");
  kimi_clip_factor_params clip = {};
  check(kimi_clip_factor(&clip, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT, "no tensors");
}

}  // namespace

int main() {
  for (kimi_dtype low : {KIMI_FLOAT32, KIMI_BFLOAT16, KIMI_FLOAT16})
    for (int flags = 0; flags < 8; ++flags) {
      const bool nesterov = flags & 1, maximize = flags & 2, cautious = flags & 4;
      const kimi_dtype grad = flags & 1 ? KIMI_FLOAT32 : low;
      std::unique_ptr<Results> first;
      each_engine([&] {
        auto r = std::make_unique<Results>(low, grad, low);
        check(run(*r, nesterov, maximize, cautious), "run");
        if (first) {
          check(r->same_bits(*first), "bits: dtype %d, flags %d", int(low), flags);
          return;
        }
        const Results start(low, grad, low);
        test_formulas(*r, start, nesterov, maximize, cautious,
                      low == KIMI_FLOAT32 ? 1e-6 : 1.0 / 64);
        first = std::move(r);
      });
    }
  test_refusals();
  return report("muon_clip");
}
