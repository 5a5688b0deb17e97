// SPDX-License-Identifier: MIT
// newton_schulz on CUDA: which kernels take a call (cuda.h).
#include <algorithm>

#include "gemm/product.h"
#include "newton_schulz/cuda.h"
#include "newton_schulz/newton_schulz.h"

namespace kimi::newton_schulz_cuda {
namespace {

template <class Pointer>
Lines lines_of(const ChainShape& s, int64_t stride, kimi_dtype dtype, const Pointer* matrices,
               int64_t count) {
  const bool wide = std::all_of(matrices, matrices + count, [&](const void* matrix) {
    return gemm::divides16(matrix, stride, size_of(dtype));
  });
  return {stride, s.across, wide, dtype};
}

enum class Way { kOnChip, kOnChips, kStack };

// The second one on Hopper only: elsewhere such matrices are a stack. AOL stands between the norm
// and the first product's sums: it goes through whole products.
Way way_of(const NewtonSchulzParams& p, const ChainShape& s) {
  if (p.aol || p.steps > kMostSteps || s.m > most_side_of_cluster(p.dtype)) return Way::kStack;
  return s.m > most_side_of_block(p.dtype) ? Way::kOnChips : Way::kOnChip;
}

}  // namespace

Step step_of(const NewtonSchulzParams& p, int32_t k) {
  const float* row = p.coefficients + 3 * k;
  const bool restart =
      std::find(p.restarts, p.restarts + p.num_restarts, k) != p.restarts + p.num_restarts;
  return {row[0], row[1], row[2], keeps_a_out(p) || k == 0 || restart};
}

Lines lines_of_g(const NewtonSchulzParams& p, const ChainShape& s, int64_t first, int64_t count) {
  return lines_of(s, s.g_stride, p.g_dtype, p.g + first, count);
}
Lines lines_of_x(const NewtonSchulzParams& p, const ChainShape& s, int64_t first, int64_t count) {
  return lines_of(s, s.x_stride, p.x_dtype, p.x + first, count);
}

// Does not depend on the device.
size_t workspace_bytes(const NewtonSchulzParams& p) {
  const ChainShape s(p);
  const Way way = way_of(p, s);
  if (way == Way::kOnChip) return on_chip_bytes(p, s);
  const size_t bytes = stack_bytes(p, s, matrices_at_once(p, s));
  return way == Way::kStack ? bytes : std::max(bytes, on_chip_bytes(p, s));
}

Status run(const NewtonSchulzParams& p, void* stream) {
  const ChainShape s(p);
  const Way way = way_of(p, s);
  if (way == Way::kOnChip) return on_chip(p, s, stream);
  bool hopper = false;
  KIMI_RETURN_IF_ERROR(gemm::is_hopper("newton_schulz", &hopper));
  if (way == Way::kOnChips && hopper) return on_chips(p, s, stream);
  return stack(p, s, matrices_at_once(p, s), stream);
}

}  // namespace kimi::newton_schulz_cuda
