// SPDX-License-Identifier: MIT
//
// The optimizer's CUDA passes, run on the host, against the portable CPU engine with the sums over
// blocks written out again: bit for bit.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/dtype.h"
#include "muon_clip/numbers.h"
#include "simt.h"

namespace {

using namespace kimi;
using namespace kimi::muon_clip_math;
using muon_clip_cpu::kPortableEngine;

using Bytes = std::vector<uint8_t>;
const std::vector<int64_t> kSizes = {1, 0, 7, 8, 9, 511, 513, 8191, 8192, 8200, 20001};

std::string g_case;

void require(bool condition, const std::string& what) {
  if (!condition)
    check::fail(__FILE__, __LINE__,
                what + ": " + g_case + " seed " + std::to_string(simt::settings().seed));
}

// Tensors of one dtype, each `offset` elements behind an address that 16 divides.
struct List {
  std::vector<Bytes> memory;
  std::vector<void*> at;

  List(const std::vector<int64_t>& sizes, kimi_dtype dtype, int64_t offset, unsigned seed,
       bool positive = false) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, 1.0f);
    const int64_t bytes = size_of(dtype);
    for (int64_t n : sizes) {
      memory.emplace_back(static_cast<size_t>((n + offset) * bytes));
      at.push_back(memory.back().data() + offset * bytes);
      for (int64_t i = 0; i < n; ++i) {
        const float x = positive ? std::abs(normal(random)) : normal(random);
        dispatch(dtype, [&]<class T>() { static_cast<T*>(at.back())[i] = from_float<T>(x); });
      }
    }
  }
  List(const List& other) : memory(other.memory) {
    for (size_t t = 0; t < memory.size(); ++t) {
      const auto distance = static_cast<uint8_t*>(other.at[t]) - other.memory[t].data();
      at.push_back(memory[t].data() + distance);
    }
  }
  bool operator==(const List& other) const { return memory == other.memory; }
  template <class T = void>
  T* const* list() const {
    return reinterpret_cast<T* const*>(at.data());
  }
};

static_assert(__STDCPP_DEFAULT_NEW_ALIGNMENT__ >= 16);

const double kInfinity = std::numeric_limits<double>::infinity();
// Pieces 2 t and 2 t + 1 of tensor t; the tensors with t % 4 == 2 are left alone.
struct Flags {
  std::vector<double> squares;
  std::vector<int64_t> pieces;
  explicit Flags(size_t count) {
    for (size_t t = 0; t < count; ++t) {
      squares.push_back(1.0 + static_cast<double>(t));
      squares.push_back(t % 8 == 2 ? std::nan("") : t % 8 == 6 ? kInfinity : 2.0);
      pieces.push_back(static_cast<int64_t>(2 * t));
      pieces.push_back(static_cast<int64_t>(2 * t + 2));
    }
  }
  static bool moves(size_t t) { return t % 4 != 2; }
};

void compare_momentum(const std::vector<int64_t>& sizes, kimi_dtype grad, kimi_dtype buffer,
                      int64_t offset, bool nesterov, bool maximize, int64_t update_offset = 0) {
  const List grads(sizes, grad, offset, 1);
  List want(sizes, buffer, offset, 2), got = want;
  List updates(sizes, KIMI_FLOAT32, update_offset, 3), expected = updates;
  const Flags flags(sizes.size());
  MuonMomentumParams p{};
  p.grads = grads.list<const void>(), p.buffers = got.list(), p.updates = updates.list<float>();
  p.sizes = sizes.data(), p.count = static_cast<int64_t>(sizes.size()), p.momentum = 0.95;
  p.squares = flags.squares.data(), p.pieces = flags.pieces.data();
  p.nesterov = nesterov, p.maximize = maximize, p.grad_dtype = grad, p.buffer_dtype = buffer;
  require(muon_momentum_cuda(p, nullptr).is_ok(), "status");
  for (size_t t = 0; t < sizes.size(); ++t) {
    float* update = expected.list<float>()[t];
    if (Flags::moves(t))
      kPortableEngine.momentum(momentum_of(p), grads.at[t], grad, want.at[t], buffer, update,
                               sizes[t]);
    else
      std::fill_n(update, sizes[t], 0.0f);
  }
  require(got == want, "buffers");
  require(updates == expected, "updates");
}

TEST(momentum) {
  uint64_t seed = 0;
  for (kimi_dtype grad : {KIMI_FLOAT32, KIMI_BFLOAT16, KIMI_FLOAT16})
    for (kimi_dtype buffer : {KIMI_FLOAT32, KIMI_BFLOAT16, KIMI_FLOAT16}) {
      simt::settings().seed = seed++;
      g_case = "grad " + std::to_string(grad) + " buffer " + std::to_string(buffer);
      compare_momentum(kSizes, grad, buffer, seed % 3 == 0 ? 3 : 0, seed % 2 == 0, seed % 4 > 1);
    }
}

TEST(updates_that_lie_anywhere) {
  g_case = "updates one element behind";
  compare_momentum(kSizes, KIMI_FLOAT32, KIMI_FLOAT32, 0, true, false, 1);
}

TEST(a_list_of_several_launches) {
  g_case = "1500 tensors";
  const uint64_t before = simt::launches();
  compare_momentum(std::vector<int64_t>(1500, 3), KIMI_FLOAT32, KIMI_FLOAT32, 0, true, false);
  CHECK(simt::launches() == before + 3);
}

TEST(update) {
  struct Shape {
    int64_t rows, cols, param_stride, direction_stride;
  };
  const std::vector<Shape> shapes = {{3, 5, 5, 5},    {5, 7, 10, 7},       {0, 4, 4, 4},
                                     {4, 0, 4, 4},    {300, 40, 48, 64},   {1, 20001, 20001, 20001},
                                     {7, 16, 16, 24}, {90, 200, 200, 200}, {7, 16, 16, 24},
                                     {5, 16, 24, 20}, {3, 3, 3, 3},        {1, 1, 9, 9}};
  std::vector<int64_t> flat, sizes;
  std::vector<double> rates;
  for (const Shape& s : shapes) {
    for (int64_t n : {s.rows, s.cols, s.param_stride, s.direction_stride}) flat.push_back(n);
    sizes.push_back(s.rows * std::max(s.param_stride, s.direction_stride));
    rates.push_back(0.01 * static_cast<double>(rates.size() + 1));
  }
  uint64_t seed = 0;
  for (kimi_dtype param : {KIMI_FLOAT32, KIMI_BFLOAT16, KIMI_FLOAT16})
    for (kimi_dtype direction : {KIMI_FLOAT32, KIMI_BFLOAT16})
      for (bool cautious : {false, true}) {
        simt::settings().seed = seed++;
        g_case = "param " + std::to_string(param) + " direction " + std::to_string(direction) +
                 (cautious ? " cautious" : "");
        const int64_t offset = seed % 3 == 0 ? 1 : 0;
        const bool copies = seed % 2 == 0, scalars = seed % 4 < 2;
        List want(sizes, param, offset, 4), got = want;
        List copied(sizes, KIMI_BFLOAT16, offset, 5), expected = copied;
        const List directions(sizes, direction, offset, 6);
        const Flags flags(sizes.size());
        const double lr = 0.3, weight_decay = 0.7;
        MuonUpdateParams p{};
        p.params = got.list(), p.directions = directions.list<const void>();
        p.copies = copies ? copied.list() : nullptr;
        p.shapes = flat.data(), p.rates = rates.data(),
        p.count = static_cast<int64_t>(sizes.size());
        p.squares = flags.squares.data(), p.pieces = flags.pieces.data();
        p.lr = scalars ? &lr : nullptr, p.weight_decay = scalars ? &weight_decay : nullptr;
        p.decay = 0.05, p.cautious = cautious, p.param_dtype = param, p.direction_dtype = direction;
        require(muon_update_cuda(p, nullptr).is_ok(), "status");
        const Decay decay = decay_of(p.decay, p.lr, p.weight_decay, cautious);
        for (size_t t = 0; t < shapes.size(); ++t)
          for (int64_t i = 0; Flags::moves(t) && i < shapes[t].rows; ++i) {
            const int64_t at = i * shapes[t].param_stride;
            const auto shifted = [](void* x, kimi_dtype dtype, int64_t n) {
              return static_cast<char*>(x) + n * size_of(dtype);
            };
            kPortableEngine.update(
                decay, rate_of(rates[t], p.lr), shifted(want.at[t], param, at), param,
                shifted(directions.at[t], direction, i * shapes[t].direction_stride), direction,
                copies ? shifted(expected.at[t], KIMI_BFLOAT16, at) : nullptr, shapes[t].cols);
          }
        require(got == want, "parameters");
        require(copied == expected, "copies");
      }
}

double expected_sum(const void* x, kimi_dtype dtype, int64_t n) {
  double lanes[kBlockLanes] = {};
  for (int64_t b = 0; b * kBlock < n; ++b)
    lanes[b % kBlockLanes] +=
        kPortableEngine.squares(static_cast<const char*>(x) + b * kBlock * size_of(dtype), dtype,
                                std::min(kBlock, n - b * kBlock));
  return tree(lanes, kBlockLanes);
}

TEST(adamw) {
  uint64_t seed = 0;
  for (kimi_dtype param : {KIMI_FLOAT32, KIMI_BFLOAT16, KIMI_FLOAT16})
    for (kimi_dtype grad : {KIMI_FLOAT32, KIMI_BFLOAT16, KIMI_FLOAT16}) {
      simt::settings().seed = seed++;
      const bool measure = seed % 2 == 0, scalars = seed % 3 == 0;
      g_case = "param " + std::to_string(param) + " grad " + std::to_string(grad) +
               (measure ? " measure" : "");
      const int64_t offset = seed % 4 == 0 ? 1 : 0;
      const size_t count = kSizes.size();
      List grads(kSizes, grad, offset, 7);
      List want[] = {List(kSizes, param, offset, 8),
                     List(kSizes, KIMI_FLOAT32, seed % 4 == 3 ? 1 : 0, 9),
                     List(kSizes, KIMI_FLOAT32, seed % 4 == 2 ? 1 : 0, 10, true)};
      List got[] = {want[0], want[1], want[2]};
      if (measure)
        for (size_t t = 2; t < count; t += 4)
          dispatch(grad, [&]<class T>() {
            T* x = static_cast<T*>(grads.at[t]);
            x[kSizes[t] / 2] = from_float<T>(t % 8 == 2 ? std::nanf("") : -INFINITY);
          });
      Flags flags(count);
      if (measure) flags.squares.assign(2 * count, 0.0);
      for (size_t t = 0; measure && t < count; ++t) flags.squares[2 * t] = -1.0;
      std::vector<float> steps(count);
      std::vector<float*> counters;
      for (size_t t = 0; t < count; ++t) {
        steps[t] = static_cast<float>(t == 3 ? 100000 : t);
        counters.push_back(&steps[t]);
      }
      std::vector<double> workspace(count + 20);
      const double lr = 0.3, weight_decay = 0.7;
      const float scale = 0.11f;
      AdamwParams p{};
      p.params = got[0].list(), p.grads = grads.list<const void>();
      p.exp_avgs = got[1].list<float>(), p.exp_avg_sqs = got[2].list<float>();
      p.steps = counters.data(), p.sizes = kSizes.data(), p.count = static_cast<int64_t>(count);
      p.lr_factor = scalars ? &lr : nullptr;
      p.weight_decay_factor = scalars ? &weight_decay : nullptr;
      p.scale = scalars ? &scale : nullptr;
      p.squares = flags.squares.data(), p.pieces = flags.pieces.data(), p.measure = measure;
      p.workspace = workspace.data();
      p.lr = 0.02, p.beta1 = 0.9, p.beta2 = 0.999, p.eps = 1e-8, p.weight_decay = 0.1;
      p.cautious = seed % 2, p.maximize = seed % 4 > 1, p.param_dtype = param, p.grad_dtype = grad;
      require(adamw_cuda(p, nullptr).is_ok(), "status");
      for (size_t t = 0; t < count; ++t) {
        const float before = static_cast<float>(t == 3 ? 100000 : t);
        if (measure) {
          const double flag = flags.squares[2 * t];
          require(Flags::moves(t) ? flag == 0.0 : std::isnan(flag), "flags");
        }
        require(steps[t] == before + (Flags::moves(t) ? 1.0f : 0.0f), "steps");
        if (Flags::moves(t))
          kPortableEngine.adamw(moments_of(p, before + 1), want[0].at[t], param, grads.at[t], grad,
                                static_cast<float*>(want[1].at[t]),
                                static_cast<float*>(want[2].at[t]), kSizes[t], nullptr, 0);
      }
      require(got[0] == want[0] && got[1] == want[1] && got[2] == want[2], "parameters, moments");
    }
}

// More tensors than a block counts, of which those without elements have nothing but their counts.
TEST(adamw_of_many_and_of_empty_tensors) {
  for (int64_t size : {0, 2}) {
    const std::vector<int64_t> sizes(300, size);
    List x(sizes, KIMI_FLOAT32, 0, 12);
    std::vector<float> steps(sizes.size(), 4.0f);
    std::vector<float*> counters;
    for (float& step : steps) counters.push_back(&step);
    AdamwParams p{};
    p.params = x.list(), p.grads = x.list<const void>();
    p.exp_avgs = p.exp_avg_sqs = x.list<float>();
    p.steps = counters.data(), p.sizes = sizes.data(), p.count = 300;
    CHECK(adamw_cuda(p, nullptr).is_ok());
    CHECK(steps == std::vector<float>(sizes.size(), 5.0f));
  }
}

TEST(squares_and_the_factor_that_clips) {
  uint64_t seed = 0;
  for (kimi_dtype dtype : {KIMI_FLOAT32, KIMI_BFLOAT16, KIMI_FLOAT16}) {
    simt::settings().seed = seed++;
    g_case = "dtype " + std::to_string(dtype);
    std::vector<int64_t> sizes(1010, 3);  // more than a launch takes
    std::copy(kSizes.begin(), kSizes.end(), sizes.begin() + 3);
    if (dtype == KIMI_BFLOAT16) sizes.assign(1, 260 * kBlock + 5);
    const List x(sizes, dtype, dtype == KIMI_FLOAT16 ? 1 : 0, 11);
    const size_t count = sizes.size();
    std::vector<int64_t> places(count);
    size_t blocks = 1;
    for (size_t t = 0; t < count; ++t) {
      places[t] = static_cast<int64_t>(count - 1 - t);
      blocks += static_cast<size_t>((sizes[t] + kBlock - 1) / kBlock);
    }
    std::vector<double> got(count, -1.0), workspace(blocks);
    SquaresParams p{};
    p.x = x.list<const void>(), p.sizes = sizes.data(), p.places = places.data();
    p.squares = got.data(), p.workspace = workspace.data();
    p.count = static_cast<int64_t>(count), p.dtype = dtype;
    require(squares_cuda(p, nullptr).is_ok(), "status");
    for (size_t t = 0; t < count; ++t)
      require(got[count - 1 - t] == expected_sum(x.at[t], dtype, sizes[t]), "sum");
  }
  for (size_t count : {size_t{1}, size_t{40}, size_t{5000}}) {
    const Flags flags(count);
    double lanes[kTensorLanes] = {}, workspace[kTensorLanes];
    for (size_t t = 0; t < count; ++t)
      for (size_t i = 2 * t; Flags::moves(t) && i < 2 * t + 2; ++i)
        lanes[t % kTensorLanes] += flags.squares[i];
    const double sum = tree(lanes, kTensorLanes);
    float factor = -1.0f;
    ClipFactorParams p{};
    p.squares = flags.squares.data(), p.pieces = flags.pieces.data(), p.factor = &factor;
    p.workspace = workspace, p.count = static_cast<int64_t>(count), p.max_norm = 0.5;
    require(clip_factor_cuda(p, nullptr).is_ok(), "status");
    require(factor == clip_factor_of(sum, 0.5) && factor < 1.0f, "factor");
  }
}

}  // namespace

TEST_MAIN()
