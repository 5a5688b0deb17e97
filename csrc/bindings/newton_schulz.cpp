// SPDX-License-Identifier: MIT
#include <algorithm>

#include "bindings/ops.h"

namespace kimi::bindings {
namespace {

PyObject* matrix_product(Call& call) {
  const Tensor a = call.tensor("a").of(kNatives).shape({"M", "K"}).apart();
  const Tensor any_b = call.tensor("b").shape({a.size(1), "N"}).of({a.dtype});
  const Tensor b = any_b.apart();
  const Tensor given = call.optional("c");
  kimi_matrix_product_params p = {};
  p.alpha = float(call.number("alpha"));
  p.beta = float(call.number("beta"));
  p.symmetric = call.truth();
  if (p.symmetric) b.shape({a.size(1), a.size(0)}, "a symmetric result is square");
  if (given) {
    const Tensor c = given.of({a.dtype}).shape({a.size(0), b.size(1)}).dense_rows();
    p.c = c.data();
    p.c_stride = c.stride(0);
  }
  p.a = a.data();
  p.b = b.data();
  p.rows = a.size(0);
  p.cols = p.d_stride = b.size(1);
  p.depth = a.size(1);
  p.a_row_stride = a.stride(0);
  p.a_col_stride = a.stride(1);
  p.b_row_stride = b.stride(0);
  p.b_col_stride = b.stride(1);
  p.dtype = native(a.dtype);
  const Output d = call.empty(a.dtype, {p.rows, p.cols});
  p.d = d.data();
  call.workspace(p, kimi_matrix_product_workspace_bytes);
  call.run(kimi_matrix_product, p);
  return call.result(d);
}

// Strides of a matrix; of a side of one element a framework may say anything.
struct Strides {
  int64_t row, col;
  explicit Strides(const Tensor& x)
      : row(x.size(0) > 1 ? x.stride(0) : x.size(1)), col(x.size(1) > 1 ? x.stride(1) : 1) {}
  bool operator==(const Strides&) const = default;
  bool has_a_line() const { return (row == 1 && col != 0) || (col == 1 && row != 0); }
};

PyObject* newton_schulz(Call& call) {
  std::vector<Tensor> g = call.tensors("g");
  const std::vector<double> numbers = call.numbers("coefficients");
  const std::vector<int64_t> steps = call.integers("restarts");
  kimi_newton_schulz_params p = {};
  p.method = kimi_newton_schulz_method(call.int32("method"));
  const Type type = call.type("dtype");
  p.eps = float(call.number("eps"));
  p.aol = call.truth();
  if (numbers.size() % 3)
    call.value_error("coefficients", "expected 3 a step, got ", numbers.size(), " numbers");
  if (!is_native(type))
    call.type_error("dtype", "expected fp32, bf16 or fp16, got ", name_of(type), "; choose one");
  if (g.empty()) call.value_error("g", "expected at least one matrix, got none");
  for (Tensor& matrix : g) {
    matrix.of(kNatives).shape({"m", "n"}).shape_like(g[0], "call once for each shape");
    matrix.of({g[0].dtype}, "call once for each dtype");
    if (!Strides(matrix).has_a_line()) matrix = matrix.dense();
  }
  if (std::any_of(g.begin(), g.end(), [&](const Tensor& x) { return Strides(x) != Strides(g[0]); }))
    for (Tensor& matrix : g) matrix = matrix.dense();

  // Results are one stack, each dense in the orientation of g.
  const int64_t rows = g[0].size(0), cols = g[0].size(1);
  const Strides strides(g[0]);
  const bool across = strides.col != 1 && strides.row == 1;
  const int64_t count = int64_t(g.size()), lines = across ? cols : rows;
  const Output stack = call.empty(g[0].dtype, {count, lines, across ? rows : cols});
  std::vector<const void*> sources;
  std::vector<void*> targets;
  for (const Tensor& matrix : g) {
    targets.push_back(stack.address + int64_t(sources.size()) * rows * cols * matrix.bytes());
    sources.push_back(matrix.data());
  }
  const std::vector<float> coefficients(numbers.begin(), numbers.end());
  for (int64_t step : steps)
    if (step != int32_t(step)) call.value_error("restarts", "expected steps, got ", step);
  const std::vector<int32_t> restarts(steps.begin(), steps.end());
  p.g = sources.data();
  p.x = targets.data();
  p.coefficients = coefficients.data();
  p.restarts = restarts.data();
  p.num_matrices = count;
  p.rows = rows;
  p.cols = cols;
  p.g_row_stride = strides.row;
  p.g_col_stride = strides.col;
  p.x_row_stride = across ? 1 : cols;
  p.x_col_stride = across ? rows : 1;
  p.steps = int32_t(coefficients.size() / 3);
  p.num_restarts = int32_t(restarts.size());
  p.g_dtype = p.x_dtype = native(g[0].dtype);
  p.dtype = native(type);
  call.workspace(p, kimi_newton_schulz_workspace_bytes);
  call.run(kimi_newton_schulz, p);
  return call.result(stack, across);
}

}  // namespace

void define_newton_schulz(Methods& methods) {
  methods.add<matrix_product, 6>("matrix_product");
  methods.add<newton_schulz, 7>("newton_schulz");
}

}  // namespace kimi::bindings
