// SPDX-License-Identifier: MIT
//
// Grouped products for kernels that run on the host: a case describes one, check_case runs it on a
// kernel and compares with a plain loop in fp64.
//
// Operands are small multiples of 1/16, so that every sum is exact in fp32 and what is stored as
// it is must have the very bits. Whatever is no part of an operand is NaN: padding between rows,
// rows that no index names, rows after the last group; and memory ends with the last element (ASan).
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/dtype.h"
#include "fused_experts/activate_product.h"
#include "gemm/product.h"
#include "simt.h"

namespace product_cases {

using namespace kimi;
using namespace kimi::gemm;
using experts::ActivateParams;
using experts::kPartial;
using experts::Pass;

enum class Epilogue { kStore, kActivate, kActivateBackward };

struct Kernel {
  Status (*store)(const Product&, const StoreParams&);
  Status (*activate)(const Product&, const ActivateParams&, Pass);
  bool (*serves)(const Product&, Epilogue);  // nullptr: all
};

enum Contiguous { kAlongDepth, kAlongOuter, kNeither };

struct Case {
  kimi_dtype dtype = KIMI_BFLOAT16;
  Grouping grouping = Grouping::kM;
  Epilogue epilogue = Epilogue::kStore;
  std::vector<int32_t> offsets{};
  int64_t num_rows = 0;                   // R
  int64_t rows = 0, cols = 0, depth = 0;  // rows if K-grouped, depth if M-grouped
  Contiguous a = kAlongDepth, b = kAlongDepth;
  int pad = 8, misalign = 0;  // elements: after each row of A and B, before the first one
  bool gather_a = false, gather_b = false;
  int divisor = 1;
  int poison = -1;  // this group's part of A is NaN, and its matrix of B
  kimi_dtype out_dtype = KIMI_FLOAT32;
  bool bias = false, accumulate = false;
  int out_pad = 0, out_misalign = 0;  // elements
  kimi_activation activation = KIMI_ACTIVATION_SILU;
  bool keep_gate_up = true, keep_hidden = true;  // kActivate
  uint64_t seed = 3;

  int groups() const { return static_cast<int>(offsets.size()); }
  int64_t begin(int e) const { return e == 0 ? 0 : offsets[e - 1]; }
  std::string text() const {
    std::string t =
        "dtype " + std::to_string(dtype) + (grouping == Grouping::kM ? " rows" : " depth") +
        " epilogue " + std::to_string(static_cast<int>(epilogue)) + " R " +
        std::to_string(num_rows) + " M " + std::to_string(rows) + " N " + std::to_string(cols) +
        " K " + std::to_string(depth) + " A " + std::to_string(a) + " B " + std::to_string(b) +
        " pad " + std::to_string(pad) + " misalign " + std::to_string(misalign) + " gather " +
        std::to_string(gather_a) + std::to_string(gather_b) + " out " + std::to_string(out_dtype) +
        " bias " + std::to_string(bias) + " accumulate " + std::to_string(accumulate) +
        " activation " + std::to_string(activation) + " seed " + std::to_string(seed) + " offsets";
    for (int32_t o : offsets) t += " " + std::to_string(o);
    return t;
  }
};

inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// `groups` matrices of outer x depth in NaN, the first element at a multiple of 16 bytes plus
// `misalign` elements.
template <class T>
class Operand {
 public:
  Operand(int64_t groups, int64_t outer, int64_t depth, Contiguous contiguous, int pad,
          int misalign) {
    const int64_t step = contiguous == kNeither ? 2 : 1;
    const bool by_depth = contiguous != kAlongOuter;
    outer_stride_ = by_depth ? depth * step + pad : step;
    depth_stride_ = by_depth ? step : outer * step + pad;
    const bool empty = groups * outer * depth == 0;
    group_stride_ = by_depth ? outer * outer_stride_ : depth * depth_stride_;
    const int64_t last = empty ? -1
                               : (groups - 1) * group_stride_ + (outer - 1) * outer_stride_ +
                                     (depth - 1) * depth_stride_;
    storage_.assign(static_cast<size_t>(misalign + last + 1), from_float<T>(kNaN));
    data_ = storage_.data() + misalign;  // operator new aligns to 16 bytes
  }
  T& at(int64_t group, int64_t outer, int64_t depth) {
    return data_[group * group_stride_ + outer * outer_stride_ + depth * depth_stride_];
  }
  Matrix matrix(const std::vector<int32_t>& index, int divisor) const {
    return {
        data_,  outer_stride_, depth_stride_, group_stride_, index.empty() ? nullptr : index.data(),
        divisor};
  }

 private:
  std::vector<T> storage_;
  T* data_;
  int64_t outer_stride_, depth_stride_, group_stride_;
};

// Output memory in canaries, and what it should hold afterwards. Sizes in elements.
template <class T>
struct Output {
  explicit Output(int64_t size, int misalign = 0)
      : storage(static_cast<size_t>(size + misalign), from_float<T>(-7.0f)),
        want(storage.begin(), storage.end()),
        tolerance(storage.size(), 0.0f),
        skip(misalign) {}
  T* data() { return storage.data() + skip; }
  // Within `error` of the exact value and half a unit in the last place of T.
  void expect(int64_t at, double exact, double error = 0.0) {
    const float rounded = to_float(from_float<T>(static_cast<float>(exact)));
    want[static_cast<size_t>(at + skip)] = from_float<T>(static_cast<float>(exact));
    const double unit = sizeof(T) == 4 ? 0 : std::is_same_v<T, bf16> ? 0x1p-7 : 0x1p-10;
    tolerance[static_cast<size_t>(at + skip)] =
        error == 0.0 ? 0.0f : static_cast<float>(error + unit * std::fabs(rounded));
  }
  void check(const char* name, const std::string& text) const {
    for (size_t i = 0; i < want.size(); ++i) {
      const float a = to_float(storage[i]), b = to_float(want[i]);
      if (std::isnan(a) && std::isnan(b)) continue;
      if (tolerance[i] == 0.0f ? bits_of(a) != bits_of(b) : !(std::fabs(a - b) <= tolerance[i]))
        check::fail(__FILE__, __LINE__,
                    std::string(name) + "[" + std::to_string(static_cast<int64_t>(i) - skip) +
                        "] = " + std::to_string(a) + ", expected " + std::to_string(b) + ": " +
                        text);
    }
  }
  std::vector<T> storage, want;
  std::vector<float> tolerance;
  int skip;
};

// With the bounds of Kimi K3, as below.
inline experts::Activation with_numbers(kimi_activation kind) {
  return {kind, {4, 25, 1, 0, 100, 100, 100}, 1.0f / 4, 1.0f / 25};
}

inline double activated(kimi_activation activation, double g, double u, double* slope_g,
                        double* slope_u) {
  const double s = 1 / (1 + std::exp(-g));
  double a = g * s, da = s + a * (1 - s), b = u, db = 1;
  if (activation == KIMI_ACTIVATION_GELU) {
    const double phi = std::erfc(-g * std::sqrt(0.5)) / 2;
    a = g * phi;
    da = phi + g * std::exp(-g * g / 2) * 0.3989422804014327;
  } else if (activation == KIMI_ACTIVATION_SITU) {
    const double tg = std::tanh(g / 4), tu = std::tanh(u / 25);
    a = 4 * tg * s;
    da = (1 - tg * tg) * s + a * (1 - s);
    b = 25 * tu;
    db = 1 - tu * tu;
  }
  *slope_g = da * b;
  *slope_u = a * db;
  return a * b;
}

template <class T>
class Check {
 public:
  Check(const Case& c, const Kernel& kernel) : c_(c), kernel_(kernel), random_(c.seed * 7919 + 13) {
    simt::settings().seed = c.seed;
    const bool by_rows = c.grouping == Grouping::kM;
    const int64_t b_outer = c.epilogue == Epilogue::kActivate ? 2 * c.cols : c.cols;
    make_index(index_a_, c.gather_a);
    make_index(index_b_, c.gather_b);
    const int64_t sources = sources_of(c.gather_a), b_sources = sources_of(c.gather_b);
    a_ = std::make_unique<Operand<T>>(1, by_rows ? sources : c.rows, by_rows ? c.depth : sources,
                                      c.a, c.pad, c.misalign);
    b_ = std::make_unique<Operand<T>>(by_rows ? c.groups() : 1, b_outer,
                                      by_rows ? c.depth : b_sources, c.b, c.pad, c.misalign);
    for (int e = 0; e < c.groups(); ++e) {
      for (int64_t r = c.begin(e); r < c.offsets[e]; ++r)
        if (by_rows)
          for (int64_t d = 0; d < c.depth; ++d) a(r, d) = value(1, e == c.poison);
        else {
          for (int64_t i = 0; i < c.rows; ++i) a(i, r) = value(1, e == c.poison);
          for (int64_t j = 0; j < c.cols; ++j) b(e, j, r) = value(16, e == c.poison);
        }
      if (by_rows)
        for (int64_t j = 0; j < b_outer; ++j)
          for (int64_t d = 0; d < c.depth; ++d) b(e, j, d) = value(16, e == c.poison);
    }
    product_.grouping = c.grouping;
    product_.dtype = c.dtype;
    product_.a = a_->matrix(index_a_, c.divisor);
    product_.b = b_->matrix(index_b_, c.divisor);
    product_.a.group_stride = -12345;  // means nothing there
    if (!by_rows) product_.b.group_stride = -12345;
    product_.groups = {c.offsets.data(), c.num_rows, c.groups()};
    product_.rows = c.rows;
    product_.depth = c.depth;
    product_.cols = c.cols;
  }

  // False where the kernel does not serve the case.
  bool run() {
    if (c_.epilogue == Epilogue::kActivate) return run_activate();
    if (c_.epilogue == Epilogue::kActivateBackward) return run_activate_backward();
    if (c_.out_dtype == KIMI_FLOAT32) return run_store<float>();
    return run_store<T>();
  }

 private:
  T value(int parts, bool poison) {
    const float v = static_cast<float>(static_cast<int>(random_() % 9) - 4);
    return from_float<T>(poison ? kNaN : v / static_cast<float>(parts));
  }
  int64_t sources_of(bool gather) const { return gather ? c_.num_rows + 5 : c_.num_rows; }
  void make_index(std::vector<int32_t>& index, bool gather) {
    if (!gather) return;
    std::vector<int32_t> all(static_cast<size_t>(sources_of(true)));
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
    std::shuffle(all.begin(), all.end(), random_);
    for (int64_t r = 0; r < c_.num_rows; ++r)
      index.push_back(all[static_cast<size_t>(r)] * c_.divisor +
                      static_cast<int32_t>(random_() % static_cast<unsigned>(c_.divisor)));
    index.push_back(0);  // never empty
  }
  int64_t source(const std::vector<int32_t>& index, int64_t r) const {
    return index.empty() ? r : index[static_cast<size_t>(r)] / c_.divisor;
  }
  T& a(int64_t outer, int64_t depth) {
    return c_.grouping == Grouping::kM ? a_->at(0, source(index_a_, outer), depth)
                                       : a_->at(0, outer, source(index_a_, depth));
  }
  T& b(int e, int64_t outer, int64_t depth) {
    return c_.grouping == Grouping::kM ? b_->at(e, outer, depth)
                                       : b_->at(0, outer, source(index_b_, depth));
  }
  // Row i of group e: of all rows if M-grouped, else of the group's matrix.
  double sum(int e, int64_t i, int64_t j) {
    const bool by_rows = c_.grouping == Grouping::kM;
    const int64_t first = by_rows ? 0 : c_.begin(e), row = by_rows ? c_.begin(e) : 0;
    const int64_t depth = by_rows ? c_.depth : c_.offsets[e] - first;
    if (e != widened_) {  // once a group: the conversions take longer than the products
      widened_ = e;
      const int64_t rows = by_rows ? c_.offsets[e] - row : c_.rows;
      const int64_t cols = c_.epilogue == Epilogue::kActivate ? 2 * c_.cols : c_.cols;
      wide_a_.clear(), wide_b_.clear();
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < depth; ++d) wide_a_.push_back(to_float(a(row + r, first + d)));
      for (int64_t c = 0; c < cols; ++c)
        for (int64_t d = 0; d < depth; ++d) wide_b_.push_back(to_float(b(e, c, first + d)));
    }
    const double *const x = wide_a_.data() + (i - row) * depth, *const y =
                                                                    wide_b_.data() + j * depth;
    double result = 0.0;
    for (int64_t d = 0; d < depth; ++d) result += x[d] * y[d];
    return result;
  }
  void for_each_row(const std::function<void(int, int64_t)>& visit) const {
    for (int e = 0; e < c_.groups(); ++e)
      for (int64_t r = c_.begin(e); r < c_.offsets[e]; ++r) visit(e, r);
  }
  template <class Run>
  bool launch(const Run& run) {
    if (kernel_.serves != nullptr && !kernel_.serves(product_, c_.epilogue)) return false;
    const Status status = run();
    if (!status.is_ok()) check::fail(__FILE__, __LINE__, status.message + ": " + c_.text());
    return true;
  }
  static bool divides(const void* address) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0;
  }

  template <class Out>
  bool run_store() {
    const bool by_rows = c_.grouping == Grouping::kM;
    const int64_t stride = c_.cols + c_.out_pad;
    const int64_t rows = by_rows ? c_.num_rows : c_.rows;
    Output<Out> out((by_rows ? 1 : c_.groups()) * rows * stride, c_.out_misalign);
    std::vector<T> bias(static_cast<size_t>(c_.groups() * c_.cols));
    for (T& b : bias) b = value(16, false);
    if (c_.accumulate)
      for (Out& old : out.storage) {
        old = from_float<Out>(to_float(value(16, false)));
        if (to_float(old) == 0.0f) old = from_float<Out>(-0.0f);  // whose sign an addition loses
        out.want[static_cast<size_t>(&old - out.storage.data())] = old;
      }
    for (int e = 0; e < (by_rows ? c_.groups() + 1 : c_.groups()); ++e) {
      const bool zero = e == c_.groups();
      const int64_t first = by_rows ? c_.begin(e) : 0;
      const int64_t last = !by_rows ? rows : zero ? c_.num_rows : c_.offsets[e];
      for (int64_t i = first; i < last; ++i)
        for (int64_t j = 0; j < c_.cols; ++j) {
          const int64_t at = (by_rows ? 0 : e * rows * stride) + i * stride + j;
          if (c_.accumulate && c_.begin(e) == c_.offsets[e]) continue;  // left alone
          double exact = zero ? 0.0 : sum(e, i, j);
          if (c_.bias && !zero) exact += to_float(bias[static_cast<size_t>(e * c_.cols + j)]);
          if (c_.accumulate) exact += to_float(out.data()[at]);
          out.expect(at, exact);
        }
    }
    StoreParams params{out.data(), stride, by_rows ? 0 : rows * stride, c_.out_dtype};
    params.bias = c_.bias ? bias.data() : nullptr;
    params.accumulate = c_.accumulate;
    params.wide = divides(out.data()) && stride * sizeof(Out) % 16 == 0 &&
                  (!c_.bias || (divides(bias.data()) && c_.cols * sizeof(T) % 16 == 0));
    if (!launch([&] { return kernel_.store(product_, params); })) return false;
    out.check("out", c_.text());
    return true;
  }

  bool run_activate() {
    const int64_t f = c_.cols;
    Output<T> gate_up(c_.num_rows * 2 * f, c_.out_misalign),
        hidden(c_.num_rows * f, c_.out_misalign);
    for_each_row([&](int e, int64_t r) {
      for (int64_t j = 0; j < f; ++j) {
        const double g = sum(e, r, j), u = sum(e, r, f + j);
        double unused;
        if (c_.keep_gate_up) gate_up.expect(r * 2 * f + j, g);
        if (c_.keep_gate_up) gate_up.expect(r * 2 * f + f + j, u);
        if (c_.keep_hidden)
          hidden.expect(r * f + j, activated(c_.activation, g, u, &unused, &unused), 1e-4);
      }
    });
    ActivateParams params{};
    params.activation = with_numbers(c_.activation);
    params.gate_up = c_.keep_gate_up ? gate_up.data() : nullptr;
    params.hidden = c_.keep_hidden ? hidden.data() : nullptr;
    params.wide = divides(gate_up.data()) && divides(hidden.data()) && f * sizeof(T) % 16 == 0;
    if (!launch([&] { return kernel_.activate(product_, params, Pass::kForward); })) return false;
    gate_up.check("gate_up", c_.text());
    hidden.check("hidden", c_.text());
    return true;
  }

  bool run_activate_backward() {
    const int64_t f = c_.cols, partials = (f + kPartial - 1) / kPartial;
    Output<T> saved(c_.num_rows * 2 * f, c_.out_misalign),
        grad(c_.num_rows * 2 * f, c_.out_misalign), hidden(c_.num_rows * f, c_.out_misalign);
    Output<float> partial(c_.num_rows * partials);
    std::vector<int32_t> from(static_cast<size_t>(c_.num_rows));
    std::vector<float> weights(from.size());
    for (size_t i = 0; i < from.size(); ++i) {
      from[i] = static_cast<int32_t>(i);
      weights[i] = static_cast<float>(random_() % 17) / 16.0f;
    }
    std::shuffle(from.begin(), from.end(), random_);
    for (T& v : saved.storage) v = value(2, false);
    saved.want = saved.storage;
    for_each_row([&](int e, int64_t r) {
      const double weight = weights[static_cast<size_t>(from[static_cast<size_t>(r)])];
      std::vector<double> dot(static_cast<size_t>(partials), 0.0);
      for (int64_t j = 0; j < f; ++j) {
        const double dh = sum(e, r, j), g = to_float(saved.data()[r * 2 * f + j]),
                     u = to_float(saved.data()[r * 2 * f + f + j]);
        double slope_g, slope_u;
        const double h = activated(c_.activation, g, u, &slope_g, &slope_u);
        const double error = 1e-5 * (1.0 + std::fabs(dh));
        hidden.expect(r * f + j, weight * h, 1e-5);
        grad.expect(r * 2 * f + j, weight * dh * slope_g, error);
        grad.expect(r * 2 * f + f + j, weight * dh * slope_u, error);
        dot[static_cast<size_t>(j / kPartial)] += dh * h;
      }
      for (int64_t i = 0; i < partials; ++i)
        partial.expect(r * partials + i, dot[static_cast<size_t>(i)], 1e-3);
    });
    ActivateParams params{};
    params.activation = with_numbers(c_.activation);
    params.gate_up = saved.data();
    params.hidden = hidden.data();
    params.grad_gate_up = grad.data();
    params.source = from.data();
    params.weights = weights.data();
    params.partial = partial.data();
    params.wide = divides(saved.data()) && divides(grad.data()) && divides(hidden.data()) &&
                  f * sizeof(T) % 16 == 0;
    if (!launch([&] { return kernel_.activate(product_, params, Pass::kBackward); })) return false;
    saved.check("gate_up", c_.text());
    grad.check("grad_gate_up", c_.text());
    hidden.check("hidden", c_.text());
    partial.check("partial", c_.text());
    return true;
  }

  const Case& c_;
  const Kernel& kernel_;
  std::mt19937 random_;
  std::vector<int32_t> index_a_, index_b_;
  int widened_ = -1;  // the group of wide_a_, wide_b_
  std::vector<double> wide_a_, wide_b_;
  std::unique_ptr<Operand<T>> a_, b_;
  Product product_{};
};

inline bool check_case(const Case& c, const Kernel& kernel) {
  return dispatch(c.dtype, [&]<class T>() { return Check<T>(c, kernel).run(); });
}

}  // namespace product_cases
