// SPDX-License-Identifier: MIT
// newton_schulz: argument checks, choice of the engine, threads over matrices or inside of one.
#include "newton_schulz/newton_schulz.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "common/dtype.h"
#include "common/engine.h"
#include "common/strides.h"
#include "common/volume.h"
#include "newton_schulz/chain.h"
#include "newton_schulz/product.h"

namespace kimi {
namespace {

using namespace newton_schulz_cpu;

// Matrices of fewer elements go to a thread each, where there are enough of them.
constexpr int64_t kSmall = int64_t{1} << 20;

Status check_dtype(const char* op, const char* name, kimi_dtype dtype) {
  if (is_dtype(dtype)) return Status::ok();
  return invalid(op, ": ", name, ": expected a kimi_dtype (0..2), got ", int(dtype));
}

// Where a matrix lies, in bytes: equal lines, one at every multiple of the stride.
struct Lines {
  uintptr_t first;
  int64_t count, length, stride;

  Lines(const void* data, int64_t rows, int64_t row_stride, int64_t cols, int64_t col_stride,
        int64_t size)
      : first(reinterpret_cast<uintptr_t>(data)) {
    for (auto [n, s] : {std::pair(rows, &row_stride), std::pair(cols, &col_stride)})
      if (*s < 0) {
        first += uintptr_t((n - 1) * *s * size);
        *s = -*s;
      }
    if (row_stride < col_stride) {
      std::swap(rows, cols);
      std::swap(row_stride, col_stride);
    }
    count = rows;
    length = ((cols - 1) * col_stride + 1) * size;
    stride = row_stride * size;
  }
  uintptr_t end() const { return first + uintptr_t((count - 1) * stride + length); }
};

// Whether two matrices share memory. Lines that lie as far apart may fill each other's gaps.
bool share(const Lines& x, const Lines& y) {
  if (x.end() <= y.first || y.end() <= x.first) return false;
  const int64_t stride = x.count > 1 ? x.stride : y.stride;
  if ((x.count == 1 && y.count == 1) || (y.count > 1 && y.stride != stride)) return true;
  const auto apart = int64_t(y.first - x.first) % stride;
  const int64_t offset = apart < 0 ? apart + stride : apart;
  return offset < x.length || offset + y.length > stride;
}

// Of D, which other threads write while these still read: a CPU packs A and B first, and of C an
// element is read where it is written.
Status check_memory(const MatrixProductParams& p, bool cuda) {
  const int64_t size = size_of(p.dtype);
  const Lines d(p.d, p.rows, p.d_stride, p.cols, 1, size);
  const auto refused = [](const char* why, const char* name) {
    return invalid("matrix_product: d: expected memory of its own, or c's", why, ", got some that ",
                   name, " uses too; pass other memory");
  };
  if (cuda && p.depth > 0) {
    if (share(d, Lines(p.a, p.rows, p.a_row_stride, p.depth, p.a_col_stride, size)))
      return refused(" on a GPU", "a");
    if (share(d, Lines(p.b, p.depth, p.b_row_stride, p.cols, p.b_col_stride, size)))
      return refused(" on a GPU", "b");
  }
  const bool is_c = p.d == p.c && (p.d_stride == p.c_stride || p.rows == 1);
  if (p.beta != 0 && !is_c && share(d, Lines(p.c, p.rows, p.c_stride, p.cols, 1, size)))
    return refused(" with c's stride", "c");
  return Status::ok();
}

// Elements of which rows must be dense: col_stride 1 unless there is one column.
Status check(const MatrixProductParams& p, kimi_device device) {
  const char* op = "matrix_product";
  if (p.rows < 0 || p.cols < 0 || p.depth < 0)
    return invalid(op, ": rows, cols, depth: expected 0 or more, got ", p.rows, ", ", p.cols, ", ",
                   p.depth);
  KIMI_RETURN_IF_ERROR(check_dtype(op, "dtype", p.dtype));
  if (p.symmetric && p.rows != p.cols)
    return invalid(op, ": symmetric: expected a square result, got ", p.rows, " x ", p.cols);
  if (p.c_stride < 0 || p.d_stride < 0)
    return invalid(op, ": c_stride, d_stride: expected 0 or more, got ", p.c_stride, " and ",
                   p.d_stride);
  const bool cuda = device == KIMI_DEVICE_CUDA;
  if (p.rows > 0 && p.cols > 0 &&
      (!p.d || (!cuda && !p.workspace) || (p.depth > 0 && (!p.a || !p.b))))
    return invalid(op, ": expected pointers for a, b, d and workspace, got NULL");
  if (p.beta != 0 && !p.c)
    return invalid(op, ": c: expected a matrix for beta ", p.beta, ", got NULL");
  if (p.rows == 0 || p.cols == 0) return Status::ok();
  if (p.rows > 1 && p.d_stride < p.cols)
    return invalid(op, ": d_stride: expected at least the ", p.cols, " columns, got ", p.d_stride);
  if (p.alpha == 0 && p.beta == 0 && p.delta == 0)
    return invalid(op, ": alpha, beta, delta: expected one other than 0, got 0, 0, 0; alpha 1 is ",
                   "the product alone");
  KIMI_RETURN_IF_ERROR(check_strides(op, "a_row_stride, a_col_stride",
                                     {{p.rows, p.a_row_stride}, {p.depth, p.a_col_stride}}));
  KIMI_RETURN_IF_ERROR(check_strides(op, "b_row_stride, b_col_stride",
                                     {{p.depth, p.b_row_stride}, {p.cols, p.b_col_stride}}));
  return check_memory(p, cuda);
}

bool lines_agree(const NewtonSchulzParams& p) {
  if (p.g_col_stride == 1 || p.cols == 1) return p.x_col_stride == 1 || p.cols == 1;
  return (p.g_row_stride == 1 || p.rows == 1) && (p.x_row_stride == 1 || p.rows == 1);
}

Status check_schedule(const NewtonSchulzParams& p) {
  const char* op = "newton_schulz";
  if (p.method < KIMI_NEWTON_SCHULZ_STANDARD || p.method > KIMI_NEWTON_SCHULZ_GRAM)
    return invalid(op, ": method: expected 0 (standard), 1 (symmetric) or 2 (gram), got ",
                   int(p.method));
  if (p.steps < 1) return invalid(op, ": steps: expected 1 or more, got ", p.steps);
  if (!p.coefficients) return invalid(op, ": coefficients: expected [steps, 3] numbers, got NULL");
  if (p.num_restarts < 0 || (p.num_restarts > 0 && p.method != KIMI_NEWTON_SCHULZ_GRAM))
    return invalid(op, ": num_restarts: expected 0 (more with method gram only), got ",
                   p.num_restarts);
  if (p.num_restarts > 0 && !p.restarts)
    return invalid(op, ": restarts: expected ", p.num_restarts, " steps, got NULL");
  for (int32_t i = 0; i < p.num_restarts; ++i)
    if (p.restarts[i] < (i ? p.restarts[i - 1] + 1 : 1) || p.restarts[i] >= p.steps)
      return invalid(op, ": restarts[", i, "]: expected ascending steps in 1..", p.steps - 1,
                     ", got ", p.restarts[i]);
  if (!(p.eps >= 0)) return invalid(op, ": eps: expected 0 or more, got ", p.eps);
  if (p.aol != 0 && p.aol != 1) return invalid(op, ": aol: expected 0 or 1, got ", p.aol);
  return Status::ok();
}

Status check(const NewtonSchulzParams& p) {
  const char* op = "newton_schulz";
  if (p.num_matrices < 0 || p.rows < 0 || p.cols < 0)
    return invalid(op, ": num_matrices, rows, cols: expected 0 or more, got ", p.num_matrices, ", ",
                   p.rows, ", ", p.cols);
  KIMI_RETURN_IF_ERROR(check_dtype(op, "g_dtype", p.g_dtype));
  KIMI_RETURN_IF_ERROR(check_dtype(op, "dtype", p.dtype));
  KIMI_RETURN_IF_ERROR(check_dtype(op, "x_dtype", p.x_dtype));
  KIMI_RETURN_IF_ERROR(check_schedule(p));
  if (p.num_matrices == 0 || p.rows == 0 || p.cols == 0) return Status::ok();
  if (!p.g || !p.x || !p.workspace)
    return invalid(op, ": expected pointers for g, x and workspace, got NULL");
  for (int64_t e = 0; e < p.num_matrices; ++e)
    if (!p.g[e] || !p.x[e]) return invalid(op, ": matrix ", e, ": expected pointers, got NULL");
  if (!lines_agree(p))
    return invalid(op, ": strides: expected one of g's to be 1, and the same one of x's, got ",
                   p.g_row_stride, ", ", p.g_col_stride, " and ", p.x_row_stride, ", ",
                   p.x_col_stride, "; make g contiguous");
  const ChainShape shape(p);
  if (shape.lines > 1 && std::abs(shape.x_stride) < shape.length)
    return invalid(op, ": x: expected lines of ", shape.length, " elements that far apart, got ",
                   shape.x_stride, "; set the stride of x");
  KIMI_RETURN_IF_ERROR(
      check_strides(op, "g_row_stride, g_col_stride", {{shape.lines, shape.g_stride}}));
  const bool alike =
      p.g_dtype == p.x_dtype && (shape.lines == 1 || shape.g_stride == shape.x_stride);
  for (int64_t e = 0; e < p.num_matrices; ++e) {
    const Lines g(p.g[e], shape.lines, shape.g_stride, shape.length, 1, size_of(p.g_dtype));
    const Lines x(p.x[e], shape.lines, shape.x_stride, shape.length, 1, size_of(p.x_dtype));
    if (!(alike && p.g[e] == p.x[e]) && share(g, x))
      return invalid(op, ": x: expected memory of its own, or g's with g's stride and dtype, got ",
                     "some that g uses too in matrix ", e, "; pass other memory");
  }
  return Status::ok();
}

// Threads that work on one matrix together; 1: each takes matrices of its own.
int threads_of_a_matrix(const NewtonSchulzParams& p) {
  const int threads = cpu::num_threads();
  const bool alone = p.num_matrices >= threads && volume(p.rows, p.cols) < kSmall;
  return alone ? 1 : threads;
}

}  // namespace

size_t matrix_product_workspace_bytes(const MatrixProductParams& p, kimi_device device) {
  if (device == KIMI_DEVICE_CUDA) return 0;
  if (p.rows < 0 || p.cols < 0 || p.depth < 0 || !is_dtype(p.dtype)) return 0;
  return std::max<size_t>(
      64, gemm::dense_scratch_bytes(p.rows, p.cols, p.depth, p.dtype, cpu::num_threads()));
}

Status matrix_product(const MatrixProductParams& p, kimi_device device,
                      [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p, device));
  if (p.rows == 0 || p.cols == 0) return Status::ok();
  if (device == KIMI_DEVICE_CUDA)
    return KIMI_CUDA("matrix_product", matrix_product_cuda(p, stream));
  Product q;
  q.a = {p.a, p.a_row_stride, p.a_col_stride, cpu::Storage(p.dtype)};
  q.b = {p.b, p.b_col_stride, p.b_row_stride, cpu::Storage(p.dtype)};
  q.rows = p.rows;
  q.cols = p.cols;
  q.depth = p.depth;
  q.symmetric = p.symmetric != 0;
  q.alpha = p.alpha;
  q.beta = p.beta;
  q.delta = p.delta;
  q.c = p.beta == 0 ? nullptr : p.c;
  q.d = p.d;
  q.c_stride = p.c_stride;
  q.d_stride = p.d_stride;
  q.dtype = q.d_dtype = p.dtype;
  multiply(q, p.workspace, cpu::num_threads());
  return Status::ok();
}

size_t newton_schulz_workspace_bytes(const NewtonSchulzParams& p,
                                     [[maybe_unused]] kimi_device device) {
  if (p.num_matrices < 0 || p.rows < 0 || p.cols < 0 || !is_dtype(p.dtype)) return 0;
  if (p.num_matrices == 0 || p.rows == 0 || p.cols == 0) return 64;
#if defined(KIMI_OPS_CUDA)
  if (device == KIMI_DEVICE_CUDA) return newton_schulz_cuda::workspace_bytes(p);
#endif
  const int threads = threads_of_a_matrix(p);
  return size_t(
      volume(chain_bytes(p, ChainShape(p), threads), threads == 1 ? cpu::num_threads() : 1));
}

Status newton_schulz(const NewtonSchulzParams& p, kimi_device device,
                     [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p));
  if (p.num_matrices == 0 || p.rows == 0 || p.cols == 0) return Status::ok();
  if (device == KIMI_DEVICE_CUDA)
    return KIMI_CUDA("newton_schulz", newton_schulz_cuda::run(p, stream));
  const ChainShape shape(p);
  const int threads = threads_of_a_matrix(p);
  char* workspace = static_cast<char*>(p.workspace);
  if (threads == 1) {
    const size_t bytes = chain_bytes(p, shape, 1);
    cpu::parallel_tasks(p.num_matrices, [&](int64_t e, int thread) {
      chain(p, shape, p.g[e], p.x[e], workspace + size_t(thread) * bytes, 1);
    });
  } else {
    for (int64_t e = 0; e < p.num_matrices; ++e)
      chain(p, shape, p.g[e], p.x[e], workspace, threads);
  }
  return Status::ok();
}

}  // namespace kimi
