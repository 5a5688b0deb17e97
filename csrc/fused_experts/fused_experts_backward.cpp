// SPDX-License-Identifier: MIT
// fused_experts backward: argument checks; on the CPU five products (six where [g; u] is computed
// again), and sums of rows where biases want gradients.
#include "cpu/memory.h"
#include "fused_experts/check.h"
#include "fused_experts/layer.h"

namespace kimi {
namespace {

int64_t partials(const FusedExpertsBackwardParams& p) {
  return ceil_div(p.width, experts::kPartial);
}

struct Memory {        // of the workspace
  char* grad_gate_up;  // [R, 2F] dtype
  char* hidden;        // [R, F] dtype: weight times h
  float* partial;      // [R, partials]
  float* sums;         // buffer of sum_of_products
  char* gate_up;       // [R, 2F] dtype: [g; u], where the caller has none
  void* groups;
  int64_t bytes;

  Memory(const FusedExpertsBackwardParams& p, void* workspace) {
    Pieces pieces(workspace);
    const int64_t rows = p.num_tokens * p.top_k, size = size_of(p.dtype);
    grad_gate_up = pieces.take(rows, 2, p.width, size);
    hidden = pieces.take(rows, p.width, size);
    partial = pieces.take<float>(rows, partials(p));
    sums = pieces.take<float>(rows, experts::sum_columns(rows, p.hidden));
    gate_up = pieces.take(p.gate_up ? 0 : rows, 2, p.width, size);
    groups = pieces.take(grouped::Workspace::bytes(cpu::block_engine(p.dtype), p.num_experts));
    bytes = pieces.bytes();
  }
};

Status check(const FusedExpertsBackwardParams& p, kimi_device device) {
  const char* op = "fused_experts_backward";
  KIMI_RETURN_IF_ERROR(
      experts::check_sizes(op, p, device, fused_experts_backward_workspace_bytes(p, device)));
  const bool empty = p.hidden == 0 || p.width == 0;
  KIMI_RETURN_IF_ERROR(experts::check_weights(op, "w_gate_up", p.w_gate_up, p.dtype, false, empty));
  KIMI_RETURN_IF_ERROR(experts::check_weights(op, "w_down", p.w_down, p.dtype, false, empty));
  if (p.num_tokens > 0 && p.hidden > 0 && (!p.dy || !p.x))
    return invalid(op, ": dy, x: expected pointers, got NULL; only empty ones may be NULL");
  if (p.hidden > 0)
    KIMI_RETURN_IF_ERROR(check_strides(op, "dy_stride", {{p.num_tokens, p.dy_stride}}));
  return experts::check_layer_strides(op, p);
}

// The backward of one call; every method is one of its passes.
class Backward {
 public:
  explicit Backward(const FusedExpertsBackwardParams& p)
      : p_(p),
        bytes_(size_of(p.dtype)),
        rows_(p.num_tokens * p.top_k),
        blocks_(cpu::block_engine(p.dtype)),
        memory_(p, p.workspace),
        workspace_(blocks_, memory_.groups, p.num_experts) {}

  void run() {
    if (!p_.gate_up)
      experts::compute_gate_up(p_, blocks_, workspace_, memory_.gate_up, nullptr, nullptr);
    compute_grad_gate_up();
    if (p_.grad_weights) compute_grad_weights();
    if (p_.grad_w_down) compute_grad_w_down();
    if (p_.grad_w_gate_up) compute_grad_w_gate_up();
    if (p_.grad_b_down)
      sum_rows(p_.dy, p_.dy_stride, p_.hidden, p_.source, p_.weights, p_.grad_b_down);
    if (p_.grad_b_gate_up)
      sum_rows(memory_.grad_gate_up, 2 * p_.width, 2 * p_.width, nullptr, nullptr,
               p_.grad_b_gate_up);
    if (p_.dx) compute_dx();
  }

 private:
  void compute_grad_gate_up() {
    const char* gate_up = p_.gate_up ? static_cast<const char*>(p_.gate_up) : memory_.gate_up;
    const experts::Activation activation = experts::Activation::of(p_);
    const auto group = [&](int32_t e) {
      grouped::Group g = experts::rows_of(p_.offsets, e);
      g.p = tokens(p_.dy, p_.dy_stride);
      g.s = grouped::matrix_of(p_.w_down, e, p_.hidden, p_.width, true);
      g.cols = p_.width;
      g.depth = p_.hidden;
      return g;
    };
    grouped::run_groups(blocks_, workspace_, p_.num_experts, group, [&](const grouped::Block& b) {
      const int64_t row = group(b.group).p_row + b.row, at = row * 2 * p_.width + b.col;
      experts::kEngines.best().activate_backward(
          {b.c, b.stride, b.rows, b.cols, activation, p_.dtype, gate_up + at * bytes_,
           p_.source + row, p_.weights, memory_.grad_gate_up + at * bytes_,
           memory_.hidden + (row * p_.width + b.col) * bytes_,
           memory_.partial + row * partials(p_) + b.col / experts::kPartial, p_.width});
    });
  }

  void compute_grad_weights() {
    const int64_t count = partials(p_);
    cpu::parallel_for(rows_, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        float sum = 0.0f;
        if (const int64_t row = p_.row_map[pair]; row >= 0) {
          for (int64_t i = 0; i < count; ++i) sum += memory_.partial[row * count + i];
          if (p_.b_down) sum += bias_dot(pair / p_.top_k, row);
        }
        p_.grad_weights[pair] = sum;
      }
    });
  }

  // <b_down[e], dy[token]> for the expert e of a row: kLanes sums side by side.
  float bias_dot(int64_t token, int64_t row) const {
    const int64_t e = std::upper_bound(p_.offsets, p_.offsets + p_.num_experts, row) - p_.offsets;
    float sum = 0.0f;
    dispatch(p_.dtype, [&]<class T>() {
      constexpr int kLanes = 16;
      const T* dy = static_cast<const T*>(p_.dy) + token * p_.dy_stride;
      const T* bias = static_cast<const T*>(p_.b_down) + e * p_.hidden;
      float sums[kLanes] = {};
      int64_t i = 0;
      for (; i + kLanes <= p_.hidden; i += kLanes)
        for (int l = 0; l < kLanes; ++l) sums[l] += to_float(dy[i + l]) * to_float(bias[i + l]);
      for (; i < p_.hidden; ++i) sums[0] += to_float(dy[i]) * to_float(bias[i]);
      for (float lane : sums) sum += lane;
    });
    return sum;
  }

  // out[e] = sum of the rows of e of x [.., cols]: of tokens `source` says which, each times its
  // weight. kCols columns are a task.
  void sum_rows(const void* x, int64_t stride, int64_t cols, const int32_t* source,
                const float* weights, void* out) {
    constexpr int64_t kCols = 512;
    const int64_t in_expert = ceil_div(cols, kCols);
    cpu::parallel_tasks(p_.num_experts * in_expert, cpu::num_threads(), [&](int64_t task, int) {
      dispatch(p_.dtype, [&]<class T>() {
        const int64_t e = task / in_expert, col = task % in_expert * kCols;
        const int64_t n = std::min(kCols, cols - col);
        const grouped::Group group = experts::rows_of(p_.offsets, int32_t(e));
        float sums[kCols] = {};
        for (int64_t row = group.p_row; row < group.p_row + group.rows; ++row) {
          const T* from =
              static_cast<const T*>(x) + (source ? source[row] / p_.top_k : row) * stride + col;
          const float weight = weights ? weights[source[row]] : 1.0f;
          for (int64_t i = 0; i < n; ++i) sums[i] += weight * to_float(from[i]);
        }
        T* to = static_cast<T*>(out) + e * cols + col;
        for (int64_t i = 0; i < n; ++i) to[i] = from_float<T>(sums[i]);
      });
    });
  }

  // out[e] = left[rows of e]^T right[rows of e], [cols of left, cols of right]
  void outer_products(cpu::Operand left, int64_t rows, cpu::Operand right, int64_t cols,
                      void* out) {
    const auto group = [&](int32_t e) {
      const grouped::Group of_e = experts::rows_of(p_.offsets, e);
      grouped::Group g;
      g.p = left;
      g.s = right;
      g.rows = rows;
      g.cols = cols;
      g.depth = of_e.rows;
      g.p_depth = of_e.p_row;
      g.over_rows = true;
      return g;
    };
    const grouped::CpuEngine& store = grouped::kEngines.best();
    const bool stream =
        double(p_.num_experts) * double(rows) * double(cols) * bytes_ > cpu::kStreamBytes;
    grouped::run_groups(blocks_, workspace_, p_.num_experts, group, [&](const grouped::Block& b) {
      char* to = static_cast<char*>(out) + ((b.group * rows + b.row) * cols + b.col) * bytes_;
      store.store(
          {b.c, b.stride, b.rows, b.cols, nullptr, p_.dtype, to, cols, p_.dtype, false, stream});
    });
  }

  void compute_grad_w_down() {
    outer_products(gathered_columns(p_.dy, p_.dy_stride), p_.hidden,
                   columns(memory_.hidden, p_.width), p_.width, p_.grad_w_down);
  }
  void compute_grad_w_gate_up() {
    outer_products(columns(memory_.grad_gate_up, 2 * p_.width), 2 * p_.width,
                   gathered_columns(p_.x, p_.x_stride), p_.hidden, p_.grad_w_gate_up);
  }

  void compute_dx() {
    const auto group = [&](int32_t e) {
      grouped::Group g = experts::rows_of(p_.offsets, e);
      g.p = {memory_.grad_gate_up, 2 * p_.width, 1, cpu::Storage(p_.dtype)};
      g.s = grouped::matrix_of(p_.w_gate_up, e, 2 * p_.width, p_.hidden, true);
      g.depth = 2 * p_.width;
      return g;
    };
    experts::sum_of_products(p_, blocks_, workspace_, group, nullptr, nullptr, p_.dx, memory_.sums);
  }

  cpu::Operand tokens(const void* x, int64_t stride) const {
    return experts::tokens_of(x, stride, p_.dtype, p_.source, p_.top_k);
  }
  // The transposes of rows [R, n] and of gathered tokens: rows contiguous, depth counts rows.
  cpu::Operand columns(const void* x, int64_t n) const { return {x, 1, n, cpu::Storage(p_.dtype)}; }
  cpu::Operand gathered_columns(const void* x, int64_t stride) const {
    cpu::Operand c = columns(x, stride);
    c.depth_index = p_.source;
    c.index_divisor = p_.top_k;
    return c;
  }

  const FusedExpertsBackwardParams& p_;
  const int64_t bytes_, rows_;
  const cpu::BlockEngine& blocks_;
  const Memory memory_;
  grouped::Workspace workspace_;
};

}  // namespace

size_t fused_experts_backward_workspace_bytes(const FusedExpertsBackwardParams& p,
                                              [[maybe_unused]] kimi_device device) {
  if (!experts::sizes_are_good(p)) return 0;
#if defined(KIMI_OPS_CUDA)
  if (device == KIMI_DEVICE_CUDA) return fused_experts_backward_workspace_bytes_cuda(p);
#endif
  return size_t(Memory(p, nullptr).bytes);
}

Status fused_experts_backward(const FusedExpertsBackwardParams& p, kimi_device device,
                              [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p, device));
  if (device == KIMI_DEVICE_CUDA)
    return KIMI_CUDA("fused_experts_backward", fused_experts_backward_cuda(p, stream));
  Backward(p).run();
  return Status::ok();
}

}  // namespace kimi
