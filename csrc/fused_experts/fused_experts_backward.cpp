// SPDX-License-Identifier: MIT
// fused_experts backward: argument checks; on the CPU five products (six where [g; u] is computed
// again).
#include "fused_experts/check.h"
#include "fused_experts/layer.h"

namespace kimi {
namespace {

using experts::round64;

struct Layout {  // of the workspace
  int64_t gate_up, grad_gate_up, hidden, partial, sums, groups;

  explicit Layout(const FusedExpertsBackwardParams& p) {
    const int64_t rows = p.num_tokens * p.top_k, bytes = size_of(p.dtype);
    grad_gate_up = round64(rows * 2 * p.width * bytes);
    gate_up = p.gate_up ? 0 : grad_gate_up;
    hidden = round64(rows * p.width * bytes);
    partial = round64(rows * partials(p) * 4);
    sums = round64(rows * experts::sum_columns(rows, p.hidden) * 4);
    groups = int64_t(grouped::Workspace::bytes(cpu::block_engine(p.dtype), p.num_experts));
  }
  static int64_t partials(const FusedExpertsBackwardParams& p) {
    return (p.width + experts::kPartial - 1) / experts::kPartial;
  }
  int64_t total() const { return gate_up + grad_gate_up + hidden + partial + sums + groups; }
};

Status check(const FusedExpertsBackwardParams& p, kimi_device device) {
  const char* op = "fused_experts_backward";
  KIMI_RETURN_IF_ERROR(experts::check_sizes(op, p, device));
  KIMI_RETURN_IF_ERROR(experts::check_weights(op, "w_gate_up", p.w_gate_up, p.dtype, false));
  KIMI_RETURN_IF_ERROR(experts::check_weights(op, "w_down", p.w_down, p.dtype, false));
  if (p.num_tokens * p.hidden > 0 && (!p.dy || !p.x))
    return invalid(op, ": dy, x: expected pointers, got NULL; only empty ones may be NULL");
  return Status::ok();
}

// The backward of one call; every method is one of its passes.
class Backward {
 public:
  Backward(const FusedExpertsBackwardParams& p, const Layout& layout)
      : p_(p),
        bytes_(size_of(p.dtype)),
        rows_(p.num_tokens * p.top_k),
        engine_(experts::kEngines.best()),
        blocks_(cpu::block_engine(p.dtype)),
        grad_gate_up_(static_cast<char*>(p.workspace)),
        hidden_(grad_gate_up_ + layout.grad_gate_up),
        partial_(reinterpret_cast<float*>(hidden_ + layout.hidden)),
        sums_(reinterpret_cast<float*>(hidden_ + layout.hidden + layout.partial)),
        again_(hidden_ + layout.hidden + layout.partial + layout.sums),
        workspace_(blocks_, again_ + layout.gate_up, p.num_experts) {}

  void run() {
    if (!p_.gate_up) compute_gate_up();
    compute_grad_gate_up();
    if (p_.grad_weights) compute_grad_weights();
    if (p_.grad_w_down) compute_grad_w_down();
    if (p_.grad_w_gate_up) compute_grad_w_gate_up();
    if (p_.dx) compute_dx();
  }

 private:
  void compute_gate_up() {
    const auto group = [&](int32_t e) { return experts::gate_up_of(p_, e); };
    grouped::run_groups(blocks_, workspace_, p_.num_experts, group, [&](const grouped::Block& b) {
      const int64_t row = group(b.group).p_row + b.row;
      engine_.activate({b.c, b.stride, b.part_stride, b.rows, b.cols, p_.activation, p_.dtype,
                        again_ + (row * 2 * p_.width + b.col) * bytes_, nullptr, p_.width});
    });
  }

  void compute_grad_gate_up() {
    const char* gate_up = p_.gate_up ? static_cast<const char*>(p_.gate_up) : again_;
    const auto group = [&](int32_t e) {
      grouped::Group g = experts::rows_of(p_.offsets, e);
      g.p = tokens(p_.dy, p_.dy_stride);
      g.s = experts::weights_of(p_.w_down, e, p_.hidden, p_.width, true);
      g.cols = p_.width;
      g.depth = p_.hidden;
      return g;
    };
    grouped::run_groups(blocks_, workspace_, p_.num_experts, group, [&](const grouped::Block& b) {
      const int64_t row = group(b.group).p_row + b.row, at = row * 2 * p_.width + b.col;
      engine_.activate_backward(
          {b.c, b.stride, b.rows, b.cols, p_.activation, p_.dtype, gate_up + at * bytes_,
           p_.source + row, p_.weights, grad_gate_up_ + at * bytes_,
           hidden_ + (row * p_.width + b.col) * bytes_,
           partial_ + row * Layout::partials(p_) + b.col / experts::kPartial, p_.width});
    });
  }

  void compute_grad_weights() {
    const int64_t partials = Layout::partials(p_);
    cpu::parallel_for(rows_, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        float sum = 0.0f;
        if (const int64_t row = p_.row_map[pair]; row >= 0)
          for (int64_t i = 0; i < partials; ++i) sum += partial_[row * partials + i];
        p_.grad_weights[pair] = sum;
      }
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
    const bool stream = double(p_.num_experts) * double(rows) * double(cols) * bytes_ > 32 << 20;
    grouped::run_groups(blocks_, workspace_, p_.num_experts, group, [&](const grouped::Block& b) {
      char* to = static_cast<char*>(out) + ((b.group * rows + b.row) * cols + b.col) * bytes_;
      store.store(
          {b.c, b.stride, b.rows, b.cols, nullptr, p_.dtype, to, cols, p_.dtype, false, stream});
    });
  }

  void compute_grad_w_down() {
    outer_products(gathered_columns(p_.dy, p_.dy_stride), p_.hidden, columns(hidden_, p_.width),
                   p_.width, p_.grad_w_down);
  }
  void compute_grad_w_gate_up() {
    outer_products(columns(grad_gate_up_, 2 * p_.width), 2 * p_.width,
                   gathered_columns(p_.x, p_.x_stride), p_.hidden, p_.grad_w_gate_up);
  }

  void compute_dx() {
    const auto group = [&](int32_t e) {
      grouped::Group g = experts::rows_of(p_.offsets, e);
      g.p = {grad_gate_up_, 2 * p_.width, 1, cpu::Storage(p_.dtype)};
      g.s = experts::weights_of(p_.w_gate_up, e, 2 * p_.width, p_.hidden, true);
      g.depth = 2 * p_.width;
      return g;
    };
    experts::CombineArguments sum = {};
    sum.row_map = p_.row_map;
    sum.x = p_.dx;
    sum.dtype = p_.dtype;
    sum.hidden = p_.hidden;
    sum.top_k = p_.top_k;
    experts::sum_of_products(blocks_, workspace_, p_.num_experts, group, rows_, p_.num_tokens, sum,
                             sums_);
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
  const experts::CpuEngine& engine_;
  const cpu::BlockEngine& blocks_;
  char* grad_gate_up_;  // [R, 2F] dtype
  char* hidden_;        // [R, F] dtype: weight times h
  float* partial_;      // [R, partials]
  float* sums_;         // buffer of sum_of_products
  char* again_;         // [R, 2F] dtype: [g; u], where the caller has none
  grouped::Workspace workspace_;
};

}  // namespace

size_t fused_experts_backward_workspace_bytes(const FusedExpertsBackwardParams& p,
                                              [[maybe_unused]] kimi_device device) {
  if (!experts::sizes_are_good(p)) return 0;
#if defined(KIMI_OPS_CUDA)
  if (device == KIMI_DEVICE_CUDA) return fused_experts_backward_workspace_bytes_cuda(p);
#endif
  return size_t(Layout(p).total());
}

Status fused_experts_backward(const FusedExpertsBackwardParams& p, kimi_device device,
                              [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p, device));
  if (device == KIMI_DEVICE_CUDA)
    return KIMI_CUDA("fused_experts_backward", fused_experts_backward_cuda(p, stream));
  Backward(p, Layout(p)).run();
  return Status::ok();
}

}  // namespace kimi
