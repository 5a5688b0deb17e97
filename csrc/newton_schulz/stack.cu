// SPDX-License-Identifier: MIT
// Matrices that do not fit on chip: stacks of them go through whole products (gemm/product.h), as
// many at a time as the workspace holds.
//
//   squares   a block the sum of 131 072 elements of G, fp64
//   divide    X = G / norm, as G lies in memory: tall matrices are never transposed
//   roots     AOL, of R: a warp a row, e_i = sqrt(sum_j |R_ij|), lane l the columns 4 l + 128 k ...
//   balance   AOL: R_ij / (e_i e_j), and X = G / (norm e_i) by `divide` once more
//   products  a stack each: gram, one restart: 2 R = X X^T, 14 of m^3, 2 X = Q X; standard: 3 a step
//   finish    only where the outputs are not equidistant: else the last product writes them
//
// Bytes a matrix: two X and four of [m, m] in dtype (2048 x 7168 in fp16: 92 MB), 4 m and 8 a block
// of squares. A call asks for at most 1 GiB or what one matrix takes.
//
// Predicted for an H100, not measured: squares 4 bytes an element of fp32 at 2.8 TB/s, divide 6:
// 52 us for 2048 x 7168; AOL 6 m^2 + 6 m n bytes in fp16: 40 us. The products: docs/performance_gpu.md.
#include <algorithm>
#include <utility>

#include "common/workspace.h"
#include "device/launch.cuh"
#include "gemm/product.h"
#include "newton_schulz/elements.cuh"

namespace kimi::newton_schulz_cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int64_t kTilesOfBlock = 256;

struct Pass {
  Lines g, x;  // x: of the stack or of the outputs
  int64_t m, n, lines, length;
  int64_t x_group;        // from matrix to matrix of the stack, elements
  void* stack;            // [count, lines, length] dtype
  double* partial;        // [count, blocks]
  int32_t blocks, shift;  // of a matrix
  float eps;
  float* roots;         // [count, m]: of the rows of the m x n form
  int32_t rows_across;  // they are the columns of a line
  float unlift;         // R is 1 / unlift times as large
};

// The tiles of this block, of a matrix of `tiles`.
__device__ inline int64_t first_tile() { return blockIdx.x * kTilesOfBlock; }
__device__ inline int64_t last_tile(int64_t tiles) {
  const int64_t last = first_tile() + kTilesOfBlock;
  return last < tiles ? last : tiles;
}

// Of eight warps' sums, in their order; every thread has it.
__device__ inline double sum_of_warps(double mine) {
  KIMI_STATIC_SHARED(double, partial, kWarps);
  if (lane_id() == 0) partial[warp_id()] = mine;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += partial[w];
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    squares_kernel(const __grid_constant__ Pass p, const __grid_constant__ Matrices matrices) {
  const int64_t last = last_tile(tiles_of(p.m, p.n));
  const double sum = sum_of_warps(
      sum_of_squares(matrices.g[blockIdx.y], p.g, p.m, p.n, first_tile(), last, kWarps));
  if (threadIdx.x == 0) p.partial[int64_t{blockIdx.y} * p.blocks + blockIdx.x] = sum;
}

__device__ inline char* of_stack(const Pass& p, const Lines& x) {
  const int64_t size = x.dtype == KIMI_FLOAT32 ? 4 : 2;
  return static_cast<char*>(p.stack) + blockIdx.y * p.x_group * size;
}

// Elementwise, so that lines count as rows whatever they are of the m x n form.
template <class Body>
__device__ inline void each_of_lines(const Pass& p, const Body& body) {
  for_each_block(p.lines, p.length, first_tile(), last_tile(tiles_of(p.lines, p.length)), kWarps,
                 body);
}

// The sum of the squares of a matrix; every thread has it.
__device__ inline double squares_of(const Pass& p) {
  double mine = 0.0;
  for (int b = static_cast<int>(threadIdx.x); b < p.blocks; b += kThreads)
    mine += p.partial[int64_t{blockIdx.y} * p.blocks + b];
  return sum_of_warps(warp_sum(mine));
}

// roots[first ...] of a matrix, as many as there are.
__device__ inline void load_roots(const Pass& p, int64_t first, int count, float (&roots)[4]) {
  load4(p.roots + int64_t{blockIdx.y} * p.m + first, roots, count, false);
}

__global__ void __launch_bounds__(kThreads)
    divide_kernel(const __grid_constant__ Pass p, const __grid_constant__ Matrices matrices) {
  const Unit unit(squares_of(p), p.eps, p.shift);
  each_of_lines(p, [&](const Block& b) {
    Values v;
    load_block(matrices.g[blockIdx.y], p.g, b, v);
    if (p.roots == nullptr) {
      unit.apply(v);
    } else {
      float root[4];
      load_roots(p, p.rows_across ? b.col : b.row, p.rows_across ? b.cols : b.rows, root);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          v[i][j] = div_rn(mul_rn(v[i][j], unit.scale),
                           mul_rn(unit.divisor, p.rows_across ? root[j] : root[i]));
    }
    store_block(of_stack(p, p.x), p.x, b, v);
  });
}

__global__ void __launch_bounds__(kThreads)
    roots_kernel(const __grid_constant__ Pass p, const __grid_constant__ Matrices) {
  const double norm = sqrt(squares_of(p));
  const float least = norm < double{p.eps} ? 1.0f : static_cast<float>(double{p.eps} / norm);
  const int64_t row = int64_t{blockIdx.x} * kWarps + warp_id();
  if (row >= p.m) return;
  float sum = 0.0f;
  for (int64_t col = 4 * lane_id(); col < p.m; col += 4 * kWarpSize) {
    Values v;
    load_block(of_stack(p, p.x), p.x, {row, col, 1, up_to_4(p.m - col)}, v);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum = add_rn(sum, fabsf(v[0][j]));
  }
#pragma unroll
  for (int half = 16; half > 0; half /= 2) sum = add_rn(sum, warp_exchange(sum, half));
  float root = sqrt_rn(mul_rn(sum, p.unlift));
  if (root < least) root = least;
  if (root < kLeastRoot) root = float_of(0x7f800000u);  // a row of zeros stays one
  if (lane_id() == 0) p.roots[int64_t{blockIdx.y} * p.m + row] = root;
}

__global__ void __launch_bounds__(kThreads)
    balance_kernel(const __grid_constant__ Pass p, const __grid_constant__ Matrices) {
  each_of_lines(p, [&](const Block& b) {
    Values v;
    float of_row[4], of_col[4];
    load_block(of_stack(p, p.x), p.x, b, v);
    load_roots(p, b.row, b.rows, of_row);
    load_roots(p, b.col, b.cols, of_col);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        v[i][j] = div_rn(mul_rn(v[i][j], p.unlift), mul_rn(of_row[i], of_col[j]));
    store_block(of_stack(p, p.x), p.x, b, v);
  });
}

// From the stack, p.g, to the outputs, p.x.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Pass p, const __grid_constant__ Matrices matrices) {
  each_of_lines(p, [&](const Block& b) {
    Values v;
    load_block(of_stack(p, p.g), p.g, b, v);
    undo_shift(v, p.shift);
    store_block(matrices.x[blockIdx.y], p.x, b, v);
  });
}

// `count` matrices' part of the workspace.
struct Memory {
  int64_t x_stride, square_stride, x_group, square_group;  // elements
  int32_t blocks;
  char *x[2], *square[4];
  double* partial;
  float* roots;
  int64_t bytes;

  Memory(const NewtonSchulzParams& p, const ChainShape& s, int64_t count, void* workspace)
      : x_stride(round_up(s.length, 8)),
        square_stride(round_up(s.m, 8)),
        x_group(s.lines * x_stride),
        square_group(s.m * square_stride),
        blocks(static_cast<int32_t>(ceil_div(tiles_of(s.m, s.n), kTilesOfBlock))) {
    Pieces pieces(workspace, 256);
    const int64_t size = size_of(p.dtype);
    for (char*& stack : x) stack = pieces.take(count, x_group, size);
    for (char*& stack : square) stack = pieces.take(count, square_group, size);
    partial = pieces.take<double>(count, blocks);
    roots = pieces.take<float>(p.aol ? count : 0, s.m);
    bytes = pieces.bytes();
  }
};

// One stack through the steps.
class Stack {
 public:
  Stack(const NewtonSchulzParams& params, const ChainShape& shape, int64_t first, int64_t count,
        void* stream)
      : p(params),
        s(shape),
        first_(first),
        count_(count),
        stream_(stream),
        memory_(p, s, count, p.workspace),
        x_(memory_.x[0]),
        spare_x_(memory_.x[1]),
        r_(memory_.square[0]),
        z_(memory_.square[1]),
        q_(memory_.square[2]),
        t_(memory_.square[3]) {
    std::copy_n(p.g + first, count, matrices_.g);
    std::copy_n(p.x + first, count, matrices_.x);
  }

  Status run() {
    KIMI_RETURN_IF_ERROR(normalize());
    float beta = 0.0f;
    for (int32_t k = 0;; ++k) {
      const bool end = k == p.steps;
      if (end || step_of(p, k).fresh) {
        if (k > 0) KIMI_RETURN_IF_ERROR(apply(beta, end));
        if (end) return Status::ok();
        KIMI_RETURN_IF_ERROR(gram_matrix(k == 0 ? lift() : 0));
        if (k == 0 && p.aol) KIMI_RETURN_IF_ERROR(balance());
      }
      const Step step = step_of(p, k);
      KIMI_RETURN_IF_ERROR(polynomials(step, k + 1 == p.steps || step_of(p, k + 1).fresh));
      beta = keeps_a_out(p) ? step.a : 0.0f;
    }
  }

 private:
  Lines lines_of_stack() const { return {memory_.x_stride, s.across, 1, p.dtype}; }

  using Kernel = void (*)(Pass, Matrices);
  Pass pass_over(Lines g, Lines x, void* stack) const {
    Pass work{};
    work.m = s.m;
    work.n = s.n;
    work.lines = s.lines;
    work.length = s.length;
    work.g = g;
    work.x = x;
    work.x_group = memory_.x_group;
    work.stack = stack;
    work.partial = memory_.partial;
    work.blocks = memory_.blocks;
    work.shift = s.shift;
    work.eps = p.eps;
    return work;
  }
  // kernel(work, matrices), `blocks` a matrix.
  Status launch_pass(Kernel kernel, const Pass& work, int64_t blocks) const {
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(count_));
    return launch(kernel, LaunchConfig{grid, dim3(kThreads), 0, stream_}, work, matrices_);
  }
  // Over every element; lines count as rows.
  Status pass(Kernel kernel, Pass work) const {
    work.g.across = work.x.across = 0;
    return launch_pass(kernel, work, ceil_div(tiles_of(work.lines, work.length), kTilesOfBlock));
  }

  Status normalize() const {
    const Pass work = pass_over(lines_of_g(p, s, first_, count_), lines_of_stack(), x_);
    KIMI_RETURN_IF_ERROR(launch_pass(squares_kernel, work, memory_.blocks));
    return pass(divide_kernel, work);
  }

  // AOL: rows of R and X over their roots.
  Status balance() const {
    Pass work = pass_over({}, {memory_.square_stride, 0, 1, p.dtype}, r_);
    work.lines = work.length = s.m;
    work.x_group = memory_.square_group;
    work.roots = memory_.roots;
    work.unlift = std::ldexp(1.0f, -lift());
    KIMI_RETURN_IF_ERROR(launch_pass(roots_kernel, work, ceil_div(s.m, int64_t{kWarps})));
    KIMI_RETURN_IF_ERROR(pass(balance_kernel, work));
    work = pass_over(lines_of_g(p, s, first_, count_), lines_of_stack(), x_);
    work.roots = memory_.roots;
    work.rows_across = s.across;
    return pass(divide_kernel, work);
  }
  int lift() const { return p.aol && p.dtype == KIMI_FLOAT16 ? kGramLift : 0; }

  // The m x n form by its rows, and by its columns.
  gemm::Matrix rows_of_x() const { return x_operand(s.across); }
  gemm::Matrix cols_of_x() const { return x_operand(!s.across); }
  gemm::Matrix x_operand(bool transposed) const {
    return {x_, transposed ? 1 : memory_.x_stride, transposed ? memory_.x_stride : 1,
            memory_.x_group};
  }
  gemm::Matrix square_operand(const char* a) const {
    return {a, memory_.square_stride, 1, memory_.square_group};
  }
  gemm::Product product(const gemm::Matrix& a, const gemm::Matrix& b, int64_t rows, int64_t cols,
                        int64_t depth) const {
    gemm::Product q{};
    q.grouping = gemm::Grouping::kBatch;
    q.dtype = p.dtype;
    q.a = a;
    q.b = b;
    q.groups.count = static_cast<int32_t>(count_);
    q.rows = rows;
    q.cols = cols;
    q.depth = depth;
    return q;
  }

  // D = alpha A B^T + beta C + delta I, [m, m] and symmetric. D is neither A nor B.
  Status square(const gemm::Matrix& a, const gemm::Matrix& b, int64_t depth, float alpha,
                float beta, const char* c, float delta, char* d) const {
    gemm::Product q = product(a, b, s.m, s.m, alpha == 0.0f ? 0 : depth);
    q.lower = true;
    gemm::AffineParams out{d, memory_.square_stride, memory_.square_group, p.dtype};
    out.c = c;
    out.c_row_stride = memory_.square_stride;
    out.c_group_stride = memory_.square_group;
    out.alpha = alpha;
    out.beta = beta;
    out.delta = delta;
    return gemm::affine_cuda("newton_schulz", q, out, stream_);
  }
  Status square(const char* a, const char* b, float alpha, float beta, const char* c, float delta,
                char* d) const {
    return square(square_operand(a), square_operand(b), s.m, alpha, beta, c, delta, d);
  }

  Status gram_matrix(int lift) const {
    const gemm::Matrix x = rows_of_x();
    return square(x, x, s.n, std::ldexp(1.0f, lift - 2 * s.shift), 0.0f, nullptr, 0.0f, r_);
  }

  // As on_chip.cuh says.
  Status polynomials(const Step& step, bool last) {
    const float delta = step.fresh && !keeps_a_out(p) ? step.a : 0.0f;
    const float beta = step.fresh ? 0.0f : step.a;
    char* const w = step.fresh ? q_ : z_;
    KIMI_RETURN_IF_ERROR(square(r_, r_, step.c, step.b, r_, delta, w));
    if (!step.fresh) {
      KIMI_RETURN_IF_ERROR(square(q_, z_, 1.0f, beta, q_, 0.0f, t_));
      std::swap(q_, t_);
    }
    if (last) return Status::ok();
    KIMI_RETURN_IF_ERROR(square(r_, w, 1.0f, beta, r_, 0.0f, t_));
    return square(w, t_, 1.0f, beta, t_, 0.0f, r_);
  }

  // X = Q X + beta X, to the other stack or, the last time, to the outputs.
  Status apply(float beta, bool last) {
    const gemm::Matrix q = square_operand(q_), x = cols_of_x();
    const gemm::Product work = product(s.across ? x : q, s.across ? q : x, s.lines, s.length, s.m);
    const int64_t distance = last ? distance_of_outputs() : 0;
    gemm::AffineParams out{spare_x_, memory_.x_stride, memory_.x_group, p.dtype};
    if (distance != 0) {
      out.d = p.x[first_];
      out.d_row_stride = s.x_stride;
      out.d_group_stride = distance;
      out.d_dtype = p.x_dtype;
      out.unit = std::ldexp(1.0f, -s.shift);
    }
    out.c = x_;
    out.c_row_stride = memory_.x_stride;
    out.c_group_stride = memory_.x_group;
    out.beta = beta;
    KIMI_RETURN_IF_ERROR(gemm::affine_cuda("newton_schulz", work, out, stream_));
    std::swap(x_, spare_x_);
    if (!last || distance != 0) return Status::ok();
    return pass(finish_kernel, pass_over(lines_of_stack(), lines_of_x(p, s, first_, count_), x_));
  }

  // Elements from output to output of the stack; 0: they are not equidistant.
  int64_t distance_of_outputs() const {
    const auto address = [&](int64_t e) { return reinterpret_cast<intptr_t>(matrices_.x[e]); };
    const int64_t size = size_of(p.x_dtype);
    if (count_ == 1) return s.lines * s.x_stride;
    const int64_t bytes = address(1) - address(0);
    for (int64_t e = 2; e < count_; ++e)
      if (address(e) - address(e - 1) != bytes) return 0;
    return bytes > 0 && bytes % size == 0 ? bytes / size : 0;
  }

  const NewtonSchulzParams& p;
  const ChainShape& s;
  const int64_t first_, count_;
  void* const stream_;
  const Memory memory_;
  Matrices matrices_;
  char *x_, *spare_x_, *r_, *z_, *q_, *t_;
};

}  // namespace

int64_t matrices_at_once(const NewtonSchulzParams& p, const ChainShape& s) {
  const int64_t fit = std::max<int64_t>(1, kWorkspace / Memory(p, s, 1, nullptr).bytes);
  return std::min<int64_t>({fit, p.num_matrices, kMostMatrices});
}

size_t stack_bytes(const NewtonSchulzParams& p, const ChainShape& s, int64_t at_once) {
  return static_cast<size_t>(Memory(p, s, at_once, nullptr).bytes);
}

Status stack(const NewtonSchulzParams& p, const ChainShape& s, int64_t at_once, void* stream) {
  for (int64_t first = 0; first < p.num_matrices; first += at_once) {
    const int64_t count = std::min(at_once, p.num_matrices - first);
    KIMI_RETURN_IF_ERROR(Stack(p, s, first, count, stream).run());
  }
  return Status::ok();
}

}  // namespace kimi::newton_schulz_cuda
