// SPDX-License-Identifier: MIT
// grouped_gemm: argument checks and the choice of the device; on the CPU the groups of a call and
// its zero rows.
#include "grouped_gemm/grouped_gemm.h"

#include <limits>

#include "common/dtype.h"
#include "common/engine.h"
#include "common/strides.h"
#include "cpu/memory.h"
#include "gemm/cpu/groups.h"
#include "gemm/cpu/weights.h"
#include "grouped_gemm/check.h"

namespace kimi {
namespace {

template <class Params>
Status check_common(const char* op, const Params& p, kimi_device device) {
  if (p.num_rows < 0 || p.k < 0 || p.n < 0)
    return invalid(op, ": R, K, N: expected 0 or more, got ", p.num_rows, ", ", p.k, ", ", p.n,
                   "; pass the sizes of a and b");
  if (p.num_experts < 0)
    return invalid(op, ": num_experts: expected 0 or more, got ", p.num_experts,
                   "; pass the number of offsets");
  if (!is_dtype(p.dtype))
    return invalid(op, ": dtype: expected a kimi_dtype (0..2), got ", int(p.dtype),
                   "; convert a to one of them");
  if (p.out_dtype != p.dtype && p.out_dtype != KIMI_FLOAT32)
    return invalid(op, ": out_dtype: expected the dtype of a or KIMI_FLOAT32, got ",
                   int(p.out_dtype), "; choose one of these");
  if ((!p.offsets && p.num_experts > 0) || (device == KIMI_DEVICE_CPU && !p.workspace))
    return invalid(op,
                   ": offsets, workspace: expected pointers, got NULL; allocate what "
                   "kimi_grouped_gemm_workspace_bytes() says");
  if (p.num_rows > std::numeric_limits<int32_t>::max())
    return invalid(op, ": R: expected below 2^31 rows, got ", p.num_rows, "; split the rows");
  // Offsets on a GPU are not read here: no operation waits for the device.
  if (device == KIMI_DEVICE_CUDA) return Status::ok();
  return check_offsets(op, p.offsets, p.num_experts, p.num_rows, p.starts);
}

Status check(const GroupedGemmParams& p, kimi_device device) {
  const char* op = "grouped_gemm";
  KIMI_RETURN_IF_ERROR(check_common(op, p, device));
  const bool quantised =
      p.b_storage == KIMI_STORAGE_FP8_BLOCK || p.b_storage == KIMI_STORAGE_INT4_GROUP;
  if (!quantised && int(p.b_storage) != int(p.dtype))
    return invalid(op, ": b_storage: expected the dtype of a or a quantised storage, got ",
                   int(p.b_storage), "; convert b");
  if (quantised && device == KIMI_DEVICE_CUDA)
    return invalid(op,
                   ": b_storage: expected the dtype of a on CUDA, got quantised weights; "
                   "dequantise them");
  const bool empty = p.num_experts == 0 || p.k == 0 || p.n == 0;
  if (quantised && ((!p.b_scale && !empty) || p.b_k_stride != 1))
    return invalid(op, ": b: expected a scale and contiguous K beside quantised weights, got ",
                   p.b_scale ? "a K stride of " : "no scale and a K stride of ", p.b_k_stride,
                   "; pass the weight as it was quantised");
  if (p.b_storage == KIMI_STORAGE_INT4_GROUP && (p.b_n_stride % 2 || p.b_expert_stride % 2))
    return invalid(op, ": b: expected rows of int4 weights to begin at a byte, got strides of ",
                   p.b_expert_stride, " and ", p.b_n_stride, " elements; pad K to 8");
  if (p.num_rows > 0 && p.n > 0 && (!p.out || (p.k > 0 && p.num_experts > 0 && (!p.a || !p.b))))
    return invalid(op, ": a, b, out: expected pointers, got NULL; only empty operands may be NULL");
  KIMI_RETURN_IF_ERROR(check_strides(op, "a_row_stride, a_k_stride",
                                     {{p.num_rows, p.a_row_stride}, {p.k, p.a_k_stride}}));
  return check_strides(
      op, "b_expert_stride, b_k_stride, b_n_stride",
      {{p.num_experts, p.b_expert_stride}, {p.k, p.b_k_stride}, {p.n, p.b_n_stride}});
}

Status check(const GroupedGemmWgradParams& p, kimi_device device) {
  const char* op = "grouped_gemm_wgrad";
  KIMI_RETURN_IF_ERROR(check_common(op, p, device));
  if (p.num_experts > 0 && p.k > 0 && p.n > 0 && (!p.out || (p.num_rows > 0 && (!p.a || !p.dc))))
    return invalid(op,
                   ": a, dc, out: expected pointers, got NULL; only empty operands may be NULL");
  KIMI_RETURN_IF_ERROR(check_strides(op, "a_row_stride, a_k_stride",
                                     {{p.num_rows, p.a_row_stride}, {p.k, p.a_k_stride}}));
  KIMI_RETURN_IF_ERROR(check_strides(op, "dc_row_stride, dc_n_stride",
                                     {{p.num_rows, p.dc_row_stride}, {p.n, p.dc_n_stride}}));
  if (p.num_experts == 0 || p.k == 0 || p.n == 0) return Status::ok();
  if (p.out_n_stride != 1 && p.out_k_stride != 1 && p.n != 1 && p.k != 1)
    return invalid(op, ": out: expected contiguous N or K, got strides of ", p.out_k_stride,
                   " and ", p.out_n_stride, "; pass a dense tensor and copy");
  KIMI_RETURN_IF_ERROR(
      check_strides(op, "out_expert_stride", {{p.num_experts, p.out_expert_stride}}));
  KIMI_RETURN_IF_ERROR(check_strides(op, "out_k_stride", {{p.k, p.out_k_stride}}));
  return check_strides(op, "out_n_stride", {{p.n, p.out_n_stride}});
}

const char* offset(const void* data, int64_t bytes) {
  return static_cast<const char*>(data) + bytes;
}

template <class Params>
int64_t first_row(const Params& p, int32_t e) {
  return p.starts ? p.starts[e] : e ? p.offsets[e - 1] : 0;
}

// Group e of a forward: its rows of a by the columns of its matrix.
struct Forward {
  const GroupedGemmParams& p;

  grouped::Group operator()(int32_t e) const {
    const int64_t begin = first_row(p, e);
    grouped::Group g;
    g.rows = p.offsets[e] - begin;
    g.cols = p.n;
    g.depth = p.k;
    g.p_row = begin;
    g.p = {p.a, p.a_row_stride, p.k == 1 ? 1 : p.a_k_stride, cpu::Storage(p.dtype)};
    const kimi_expert_weights b = {p.b,          p.b_scale,    p.b_expert_stride,
                                   p.b_n_stride, p.b_k_stride, p.b_storage};
    g.s = grouped::matrix_of(b, e, p.n, p.k, false);
    return g;
  }
};

// Group e of a wgrad: rows are those of out whose elements do not lie side by side.
struct Wgrad {
  const GroupedGemmWgradParams& p;
  bool n_contiguous;

  grouped::Group operator()(int32_t e) const {
    const int64_t begin = first_row(p, e);
    grouped::Group g;
    g.depth = p.offsets[e] - begin;
    g.p_depth = begin;
    g.over_rows = true;
    // One token: any stride may stand for its depth.
    const cpu::Operand a = {p.a, p.a_k_stride, p.a_row_stride, cpu::Storage(p.dtype)};
    const cpu::Operand dc = {p.dc, p.dc_n_stride, p.dc_row_stride, cpu::Storage(p.dtype)};
    g.p = n_contiguous ? a : dc;
    g.s = n_contiguous ? dc : a;
    g.rows = n_contiguous ? p.k : p.n;
    g.cols = n_contiguous ? p.n : p.k;
    return g;
  }
};

void zero_rows(void* out, int64_t begin, int64_t end, int64_t row_bytes) {
  const int64_t grain = std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(row_bytes, 1));
  char* from = static_cast<char*>(out) + begin * row_bytes;
  cpu::parallel_for(end - begin, grain, [&](int64_t first, int64_t last) {
    std::memset(from + first * row_bytes, 0, size_t((last - first) * row_bytes));
  });
}

// Between groups and after the last one.
void zero_other_rows(const GroupedGemmParams& p, int64_t row_bytes) {
  int64_t end = 0;
  for (int32_t e = 0; e < p.num_experts; end = p.offsets[e++])
    if (p.starts) zero_rows(p.out, end, p.starts[e], row_bytes);
  zero_rows(p.out, end, p.num_rows, row_bytes);
}

}  // namespace

size_t grouped_gemm_workspace_bytes(const GroupedGemmParams& p, kimi_device device) {
  if (device == KIMI_DEVICE_CUDA || p.num_experts < 0 || p.k < 0 || !is_dtype(p.dtype)) return 0;
  return grouped::Workspace::bytes(cpu::block_engine(p.dtype), p.num_experts);
}

Status grouped_gemm(const GroupedGemmParams& p, kimi_device device, [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p, device));
  if (device == KIMI_DEVICE_CUDA) return KIMI_CUDA("grouped_gemm", grouped_gemm_cuda(p, stream));
  const cpu::BlockEngine& engine = cpu::block_engine(p.dtype);
  const grouped::CpuEngine& output = grouped::kEngines.best();
  const grouped::Workspace workspace(engine, p.workspace, p.num_experts);
  const Forward group{p};
  const int64_t out_bytes = size_of(p.out_dtype), bias_bytes = size_of(p.dtype);
  const bool around_cache = !p.accumulate && p.num_rows * p.n * out_bytes > cpu::kStreamBytes;
  if (!p.accumulate) zero_other_rows(p, p.n * out_bytes);
  grouped::run_groups(engine, workspace, p.num_experts, group, [&](const grouped::Block& b) {
    const int64_t row = group(b.group).p_row + b.row;
    const int64_t bias_at = (b.group * p.n + b.col) * bias_bytes;
    output.store({b.c, b.stride, b.rows, b.cols, p.bias ? offset(p.bias, bias_at) : nullptr,
                  p.dtype, static_cast<char*>(p.out) + (row * p.n + b.col) * out_bytes, p.n,
                  p.out_dtype, bool(p.accumulate), around_cache});
  });
  return Status::ok();
}

size_t grouped_gemm_wgrad_workspace_bytes(const GroupedGemmWgradParams& p, kimi_device device) {
  if (device == KIMI_DEVICE_CUDA || p.num_experts < 0 || !is_dtype(p.dtype)) return 0;
  return grouped::Workspace::bytes(cpu::block_engine(p.dtype), p.num_experts);
}

Status grouped_gemm_wgrad(const GroupedGemmWgradParams& p, kimi_device device,
                          [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p, device));
  if (device == KIMI_DEVICE_CUDA)
    return KIMI_CUDA("grouped_gemm_wgrad", grouped_gemm_wgrad_cuda(p, stream));
  const cpu::BlockEngine& engine = cpu::block_engine(p.dtype);
  const grouped::CpuEngine& output = grouped::kEngines.best();
  const grouped::Workspace workspace(engine, p.workspace, p.num_experts);
  const bool n_contiguous = p.out_n_stride == 1 || p.n == 1;
  const Wgrad group{p, n_contiguous};
  const int64_t out_bytes = size_of(p.out_dtype);
  const int64_t row_stride = n_contiguous ? p.out_k_stride : p.out_n_stride;
  if (p.accumulate && p.out_dtype == KIMI_FLOAT32 && !engine.finish) {
    grouped::add_groups(engine, workspace, p.num_experts, group, static_cast<float*>(p.out),
                        p.out_expert_stride, row_stride);
    return Status::ok();
  }
  const bool around_cache =
      !p.accumulate &&
      double(p.num_experts) * double(p.k) * double(p.n) * out_bytes > cpu::kStreamBytes;
  grouped::run_groups(engine, workspace, p.num_experts, group, [&](const grouped::Block& b) {
    if (p.accumulate && group(b.group).depth == 0) return;
    char* out = static_cast<char*>(p.out) +
                (b.group * p.out_expert_stride + b.row * row_stride + b.col) * out_bytes;
    output.store({b.c, b.stride, b.rows, b.cols, nullptr, p.dtype, out, row_stride, p.out_dtype,
                  bool(p.accumulate), around_cache});
  });
  return Status::ok();
}

}  // namespace kimi
