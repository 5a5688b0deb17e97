// SPDX-License-Identifier: MIT
// qk_clip: argument checks, choice of the engine, threads over blocks of queries or rows.
#include "qk_clip/qk_clip.h"

#include <algorithm>
#include <limits>

#include "common/dtype.h"
#include "common/engine.h"
#include "cpu/parallel.h"
#include "gemm/cpu/block.h"

namespace kimi {
namespace {

using cpu::BlockEngine;
using cpu::kStripRows;

constexpr CpuEngines<qk_clip_cpu::CpuEngine> kEngines = {
    {&qk_clip_cpu::kPortableEngine, KIMI_X86(qk_clip_cpu::kAvx2Engine),
     KIMI_X86(qk_clip_cpu::kAvx512Engine), nullptr, nullptr}};

// Queries of a block: a strip of keys is packed for each, and the block of 512 x 192 bf16 keeps to
// a fifth of an L2 cache of 1 MiB.
constexpr int64_t kBlockQueries = 512;
constexpr int64_t kAlign = 64;

int64_t aligned(int64_t bytes) { return BlockEngine::round_up(bytes, kAlign); }

// Where things lie in the workspace: a maximum for each block, then the scratch of each thread.
struct Layout {
  const BlockEngine& engine;
  int64_t block_rows, blocks_of_head, tasks, depth_blocks;
  int64_t panel_bytes, strip_bytes, thread_bytes, maxima_bytes;

  explicit Layout(const AttentionMaxLogitsParams& p) : engine(cpu::block_engine(p.dtype)) {
    const int64_t group = engine.panel_rows;
    block_rows = std::max<int64_t>(1, kBlockQueries / group) * group;
    blocks_of_head = (p.queries + block_rows - 1) / block_rows;
    tasks = p.batch * p.heads * blocks_of_head;
    depth_blocks = (p.dim + engine.depth_block - 1) / engine.depth_block;
    panel_bytes = aligned(engine.panel_bytes(block_rows, p.dim));
    strip_bytes = aligned(engine.strip_bytes());
    thread_bytes = panel_bytes + strip_bytes + block_rows * kStripRows * 4;
    maxima_bytes = aligned(tasks * 4);
  }
  size_t bytes() const { return size_t(maxima_bytes + cpu::num_threads() * thread_bytes); }
};

Status check(const AttentionMaxLogitsParams& p) {
  const char* op = "attention_max_logits";
  if (p.batch < 0 || p.heads < 0 || p.queries < 0 || p.keys < 0 || p.dim < 0)
    return invalid(op, ": sizes: expected 0 or more, got batch ", p.batch, ", heads ", p.heads,
                   ", queries ", p.queries, ", keys ", p.keys, ", dim ", p.dim);
  if (p.kv_heads < 1 || p.heads % p.kv_heads != 0)
    return invalid(op, ": kv_heads: expected a divisor of heads ", p.heads, ", got ", p.kv_heads);
  if (!(p.scale > 0 && p.scale <= std::numeric_limits<float>::max()))
    return invalid(op, ": scale: expected a positive finite number, got ", p.scale);
  if (!is_dtype(p.dtype))
    return invalid(op, ": dtype: expected a kimi_dtype (0..2), got ", int(p.dtype));
  if (p.causal && p.queries > p.keys)
    return invalid(op, ": queries: expected at most as many as keys with causal, got ", p.queries,
                   " and ", p.keys);
  if (p.heads > 0 && (!p.max_logits || !p.workspace))
    return invalid(op, ": expected pointers for max_logits and workspace, got NULL");
  if (p.batch * p.heads * p.queries * p.keys * p.dim > 0 && (!p.q || !p.k))
    return invalid(op, ": expected pointers for q and k, got NULL");
  return Status::ok();
}

// The largest sum of block `block` of head `head` in batch `batch`, before the scale.
float largest_of_block(const AttentionMaxLogitsParams& p, const Layout& layout, int64_t batch,
                       int64_t head, int64_t block, char* scratch) {
  const BlockEngine& engine = layout.engine;
  const qk_clip_cpu::CpuEngine& passes = kEngines.best();
  const int64_t bytes = size_of(p.dtype), kv_head = head / (p.heads / p.kv_heads);
  const cpu::Operand q = {
      static_cast<const char*>(p.q) + (batch * p.q_batch_stride + head * p.q_head_stride) * bytes,
      p.q_row_stride, p.q_col_stride, cpu::Storage(p.dtype)};
  const cpu::Operand k = {static_cast<const char*>(p.k) +
                              (batch * p.k_batch_stride + kv_head * p.k_head_stride) * bytes,
                          p.k_row_stride, p.k_col_stride, cpu::Storage(p.dtype)};
  char* panel = scratch;
  char* strip = panel + layout.panel_bytes;
  float* sums = reinterpret_cast<float*>(strip + layout.strip_bytes);

  const int64_t first = block * layout.block_rows;
  const int64_t rows = std::min(layout.block_rows, p.queries - first);
  const int64_t padded = BlockEngine::round_up(rows, engine.panel_rows);
  // Row i of the block sees keys 0 .. before + i.
  const int64_t before = p.causal ? first + p.keys - p.queries : p.keys;
  const int64_t keys = std::min(p.keys, before + rows);
  engine.pack_panel(q, first, rows, 0, p.dim, panel);
  float most = -std::numeric_limits<float>::infinity();
  for (int64_t key = 0; key < keys; key += kStripRows) {
    const int64_t cols = std::min(kStripRows, p.keys - key);
    const int64_t start =
        std::max<int64_t>(0, key - before) / engine.panel_rows * engine.panel_rows;
    const char* panel_block = panel;
    for (int64_t d = 0; d < p.dim; d += engine.depth_block) {
      const int64_t depth = std::min(engine.depth_block, p.dim - d);
      const int64_t row_bytes = engine.packed_depth(depth) * engine.element_bytes;
      engine.pack_strip(k, key, cols, d, depth, strip);
      engine.multiply(panel_block + start * row_bytes, rows - start, strip, depth, {}, sums,
                      kStripRows, d > 0);
      panel_block += padded * row_bytes;
    }
    if (engine.finish) engine.finish(sums, rows - start, kStripRows, kStripRows);
    const float here = passes.largest(sums, rows - start, cols, before + start - key + 1);
    if (here != here) return here;
    most = std::max(most, here);
  }
  return most;
}

}  // namespace

kimi_isa qk_clip_isa() { return cpu::block_engine_isa(); }

size_t attention_max_logits_workspace_bytes(const AttentionMaxLogitsParams& p) {
  if (p.batch < 0 || p.heads < 0 || p.queries < 0 || p.dim < 0 || !is_dtype(p.dtype)) return 0;
  return std::max<size_t>(kAlign, Layout(p).bytes());
}

Status attention_max_logits(const AttentionMaxLogitsParams& p, kimi_device device, void*) {
  KIMI_RETURN_IF_ERROR(cpu_only("attention_max_logits", device));
  KIMI_RETURN_IF_ERROR(check(p));
  const float none = -std::numeric_limits<float>::infinity();
  std::fill(p.max_logits, p.max_logits + p.heads, none);
  if (p.batch == 0 || p.heads == 0 || p.queries == 0 || p.keys == 0) return Status::ok();
  if (p.dim == 0) {
    std::fill(p.max_logits, p.max_logits + p.heads, 0.0f);
    return Status::ok();
  }
  const Layout layout(p);
  float* maxima = static_cast<float*>(p.workspace);
  char* scratch = static_cast<char*>(p.workspace) + layout.maxima_bytes;
  // The last blocks of a causal head are its longest: they go first.
  cpu::parallel_tasks(layout.tasks, [&](int64_t task, int thread) {
    const int64_t pairs = p.batch * p.heads, block = layout.blocks_of_head - 1 - task / pairs;
    const int64_t batch = task % pairs / p.heads, head = task % pairs % p.heads;
    maxima[(head * p.batch + batch) * layout.blocks_of_head + block] = largest_of_block(
        p, layout, batch, head, block, scratch + int64_t{thread} * layout.thread_bytes);
  });
  const int64_t blocks = p.batch * layout.blocks_of_head;
  for (int64_t h = 0; h < p.heads; ++h) {
    float most = none;
    for (int64_t i = h * blocks; i < (h + 1) * blocks && most == most; ++i)
      most = maxima[i] != maxima[i] ? maxima[i] : std::max(most, maxima[i]);
    p.max_logits[h] = most * p.scale;
  }
  return Status::ok();
}

Status scale_rows(const ScaleRowsParams& p, kimi_device device, void*) {
  const char* op = "scale_rows";
  KIMI_RETURN_IF_ERROR(cpu_only(op, device));
  if (p.heads < 0 || p.cols < 0 || p.rows_of_head < 0)
    return invalid(op, ": heads, rows_of_head, cols: expected 0 or more, got ", p.heads, ", ",
                   p.rows_of_head, ", ", p.cols);
  if (p.first < 0 || p.last < p.first || p.last > p.rows_of_head)
    return invalid(op, ": first, last: expected rows within 0..", p.rows_of_head, ", got ", p.first,
                   " and ", p.last);
  if (!is_dtype(p.dtype))
    return invalid(op, ": dtype: expected a kimi_dtype (0..2), got ", int(p.dtype));
  const int64_t rows = p.last - p.first;
  if (p.heads == 0 || rows == 0 || p.cols == 0) return Status::ok();
  if (!p.weight || !p.factors)
    return invalid(op, ": expected pointers for weight and factors, got NULL");
  const auto& passes = kEngines.best();
  const int64_t bytes = size_of(p.dtype);
  const int64_t grain = std::max<int64_t>(1, (32 << 10) / p.cols);
  cpu::parallel_for(p.heads * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float factor = p.factors[i / rows];
      const int64_t row = i / rows * p.rows_of_head + p.first + i % rows;
      if (factor != 1.0f)
        passes.scale(static_cast<char*>(p.weight) + row * p.row_stride * bytes, p.dtype, p.cols,
                     factor);
    }
  });
  return Status::ok();
}

}  // namespace kimi
