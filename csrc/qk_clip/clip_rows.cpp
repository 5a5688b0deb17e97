// SPDX-License-Identifier: MIT
// clip_rows: argument checks, and threads over the rows of each weight that has a head to clip.
#include <algorithm>
#include <limits>

#include "common/dtype.h"
#include "common/engine.h"
#include "common/strides.h"
#include "cpu/parallel.h"
#include "qk_clip/qk_clip.h"

namespace kimi {
namespace {

constexpr const char* kOp = "clip_rows";

Status check(const kimi_clip_weight& w, const ClipRowsParams& p) {
  if (w.layer < 0 || w.layer >= p.num_layers)
    return invalid(kOp, ": layer: expected 0..", p.num_layers - 1, ", got ", w.layer);
  const int32_t heads = p.layers[w.layer].heads;
  if (w.blocks < 1 || heads % w.blocks != 0)
    return invalid(kOp, ": blocks: expected a divisor of ", heads, " heads, got ", w.blocks);
  if (w.shared < 0 || w.whole < 0 || int64_t{w.shared} + w.whole > w.block_rows)
    return invalid(kOp, ": shared, whole: expected rows within the ", w.block_rows,
                   " of a head, got ", w.shared, " and ", w.whole);
  if (w.first_row < 0 || w.rows < 0 || w.cols < 0 ||
      w.first_row + w.rows > int64_t{w.blocks} * w.block_rows)
    return invalid(kOp, ": rows: expected at most ", int64_t{w.blocks} * w.block_rows, " for ",
                   w.blocks, " heads of ", w.block_rows, ", got ", w.rows, " from ", w.first_row,
                   " on, of ", w.cols, " columns");
  if (!(w.power >= 0 && w.power <= 1))
    return invalid(kOp, ": power: expected 0 to 1, got ", w.power);
  if (!is_dtype(w.dtype))
    return invalid(kOp, ": dtype: expected a kimi_dtype (0..2), got ", int(w.dtype));
  if (w.rows > 0 && w.cols > 0 && !w.weight)
    return invalid(kOp, ": weight: expected a pointer, got NULL");
  return w.cols > 0 ? check_strides(kOp, "row_stride", {{w.rows, w.row_stride}}) : Status::ok();
}

Status check(const ClipRowsParams& p) {
  if (p.num_layers < 0 || p.num_weights < 0)
    return invalid(kOp, ": sizes: expected 0 or more, got ", p.num_layers, " layers and ",
                   p.num_weights, " weights");
  if (!(p.tau > 0 && p.tau <= std::numeric_limits<float>::max()))
    return invalid(kOp, ": tau: expected a positive finite number, got ", p.tau);
  if ((p.num_layers > 0 && (!p.layers || !p.max_logits || !p.gamma)) ||
      (p.num_weights > 0 && !p.weights))
    return invalid(kOp, ": expected pointers for layers, weights, max_logits and gamma, got NULL");
  for (int64_t i = 0; i < p.num_layers; ++i)
    if (const auto [heads, members] = p.layers[i]; heads < 1 || members < 1 || heads % members != 0)
      return invalid(kOp, ": layers: expected 1 head or more in groups of a divisor of them, got ",
                     heads, " in groups of ", members);
  for (int64_t i = 0; i < p.num_weights; ++i) {
    KIMI_RETURN_IF_ERROR(check(p.weights[i], p));
    if (i > 0 && p.weights[i].layer < p.weights[i - 1].layer)
      return invalid(kOp, ": weights: expected in the order of the layers, got layer ",
                     p.weights[i].layer, " after ", p.weights[i - 1].layer);
  }
  return Status::ok();
}

// gamma [heads]: of the weight's layer.
void clip(const kimi_clip_weight& w, const float* gamma, int32_t heads) {
  const auto& passes = qk_clip_cpu::kEngines.best();
  const int64_t bytes = size_of(w.dtype), heads_of_block = heads / w.blocks;
  const int64_t grain = std::max<int64_t>(1, (32 << 10) / std::max<int64_t>(1, w.cols));
  cpu::parallel_for(w.rows, grain, [&](int64_t begin, int64_t end) {
    int64_t known = -1;  // the block that these are of
    float whole = 1.0f, shared = 1.0f;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = w.first_row + i, block = row / w.block_rows;
      if (block != known) {
        known = block;
        whole = gamma[block * heads_of_block];
        shared = power_of(whole, w.power);
      }
      const int64_t in = row - block * w.block_rows;
      const float factor = in < w.shared ? shared : in < w.shared + w.whole ? whole : 1.0f;
      if (factor != 1.0f)
        passes.scale(static_cast<char*>(w.weight) + i * w.row_stride * bytes, w.dtype, w.cols,
                     factor);
    }
  });
}

}  // namespace

Status clip_rows(const ClipRowsParams& p, kimi_device device, [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p));
  if (device == KIMI_DEVICE_CUDA) return KIMI_CUDA(kOp, clip_rows_cuda(p, stream));
  int64_t first = 0, weight = 0;
  for (int64_t i = 0; i < p.num_layers; ++i) {
    const auto [heads, members] = p.layers[i];
    float* const gamma = p.gamma + first;
    for (int32_t h = 0; h < heads; ++h)
      gamma[h] = gamma_of(p.max_logits + first, h, members, p.tau);
    const bool clips = std::any_of(gamma, gamma + heads, [](float g) { return g != 1.0f; });
    for (; weight < p.num_weights && p.weights[weight].layer == i; ++weight)
      if (clips) clip(p.weights[weight], gamma, heads);
    first += heads;
  }
  return Status::ok();
}

}  // namespace kimi
