// SPDX-License-Identifier: MIT
// X lies in the workspace as G does in its memory, with m lines of n elements or n lines of m.
// Products take either as it is, so no transposed copy is ever made.
#include "newton_schulz/chain.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/dtype.h"
#include "common/workspace.h"
#include "math/functions.h"
#include "newton_schulz/product.h"

namespace kimi::newton_schulz_cpu {
namespace {

using cpu::Operand;
using gemm::tasks;

constexpr int64_t kRowsAcross = 256;     // rows whose sums a task takes where lines run across
constexpr int64_t kElements = 32 << 10;  // of a task of an elementwise pass

// A distance between lines that is no large power of two: they would share few sets of a cache.
int64_t padded(int64_t length) { return round_up(length, 32) + 32; }

int64_t squares_of(kimi_newton_schulz_method method) {
  return method == KIMI_NEWTON_SCHULZ_GRAM ? 3 : 1;
}

// Halves of 16 partial sums, `stride` apart, added until one is left.
float tree(float* lanes, int64_t stride) {
  for (int half = 8; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l * stride] += lanes[(l + half) * stride];
  return lanes[0];
}

struct Memory {  // of the workspace
  char* x;
  char* squares[3] = {};     // [m, m] dtype
  float *row_sums, *maxima;  // row_sums: then AOL's roots
  char* scratch;             // of products
  int64_t bytes;

  Memory(const NewtonSchulzParams& p, const ChainShape& s, int threads, void* workspace) {
    Pieces pieces(workspace);
    x = pieces.take(s.lines, padded(s.length), size_of(p.dtype));
    for (int64_t i = 0; i < squares_of(p.method); ++i)
      squares[i] = pieces.take(s.m, padded(s.m), size_of(p.dtype));
    row_sums = pieces.take<float>(s.m);
    maxima = pieces.take<float>(s.lines);
    const auto bytes_of = [&](int64_t rows, int64_t cols, int64_t depth) {
      return int64_t(gemm::dense_scratch_bytes(rows, cols, depth, p.dtype, threads));
    };
    scratch = pieces.take(std::max(
        {bytes_of(s.m, s.m, s.n), bytes_of(s.m, s.m, s.m), bytes_of(s.lines, s.length, s.m)}));
    bytes = pieces.bytes();
  }
};

class Chain {
 public:
  Chain(const NewtonSchulzParams& params, const ChainShape& chain_shape, char* workspace,
        int num_threads)
      : p(params),
        shape(chain_shape),
        m(shape.m),
        n(shape.n),
        threads(num_threads),
        memory(p, shape, threads, workspace) {}

  void run(const void* g, void* out) {
    g_ = static_cast<const char*>(g);
    out_ = out;
    normalize();
    if (p.method == KIMI_NEWTON_SCHULZ_GRAM)
      gram();
    else
      iterate();
  }

 private:
  // body(line) for `lines` of a length, in tasks of several.
  template <class Body>
  void each_of(int64_t lines, int64_t length, const Body& body) const {
    const int64_t run = std::max<int64_t>(1, kElements / std::max<int64_t>(length, 1));
    tasks(ceil_div(lines, run), threads, [&](int64_t task, int) {
      for (int64_t i = task * run; i < std::min(lines, (task + 1) * run); ++i) body(i);
    });
  }
  template <class Body>
  void each_line(const Body& body) const {
    each_of(shape.lines, shape.length, body);
  }
  const char* line(int64_t i) const { return g_ + i * shape.g_stride * size_of(p.g_dtype); }

  void normalize() {
    const CpuEngine& passes = kEngines.best();
    each_line(
        [&](int64_t i) { memory.maxima[i] = passes.largest(line(i), p.g_dtype, shape.length); });
    const float most = *std::max_element(memory.maxima, memory.maxima + shape.lines);
    int exponent = 0;
    if (most <= math::kMaxFloat) (void)std::frexp(most, &exponent);
    const float scale = scale_ = std::ldexp(1.0f, -std::clamp(exponent, -126, 126));

    if (shape.across) {
      tasks(ceil_div(m, kRowsAcross), threads, [&](int64_t task, int) {
        const int64_t first = task * kRowsAcross, rows = std::min(kRowsAcross, m - first);
        alignas(64) float lanes[16][kRowsAcross] = {};
        for (int64_t j = 0; j < n; ++j)
          passes.squares_across(line(j) + first * size_of(p.g_dtype), p.g_dtype, rows, scale,
                                lanes[j % 16]);
        for (int64_t i = 0; i < rows; ++i)
          memory.row_sums[first + i] = tree(&lanes[0][i], kRowsAcross);
      });
    } else {
      each_line([&](int64_t i) {
        float lanes[16] = {};
        passes.squares_along(line(i), p.g_dtype, n, scale, lanes);
        memory.row_sums[i] = tree(lanes, 1);
      });
    }
    double sum = 0;
    for (int64_t i = 0; i < m; ++i) sum += double(memory.row_sums[i]);
    float norm = float(std::sqrt(sum));
    if (p.eps > 0 && norm < p.eps * scale) norm = p.eps * scale;
    if (norm == 0) norm = 1.0f;
    least_root_ = p.eps * scale / norm;
    divisor_ = norm * std::ldexp(1.0f, -shape.shift);
    divide(nullptr);
  }

  // X = G / norm, and row i of that over roots[i].
  void divide(const float* roots) const {
    const bool of_lines = roots && !shape.across;
    each_line([&](int64_t i) {
      kEngines.best().divide(line(i), p.g_dtype, shape.length, scale_,
                             of_lines ? divisor_ * roots[i] : divisor_, of_lines ? nullptr : roots,
                             memory.x + i * padded(shape.length) * size_of(p.dtype), p.dtype);
    });
  }

  // AOL's scaling of X, and of its Gram matrix `a`, which is 2^lift times as large.
  void balance(char* a, int lift) const {
    const CpuEngine& passes = kEngines.best();
    const float scale = std::ldexp(1.0f, -lift);
    float* roots = memory.row_sums;
    const auto row = [&](int64_t i) { return a + i * padded(m) * size_of(p.dtype); };
    each_of(m, m, [&](int64_t i) {
      float lanes[16] = {};
      passes.sizes_along(row(i), p.dtype, m, scale, lanes);
      const float root = std::max(std::sqrt(tree(lanes, 1)), least_root_);  // NaN stays
      roots[i] = root < kLeastRoot ? std::numeric_limits<float>::infinity() : root;
    });
    each_of(m, m, [&](int64_t i) {
      passes.divide(row(i), p.dtype, m, scale, roots[i], roots, row(i), p.dtype);
    });
    divide(roots);
  }

  // The m x n form by its rows, and by its columns.
  Operand rows_of_x() const { return x_operand(shape.across); }
  Operand cols_of_x() const { return x_operand(!shape.across); }
  Operand x_operand(bool transposed) const {
    Operand x;
    x.data = memory.x;
    x.row_stride = transposed ? 1 : padded(shape.length);
    x.depth_stride = transposed ? padded(shape.length) : 1;
    x.storage = cpu::Storage(p.dtype);
    return x;
  }
  Operand square_operand(const char* square) const {
    Operand x;
    x.data = square;
    x.row_stride = padded(m);
    x.storage = cpu::Storage(p.dtype);
    return x;
  }

  // X X^T; before the first step AOL scales both.
  void gram_matrix(char* to, int32_t step) const {
    const bool aol = p.aol && step == 0;
    const int lift = aol && p.dtype == KIMI_FLOAT16 ? kGramLift : 0;
    Product q;
    q.a = q.b = rows_of_x();
    q.depth = n;
    q.alpha = std::ldexp(1.0f, lift - 2 * shape.shift);
    square_product(q, to);
    if (aol) balance(to, lift);
  }
  // d = alpha a b + beta c, all m x m and symmetric; c may be nullptr.
  void polynomial(const char* a, const char* b, float alpha, float beta, const char* c,
                  char* d) const {
    Product q;
    q.a = square_operand(a);
    q.b = square_operand(b);
    q.depth = m;
    q.alpha = alpha;
    q.beta = beta;
    q.c = c;
    square_product(q, d);
  }
  void square_product(Product& q, char* d) const {
    q.rows = q.cols = m;
    q.symmetric = p.method != KIMI_NEWTON_SCHULZ_STANDARD;
    q.d = d;
    q.c_stride = q.d_stride = padded(m);
    q.dtype = q.d_dtype = p.dtype;
    multiply(q, memory.scratch, threads);
  }

  // X = alpha W X + beta X, in place or, the last time, to the output.
  void apply(const char* w, float alpha, float beta, bool last) const {
    Product q;
    q.a = shape.across ? cols_of_x() : square_operand(w);
    q.b = shape.across ? square_operand(w) : cols_of_x();
    q.rows = shape.lines;
    q.cols = shape.length;
    q.depth = m;
    q.alpha = alpha;
    q.beta = beta;
    q.c = beta == 0 ? nullptr : memory.x;
    q.c_stride = padded(shape.length);
    q.d = last ? out_ : memory.x;
    q.d_stride = last ? shape.x_stride : padded(shape.length);
    q.dtype = p.dtype;
    q.d_dtype = last ? p.x_dtype : p.dtype;
    q.unit = last ? std::ldexp(1.0f, -shape.shift) : 1.0f;
    multiply(q, memory.scratch, threads);
  }

  void iterate() const {
    char* a = memory.squares[0];
    for (int32_t k = 0; k < p.steps; ++k) {
      const float* row = p.coefficients + 3 * k;
      gram_matrix(a, k);
      if (row[2] != 0) polynomial(a, a, row[2], row[1], a, a);
      apply(a, row[2] != 0 ? 1.0f : row[1], row[0], k + 1 == p.steps);
    }
  }

  void gram() const {
    char *r = memory.squares[0], *z = memory.squares[1], *q = memory.squares[2];
    const int32_t* restart = p.restarts;
    const int32_t* end = p.restarts + p.num_restarts;
    gram_matrix(r, 0);
    bool fresh = true;
    for (int32_t k = 0; k < p.steps; ++k) {
      const float *row = p.coefficients + 3 * k, a = row[0];
      if (restart != end && *restart == k) {
        ++restart;
        apply(q, 1, 0, false);
        gram_matrix(r, k);
        fresh = true;
      }
      if (row[2] != 0)
        polynomial(r, r, row[2], row[1], r, z);
      else
        scaled(r, row[1], z);
      if (fresh)
        plus_identity(z, a, q);
      else
        polynomial(q, z, 1, a, q, q);
      fresh = false;
      if (k + 1 == p.steps || (restart != end && *restart == k + 1)) continue;
      polynomial(r, z, 1, a, r, r);
      polynomial(z, r, 1, a, r, r);
    }
    apply(q, 1, 0, true);
  }

  void scaled(const char* from, float factor, char* to) const {
    kEngines.best().divide(from, p.dtype, m * padded(m), factor, 1.0f, nullptr, to, p.dtype);
  }
  void plus_identity(const char* from, float a, char* to) const {
    std::memcpy(to, from, size_t(m * padded(m) * size_of(p.dtype)));
    dispatch(p.dtype, [&]<class T>() {
      T* diagonal = reinterpret_cast<T*>(to);
      for (int64_t i = 0; i < m; ++i, diagonal += padded(m) + 1)
        *diagonal = from_float<T>(to_float(*diagonal) + a);
    });
  }

  const NewtonSchulzParams& p;
  const ChainShape& shape;
  const int64_t m, n;
  const int threads;
  const Memory memory;
  const char* g_ = nullptr;
  void* out_ = nullptr;
  float scale_ = 1, divisor_ = 1;  // X = (G scale) / divisor
  float least_root_ = 0;           // AOL's roots are at least that
};

}  // namespace

size_t chain_bytes(const NewtonSchulzParams& p, const ChainShape& shape, int threads) {
  return size_t(Memory(p, shape, threads, nullptr).bytes);
}

void chain(const NewtonSchulzParams& p, const ChainShape& shape, const void* g, void* x,
           char* workspace, int threads) {
  Chain(p, shape, workspace, threads).run(g, x);
}

}  // namespace kimi::newton_schulz_cpu
