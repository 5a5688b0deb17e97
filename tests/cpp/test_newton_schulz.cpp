// SPDX-License-Identifier: MIT
// Newton-Schulz through the C API. Products of small integers are exact in every dtype: they are
// compared bit for bit with a loop. Chains meet the scalar oracle: matrices with known singular
// vectors (two reflections) whose values must go where the polynomial sends them.
#include "engines.h"

using namespace kimi::test;

namespace {

struct Shape {
  int64_t m, n, k;
};

// A matrix in memory: by rows or by columns, with room between lines.
struct Matrix {
  int64_t rows, cols, row_stride, col_stride;
  Tensor tensor;
  Matrix(int64_t m, int64_t n, kimi_dtype dtype, bool by_columns, int64_t gap = 0)
      : rows(m),
        cols(n),
        row_stride(by_columns ? 1 : n + gap),
        col_stride(by_columns ? m + gap : 1),
        tensor(by_columns ? (n - 1) * (m + gap) + m : (m - 1) * (n + gap) + n, dtype) {}
  double get(int64_t i, int64_t j) const { return tensor.get(i * row_stride + j * col_stride); }
  void set(int64_t i, int64_t j, double x) const { tensor.set(i * row_stride + j * col_stride, x); }
  void fill(uint32_t seed) const {
    Random random(seed);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) set(i, j, random.small());
  }
};

bool product(const Matrix& a, const Matrix& b, const Matrix* c, const Matrix& d, bool symmetric,
             float delta = 0) {
  kimi_matrix_product_params p = {};
  p.a = a.tensor.data.get(), p.b = b.tensor.data.get(), p.d = d.tensor.data.get();
  p.c = c ? c->tensor.data.get() : nullptr;
  p.rows = a.rows, p.cols = b.cols, p.depth = a.cols;
  p.a_row_stride = a.row_stride, p.a_col_stride = a.col_stride;
  p.b_row_stride = b.row_stride, p.b_col_stride = b.col_stride;
  p.c_stride = c ? c->row_stride : 0, p.d_stride = d.row_stride;
  p.alpha = 0.5f, p.beta = c ? 2.0f : 0.0f, p.delta = delta;
  p.symmetric = symmetric, p.dtype = a.tensor.dtype;
  const Workspace workspace(p, kimi_matrix_product_workspace_bytes);
  return kimi_matrix_product(&p, KIMI_DEVICE_CPU, nullptr) == KIMI_OK;
}

// A B / 2 + 2 C, and A A^T / 2 + 2 C + I of which only C's lower triangle counts: once for all
// engines, since a loop over doubles takes longer than they do.
struct Products {
  Matrix a, b, c, at, square;
  std::vector<double> general, symmetric;

  Products(const Shape& s, kimi_dtype dtype, bool by_columns)
      : a(s.m, s.k, dtype, by_columns, 3),
        b(s.k, s.n, dtype, by_columns, 1),
        c(s.m, s.n, dtype, false, 2),
        at(s.k, s.m, dtype, !by_columns, 3),
        square(s.m, s.m, dtype, false, 4),
        general(size_t(s.m * s.n)),
        symmetric(size_t(s.m * s.m)) {
    a.fill(1), b.fill(2), c.fill(3), square.fill(4);
    const Tensor one(1, dtype);
    const auto rounded = [&](double x) {
      one.set(0, x);
      return one.get(0);
    };
    std::vector<double> rows, cols;  // A, and B by columns
    for (int64_t i = 0; i < s.m; ++i)
      for (int64_t k = 0; k < s.k; ++k) {
        rows.push_back(a.get(i, k));
        at.set(k, i, a.get(i, k));
      }
    for (int64_t j = 0; j < s.n; ++j)
      for (int64_t k = 0; k < s.k; ++k) cols.push_back(b.get(k, j));
    const auto dot = [&](const double* x, const double* y) {
      double sum = 0;
      for (int64_t k = 0; k < s.k; ++k) sum += x[k] * y[k];
      return sum;
    };
    for (int64_t i = 0; i < s.m; ++i) {
      const double* row = rows.data() + i * s.k;
      for (int64_t j = 0; j < s.n; ++j)
        general[size_t(i * s.n + j)] =
            rounded(0.5 * dot(row, cols.data() + j * s.k) + 2 * c.get(i, j));
      for (int64_t j = 0; j <= i; ++j)
        symmetric[size_t(i * s.m + j)] = symmetric[size_t(j * s.m + i)] = rounded(
            0.5 * dot(row, rows.data() + j * s.k) + 2 * square.get(i, j) + (i == j ? 1 : 0));
    }
  }

  void test() const {
    const kimi_dtype dtype = a.tensor.dtype;
    const Matrix d(c.rows, c.cols, dtype, false, 5), on_itself(at.cols, at.cols, dtype, false, 4);
    std::memcpy(on_itself.tensor.data.get(), square.tensor.data.get(), square.tensor.size);
    bool ok = product(a, b, &c, d, false);
    for (int64_t i = 0; i < d.rows; ++i)
      for (int64_t j = 0; j < d.cols; ++j)
        ok = ok && d.get(i, j) == general[size_t(i * d.cols + j)];
    check(ok, "product %d x %d x %d, dtype %d", int(d.rows), int(d.cols), int(a.cols), int(dtype));
    ok = product(a, at, &on_itself, on_itself, true, 1.0f);
    for (int64_t i = 0; i < at.cols; ++i)
      for (int64_t j = 0; j < at.cols; ++j)
        ok = ok && on_itself.get(i, j) == symmetric[size_t(i * at.cols + j)];
    check(ok, "symmetric product %d x %d, dtype %d", int(at.cols), int(at.rows), int(dtype));
  }
};

struct Schedule {
  std::vector<float> rows;
  kimi_newton_schulz_method method;
  std::vector<int32_t> restarts;
  int32_t aol = 0;
};

bool chain(const std::vector<const Matrix*>& g, const std::vector<const Matrix*>& x,
           kimi_dtype dtype, const Schedule& schedule) {
  std::vector<const void*> from;
  std::vector<void*> to;
  for (const Matrix* matrix : g) from.push_back(matrix->tensor.data.get());
  for (const Matrix* matrix : x) to.push_back(matrix->tensor.data.get());
  kimi_newton_schulz_params p = {};
  p.g = from.data(), p.x = to.data(), p.num_matrices = int64_t(g.size());
  p.rows = g[0]->rows, p.cols = g[0]->cols;
  p.g_row_stride = g[0]->row_stride, p.g_col_stride = g[0]->col_stride;
  p.x_row_stride = x[0]->row_stride, p.x_col_stride = x[0]->col_stride;
  p.coefficients = schedule.rows.data(), p.steps = int32_t(schedule.rows.size() / 3);
  p.restarts = schedule.restarts.data(), p.num_restarts = int32_t(schedule.restarts.size());
  p.method = schedule.method, p.aol = schedule.aol;
  p.g_dtype = g[0]->tensor.dtype, p.dtype = dtype, p.x_dtype = x[0]->tensor.dtype;
  const Workspace workspace(p, kimi_newton_schulz_workspace_bytes);
  return kimi_newton_schulz(&p, KIMI_DEVICE_CPU, nullptr) == KIMI_OK;
}

// values[i] on the diagonal between two reflections I - 2 v v^T.
void rotate(const std::vector<double>& values, int64_t rows, int64_t cols,
            std::vector<double>& out) {
  const auto unit = [](int64_t n, uint32_t seed) {
    Random random(seed);
    std::vector<double> v(static_cast<size_t>(n));
    double norm = 0;
    for (double& x : v) x = random.unit() + 0.01, norm += x * x;
    for (double& x : v) x /= std::sqrt(norm);
    return v;
  };
  const auto u = unit(rows, 11), v = unit(cols, 12);
  out.assign(size_t(rows * cols), 0);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      double sum = 0;
      for (int64_t s = 0; s < int64_t(values.size()); ++s)
        sum += ((i == s) - 2 * u[size_t(i)] * u[size_t(s)]) * values[size_t(s)] *
               ((s == j) - 2 * v[size_t(s)] * v[size_t(j)]);
      out[size_t(i * cols + j)] = sum;
    }
}

// X over the roots of its rows' sums of |X X^T|, then the steps, all as they are written.
std::vector<double> scaled_image(std::vector<double> x, int64_t m, int64_t n,
                                 const std::vector<float>& rows) {
  const auto gram = [&] {
    std::vector<double> a(size_t(m * m));
    for (int64_t i = 0; i < m; ++i)
      for (int64_t k = 0; k < m; ++k)
        for (int64_t j = 0; j < n; ++j)
          a[size_t(i * m + k)] += x[size_t(i * n + j)] * x[size_t(k * n + j)];
    return a;
  };
  const auto sums = gram();
  for (int64_t i = 0; i < m; ++i) {
    double sum = 0;
    for (int64_t k = 0; k < m; ++k) sum += std::abs(sums[size_t(i * m + k)]);
    for (int64_t j = 0; j < n; ++j) x[size_t(i * n + j)] /= std::sqrt(sum);
  }
  for (size_t s = 0; s < rows.size(); s += 3) {
    const auto a = gram();
    std::vector<double> image(x.size());
    for (int64_t i = 0; i < m; ++i)
      for (int64_t k = 0; k < m; ++k) {
        double factor = double(rows[s + 1]) * a[size_t(i * m + k)] + (i == k ? double(rows[s]) : 0);
        for (int64_t l = 0; l < m; ++l)
          factor += double(rows[s + 2]) * a[size_t(i * m + l)] * a[size_t(l * m + k)];
        for (int64_t j = 0; j < n; ++j) image[size_t(i * n + j)] += factor * x[size_t(k * n + j)];
      }
    x = image;
  }
  return x;
}

// G with singular values 1, 1/2, 1/3, ... and its image.
struct Oracle {
  int64_t m, n;
  std::vector<double> g, image;

  Oracle(int64_t rows, int64_t cols, const Schedule& schedule) : m(rows), n(cols) {
    std::vector<double> values, images;
    double norm = 0;
    for (int64_t i = 1; i <= m; ++i) {
      values.push_back(1.0 / double(i));
      norm += values.back() * values.back();
    }
    for (double value : values) {
      double x = value / std::sqrt(norm);
      for (size_t k = 0; k < schedule.rows.size(); k += 3) {
        const double a = schedule.rows[k], b = schedule.rows[k + 1], c = schedule.rows[k + 2];
        x = a * x + b * x * x * x + c * x * x * x * x * x;
      }
      images.push_back(x);
    }
    rotate(values, m, n, g);
    if (schedule.aol)
      image = scaled_image(g, m, n, schedule.rows);
    else
      rotate(images, m, n, image);
  }
};

// Returns the image in `x`, so that numbers of threads can be compared.
void test_chain(const Oracle& oracle, const Schedule& schedule, kimi_dtype dtype, double bound,
                Matrix& x) {
  const int64_t m = oracle.m, n = oracle.n;
  const kimi_dtype io = x.tensor.dtype;
  Matrix g(m, n, io, false, 1), scaled(m, n, io, false, 1),
      in_batch[3] = {{m, n, io, false, 2}, {m, n, io, false, 2}, {m, n, io, false, 2}};
  Matrix tall(n, m, io, false, 1), tall_x(n, m, io, false, 2);
  Matrix turned(n, m, io, true, 2), turned_x(n, m, io, true, 1);
  Matrix by_columns(m, n, io, true, 1), by_columns_x(m, n, io, true, 2);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      g.set(i, j, oracle.g[size_t(i * n + j)]);
      scaled.set(i, j, std::ldexp(g.get(i, j), 60));
      tall.set(j, i, g.get(i, j)), turned.set(j, i, g.get(i, j));
      by_columns.set(i, j, g.get(i, j));
    }
  bool ok = chain({&g}, {&x}, dtype, schedule);
  double error = 0, size = 0;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const double want = oracle.image[size_t(i * n + j)], off = x.get(i, j) - want;
      error += off * off, size += want * want;
    }
  error = std::sqrt(error / size);
  check(ok && error <= bound, "chain %d x %d, method %d, dtype %d: error %g", int(m), int(n),
        int(schedule.method), int(dtype), error);
  ok = chain({&tall}, {&tall_x}, dtype, schedule) &&
       chain({&turned}, {&turned_x}, dtype, schedule) &&
       chain({&by_columns}, {&by_columns_x}, dtype, schedule) &&
       chain({&g, &scaled, &g}, {&in_batch[0], &in_batch[1], &in_batch[2]}, dtype, schedule);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const double one = x.get(i, j);
      for (const Matrix& other : in_batch) ok = ok && other.get(i, j) == one;
      ok = ok && by_columns_x.get(i, j) == one;
      if (m != n) ok = ok && turned_x.get(j, i) == one && tall_x.get(j, i) == one;
    }
  check(ok, "chain %d x %d, method %d, dtype %d: transposed, scaled or in a batch", int(m), int(n),
        int(schedule.method), int(dtype));
}

void test_zeros_and_refusals() {
  const Schedule quintic = {{3.4445f, -4.7750f, 2.0315f}, KIMI_NEWTON_SCHULZ_STANDARD, {}};
  Matrix zero(5, 9, KIMI_FLOAT32, false), x(5, 9, KIMI_FLOAT32, false);
  for (int64_t i = 0; i < 45; ++i) zero.tensor.set(i, 0);
  bool ok = chain({&zero}, {&x}, KIMI_BFLOAT16, quintic);
  for (int64_t i = 0; i < 45; ++i) ok = ok && x.tensor.get(i) == 0;
  check(ok, "a zero matrix");
  for (const Schedule& wrong : {Schedule{quintic.rows, kimi_newton_schulz_method(3), {}},
                                Schedule{{}, KIMI_NEWTON_SCHULZ_GRAM, {}},
                                Schedule{quintic.rows, KIMI_NEWTON_SCHULZ_SYMMETRIC, {1}},
                                Schedule{quintic.rows, KIMI_NEWTON_SCHULZ_GRAM, {1}},
                                Schedule{quintic.rows, KIMI_NEWTON_SCHULZ_STANDARD, {}, 2}})
    check(!chain({&zero}, {&x}, KIMI_BFLOAT16, wrong), "a wrong schedule was taken");
  Matrix by_columns(5, 9, KIMI_FLOAT32, true);
  check(!chain({&zero}, {&by_columns}, KIMI_FLOAT32, quintic), "orientations that differ");
  Matrix wide(5, 9, KIMI_FLOAT32, false), square(5, 9, KIMI_FLOAT32, false);
  check(!product(zero, wide, nullptr, square, true), "a symmetric product that is not square");
}

}  // namespace

int main() {
  const std::vector<float> quintic = {3.4445f, -4.7750f, 2.0315f};
  const std::vector<float> cubic = {3.36566f, -3.34210f, 0, 2.57445f, -1.49574f, 0,
                                    2.53690f, -1.43126f, 0, 2.44189f, -1.27640f, 0};
  std::vector<float> five;
  for (int i = 0; i < 5; ++i) five.insert(five.end(), quintic.begin(), quintic.end());
  const std::vector<Schedule> schedules = {
      {five, KIMI_NEWTON_SCHULZ_STANDARD, {}},    {five, KIMI_NEWTON_SCHULZ_SYMMETRIC, {}},
      {five, KIMI_NEWTON_SCHULZ_GRAM, {2, 3}},    {five, KIMI_NEWTON_SCHULZ_GRAM, {3}},
      {cubic, KIMI_NEWTON_SCHULZ_SYMMETRIC, {}},  {cubic, KIMI_NEWTON_SCHULZ_GRAM, {2}},
      {five, KIMI_NEWTON_SCHULZ_STANDARD, {}, 1}, {five, KIMI_NEWTON_SCHULZ_GRAM, {2}, 1}};
  for (kimi_dtype dtype : {KIMI_FLOAT32, KIMI_BFLOAT16, KIMI_FLOAT16})
    for (const Shape& s : {Shape{1, 1, 1}, Shape{15, 33, 7}, Shape{130, 70, 530}})
      for (bool by_columns : {false, true}) {
        const Products products(s, dtype, by_columns);
        each_engine([&] { products.test(); });
      }
  each_engine(test_zeros_and_refusals);
  for (const Schedule& schedule : schedules)
    for (const Shape& s : {Shape{1, 1, 0}, Shape{1, 9, 0}, Shape{33, 33, 0}, Shape{67, 131, 0}}) {
      if (s.m == 1 && schedule.rows.size() < five.size()) continue;  // the cubic takes 1 near 0
      const Oracle oracle(s.m, s.n, schedule);
      for (kimi_dtype dtype : {KIMI_FLOAT32, KIMI_BFLOAT16, KIMI_FLOAT16}) {
        const bool gram = schedule.method == KIMI_NEWTON_SCHULZ_GRAM;
        const double bounds[] = {gram ? 1e-3 : 1e-5, gram ? 0.15 : 0.1, gram ? 0.05 : 0.02};
        const kimi_dtype io = dtype == KIMI_FLOAT32 ? KIMI_FLOAT32 : KIMI_BFLOAT16;
        std::unique_ptr<Matrix> first;
        each_engine([&] {
          auto x = std::make_unique<Matrix>(s.m, s.n, io, false, 2);
          test_chain(oracle, schedule, dtype, bounds[dtype], *x);
          if (kimi_num_threads() == 1)
            first = std::move(x);
          else
            check(x->tensor.same_bits(first->tensor), "threads show in the bits");
        });
      }
    }
  return report("newton_schulz");
}
