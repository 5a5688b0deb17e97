// SPDX-License-Identifier: MIT
//
// newton_schulz for kernels that run on the host: a case describes matrices and what is asked, run()
// gives their images, exact() those in fp64. What is no part of a matrix is NaN, and memory ends with
// the last element (ASan).
#pragma once

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
#include "common/sm.h"
#include "newton_schulz/cuda.h"
#include "simt.h"

namespace newton_schulz_cases {

using namespace kimi;
using Numbers = std::vector<double>;

inline constexpr float kQuintic[] = {3.4445f, -4.7750f, 2.0315f};
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Case {
  int64_t rows = 0, cols = 0, count = 1;
  kimi_newton_schulz_method method = KIMI_NEWTON_SCHULZ_GRAM;
  kimi_dtype dtype = KIMI_FLOAT16, g_dtype = KIMI_FLOAT32, x_dtype = KIMI_FLOAT32;
  std::vector<int32_t> restarts{3};
  int steps = 5;
  bool cubic = false;
  bool turned = false;        // columns are contiguous
  int pad = 0, misalign = 0;  // elements: after each line, before the first
  bool scattered = false;     // outputs that are not equidistant
  float eps = 0.0f;
  int64_t at_once = 0;    // matrices of a stack; 0: as run() decides
  bool clusters = false;  // whatever run() decides
  bool aol = false;
  uint64_t seed = 3;

  std::string text() const {
    std::string t = std::to_string(rows) + " x " + std::to_string(cols) + " x " +
                    std::to_string(count) + " method " + std::to_string(method) + " dtypes " +
                    std::to_string(dtype) + std::to_string(g_dtype) + std::to_string(x_dtype) +
                    " steps " + std::to_string(steps) + " cubic " + std::to_string(cubic) +
                    " turned " + std::to_string(turned) + " pad " + std::to_string(pad) +
                    " misalign " + std::to_string(misalign) + " scattered " +
                    std::to_string(scattered) + " clusters " + std::to_string(clusters) + " aol " +
                    std::to_string(aol) + " seed " + std::to_string(seed) + " restarts";
    for (int32_t r : restarts) t += " " + std::to_string(r);
    return t;
  }
};

// Matrices of one shape in memory that ends with them, lines apart by `pad` elements.
class Stack {
 public:
  Stack(const Case& c, kimi_dtype dtype, bool scattered)
      : c_(c), dtype_(dtype), line_((c.turned ? c.rows : c.cols) + c.pad) {
    const int64_t lines = c.turned ? c.cols : c.rows;
    for (int64_t e = 0; e < c.count; ++e) {
      starts_.push_back(c.misalign + e * lines * line_ + (scattered ? e * e : 0));
      size_ = starts_.back() + lines * line_ - c.pad;
    }
    bytes_.assign(static_cast<size_t>(size_ * size_of(dtype)), 0xff);  // NaN
  }
  void* at(int64_t e) { return bytes_.data() + starts_[size_t(e)] * size_of(dtype_); }
  int64_t row_stride() const { return c_.turned ? 1 : line_; }
  int64_t col_stride() const { return c_.turned ? line_ : 1; }
  void set(int64_t e, const Numbers& values) {
    each(
        [&](int64_t i, int64_t j, auto* to) {
          using T = std::remove_pointer_t<decltype(to)>;
          *to = from_float<T>(static_cast<float>(values[size_t(i * c_.cols + j)]));
        },
        e);
  }
  Numbers get(int64_t e) {
    Numbers values;
    each([&](int64_t, int64_t, auto* from) { values.push_back(to_float(*from)); }, e);
    return values;
  }

 private:
  template <class Visitor>
  void each(const Visitor& visit, int64_t e) {
    dispatch(dtype_, [&]<class T>() {
      T* first = static_cast<T*>(at(e));
      for (int64_t i = 0; i < c_.rows; ++i)
        for (int64_t j = 0; j < c_.cols; ++j)
          visit(i, j, first + i * row_stride() + j * col_stride());
    });
  }

  const Case& c_;
  kimi_dtype dtype_;
  int64_t line_, size_ = 0;
  std::vector<int64_t> starts_;
  std::vector<unsigned char> bytes_;
};

inline Numbers randoms(int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Numbers values(static_cast<size_t>(size));
  for (double& value : values) value = normal(random);
  return values;
}

inline std::vector<float> coefficients_of(const Case& c) {
  std::vector<float> all;
  for (int k = 0; k < c.steps; ++k)
    for (int i = 0; i < 3; ++i)
      all.push_back(c.cubic && i == 2 ? 0.0f : kQuintic[i] / (c.cubic ? 2 : 1));
  return all;
}

// The images of the matrices, row by row.
inline std::vector<Numbers> run(const Case& c, const std::vector<Numbers>& matrices) {
  simt::settings().seed = c.seed;
  Stack g(c, c.g_dtype, false), x(c, c.x_dtype, c.scattered);
  std::vector<const void*> sources;
  std::vector<void*> targets;
  for (int64_t e = 0; e < c.count; ++e) {
    g.set(e, matrices[size_t(e)]);
    sources.push_back(g.at(e));
    targets.push_back(x.at(e));
  }
  const std::vector<float> coefficients = coefficients_of(c);
  NewtonSchulzParams p{};
  p.g = sources.data();
  p.x = targets.data();
  p.coefficients = coefficients.data();
  const bool gram = c.method == KIMI_NEWTON_SCHULZ_GRAM;
  p.restarts = c.restarts.data();
  p.num_restarts = gram ? static_cast<int32_t>(c.restarts.size()) : 0;
  p.num_matrices = c.count;
  p.rows = c.rows;
  p.cols = c.cols;
  p.g_row_stride = g.row_stride();
  p.g_col_stride = g.col_stride();
  p.x_row_stride = x.row_stride();
  p.x_col_stride = x.col_stride();
  p.steps = c.steps;
  p.eps = c.eps;
  p.g_dtype = c.g_dtype;
  p.dtype = c.dtype;
  p.x_dtype = c.x_dtype;
  p.method = c.method;
  p.aol = c.aol;
  const ChainShape shape(p);
  const size_t bytes = c.at_once ? newton_schulz_cuda::stack_bytes(p, shape, c.at_once)
                                 : newton_schulz_cuda::workspace_bytes(p);
  std::vector<unsigned char> workspace(bytes + 64, 0xff);
  p.workspace = workspace.data() + 64 - reinterpret_cast<uintptr_t>(workspace.data()) % 64;
  const Status status = c.at_once    ? newton_schulz_cuda::stack(p, shape, c.at_once, nullptr)
                        : c.clusters ? newton_schulz_cuda::on_chips(p, shape, nullptr)
                                     : newton_schulz_cuda::run(p, nullptr);
  if (!status.is_ok()) check::fail(__FILE__, __LINE__, status.message + ": " + c.text());
  std::vector<Numbers> images;
  for (int64_t e = 0; e < c.count; ++e) images.push_back(x.get(e));
  return images;
}

// x [rows, cols] over the norm, each row (of a tall matrix: column) over sqrt(sum |A_ij|) of it.
inline void balance(const Case& c, Numbers& x, double least) {
  const bool tall = c.rows > c.cols;
  const int64_t m = std::min(c.rows, c.cols), n = std::max(c.rows, c.cols);
  const auto at = [&](const Numbers& y, int64_t i, int64_t j) {
    return y[size_t(tall ? j * c.cols + i : i * c.cols + j)];
  };
  const Numbers y = x;
  for (int64_t i = 0; i < m; ++i) {
    double sum = 0;
    for (int64_t k = 0; k < m; ++k) {
      double product = 0;
      for (int64_t j = 0; j < n; ++j) product += at(y, i, j) * at(y, k, j);
      sum += std::abs(product);
    }
    const double root = std::max(std::sqrt(sum), least);
    for (int64_t j = 0; j < n; ++j)
      x[size_t(tall ? j * c.cols + i : i * c.cols + j)] = root > 0 ? at(y, i, j) / root : 0;
  }
}

// The iteration in fp64, X <- a X + (b A + c A^2) X.
inline Numbers exact(const Case& c, Numbers x) {
  const int64_t rows = c.rows, cols = c.cols;
  double norm = 0;
  for (double v : x) norm += v * v;
  norm = std::max(std::sqrt(norm), double(c.eps));
  for (double& v : x) v /= norm == 0 ? 1 : norm;
  if (c.aol) balance(c, x, double(c.eps) / norm);
  const std::vector<float> numbers = coefficients_of(c);
  const auto product = [](const Numbers& a, const Numbers& b, int64_t m, int64_t k, int64_t n) {
    Numbers d(size_t(m * n));
    for (int64_t i = 0; i < m; ++i)
      for (int64_t l = 0; l < k; ++l)
        for (int64_t j = 0; j < n; ++j)
          d[size_t(i * n + j)] += a[size_t(i * k + l)] * b[size_t(l * n + j)];
    return d;
  };
  for (int k = 0; k < c.steps; ++k) {
    Numbers turned(x.size());
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) turned[size_t(j * rows + i)] = x[size_t(i * cols + j)];
    const Numbers cube = product(product(x, turned, rows, cols, rows), x, rows, rows, cols);
    Numbers five = product(product(x, turned, rows, cols, rows), cube, rows, rows, cols);
    for (size_t i = 0; i < x.size(); ++i)
      x[i] = numbers[size_t(3 * k)] * x[i] + numbers[size_t(3 * k + 1)] * cube[i] +
             numbers[size_t(3 * k + 2)] * five[i];
  }
  return x;
}

inline double relative(const Numbers& value, const Numbers& reference) {
  double off = 0, size = 0;
  for (size_t i = 0; i < value.size(); ++i) {
    off += (value[i] - reference[i]) * (value[i] - reference[i]);
    size += reference[i] * reference[i];
  }
  return std::sqrt(off / size);
}

inline void near(const Case& c) {
  std::vector<Numbers> matrices;
  for (int64_t e = 0; e < c.count; ++e) {
    matrices.push_back(randoms(c.rows * c.cols, unsigned(17 * e + c.rows)));
    if (c.g_dtype != KIMI_FLOAT32)
      for (double& v : matrices.back()) v = to_float(from_float<bf16>(static_cast<float>(v)));
  }
  const std::vector<Numbers> images = run(c, matrices);
  const bool gram = c.method == KIMI_NEWTON_SCHULZ_GRAM;
  const double limit = c.dtype == KIMI_FLOAT32   ? (gram ? 1e-3 : 1e-5)
                       : c.dtype == KIMI_FLOAT16 ? (gram ? 0.05 : 0.015)
                                                 : (gram ? 0.2 : 0.1);
  for (int64_t e = 0; e < c.count; ++e) {
    const double error = relative(images[size_t(e)], exact(c, matrices[size_t(e)]));
    if (!(error < limit))
      check::fail(__FILE__, __LINE__, "error " + std::to_string(error) + ": " + c.text());
  }
}

inline bool same(const Numbers& a, const Numbers& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}
inline void require(bool condition, const Case& c, const char* what) {
  if (!condition) check::fail(__FILE__, __LINE__, std::string(what) + ": " + c.text());
}

inline constexpr kimi_newton_schulz_method kMethods[] = {
    KIMI_NEWTON_SCHULZ_STANDARD, KIMI_NEWTON_SCHULZ_SYMMETRIC, KIMI_NEWTON_SCHULZ_GRAM};
inline constexpr kimi_dtype kDtypes[] = {KIMI_FLOAT32, KIMI_BFLOAT16, KIMI_FLOAT16};

}  // namespace newton_schulz_cases
