// SPDX-License-Identifier: MIT
// attention_max_logits: argument checks, choice of the engine, threads over blocks of queries.
#include "qk_clip/qk_clip.h"

#include <algorithm>
#include <limits>

#include "common/dtype.h"
#include "common/engine.h"
#include "common/strides.h"
#include "common/workspace.h"
#include "cpu/parallel.h"
#include "gemm/cpu/block.h"

namespace kimi {
namespace {

using cpu::BlockEngine;
using cpu::kStripRows;

// Queries of a block: a strip of keys is packed for each, and the block of 512 x 192 bf16 keeps to
// a fifth of an L2 cache of 1 MiB.
constexpr int64_t kBlockQueries = 512;

// How heads are cut.
struct Cut {
  const BlockEngine& engine;
  int64_t block_rows, blocks_of_head, tasks;

  explicit Cut(const AttentionMaxLogitsParams& p) : engine(cpu::block_engine(p.dtype)) {
    const int64_t group = engine.panel_rows;
    block_rows = std::max<int64_t>(1, kBlockQueries / group) * group;
    blocks_of_head = ceil_div(p.queries, block_rows);
    tasks = volume(p.batch, p.heads, blocks_of_head);
  }
};

struct Scratch {  // of a thread
  char *panel, *strip;
  float* sums;
  int64_t bytes;

  Scratch(const Cut& cut, int64_t dim, void* memory) {
    Pieces pieces(memory);
    panel = pieces.take(cut.engine.panel_bytes(cut.block_rows, dim));
    strip = pieces.take(cut.engine.strip_bytes());
    sums = pieces.take<float>(cut.block_rows, kStripRows);
    bytes = pieces.bytes();
  }
};

struct Memory {   // of the workspace
  float* maxima;  // [heads, batch, blocks]
  char* scratch;  // of all threads
  int64_t scratch_bytes, bytes;

  Memory(const Cut& cut, int64_t dim, void* workspace) {
    Pieces pieces(workspace);
    maxima = pieces.take<float>(cut.tasks);
    scratch_bytes = Scratch(cut, dim, nullptr).bytes;
    scratch = pieces.take(cpu::num_threads(), scratch_bytes);
    bytes = pieces.bytes();
  }
};

Status check(const AttentionMaxLogitsParams& p, kimi_device device) {
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
  if (p.heads > 0 && (!p.max_logits || (device == KIMI_DEVICE_CPU && !p.workspace)))
    return invalid(op, ": expected pointers for max_logits and workspace, got NULL");
  if (volume(p.batch, p.heads, p.queries, p.keys, p.dim) > 0 && (!p.q || !p.k))
    return invalid(op, ": expected pointers for q and k, got NULL");
  KIMI_RETURN_IF_ERROR(check_strides(op,
                                     "q_batch_stride, q_head_stride, q_row_stride, q_col_stride",
                                     {{p.batch, p.q_batch_stride},
                                      {p.heads, p.q_head_stride},
                                      {p.queries, p.q_row_stride},
                                      {p.dim, p.q_col_stride}}));
  return check_strides(op, "k_batch_stride, k_head_stride, k_row_stride, k_col_stride",
                       {{p.batch, p.k_batch_stride},
                        {p.kv_heads, p.k_head_stride},
                        {p.keys, p.k_row_stride},
                        {p.dim, p.k_col_stride}});
}

// The largest sum of block `block` of head `head` in batch `batch`, before the scale.
float largest_of_block(const AttentionMaxLogitsParams& p, const Cut& cut, int64_t batch,
                       int64_t head, int64_t block, const Scratch& scratch) {
  const BlockEngine& engine = cut.engine;
  const qk_clip_cpu::CpuEngine& passes = qk_clip_cpu::kEngines.best();
  const int64_t bytes = size_of(p.dtype), kv_head = head / (p.heads / p.kv_heads);
  const cpu::Operand q = {
      static_cast<const char*>(p.q) + (batch * p.q_batch_stride + head * p.q_head_stride) * bytes,
      p.q_row_stride, p.q_col_stride, cpu::Storage(p.dtype)};
  const cpu::Operand k = {static_cast<const char*>(p.k) +
                              (batch * p.k_batch_stride + kv_head * p.k_head_stride) * bytes,
                          p.k_row_stride, p.k_col_stride, cpu::Storage(p.dtype)};
  const auto& [panel, strip, sums, _] = scratch;

  const int64_t first = block * cut.block_rows;
  const int64_t rows = std::min(cut.block_rows, p.queries - first);
  const int64_t padded = round_up(rows, engine.panel_rows);
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

size_t attention_max_logits_workspace_bytes(const AttentionMaxLogitsParams& p, kimi_device device) {
  if (p.batch < 0 || p.heads < 0 || p.queries < 0 || p.dim < 0 || !is_dtype(p.dtype)) return 0;
  if (device == KIMI_DEVICE_CUDA) return 64;  // it needs none
  return std::max<size_t>(64, size_t(Memory(Cut(p), p.dim, nullptr).bytes));
}

Status attention_max_logits(const AttentionMaxLogitsParams& p, kimi_device device,
                            [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p, device));
  if (device == KIMI_DEVICE_CUDA)
    return KIMI_CUDA("attention_max_logits", attention_max_logits_cuda(p, stream));
  const float none = -std::numeric_limits<float>::infinity();
  std::fill(p.max_logits, p.max_logits + p.heads, none);
  if (p.batch == 0 || p.heads == 0 || p.queries == 0 || p.keys == 0) return Status::ok();
  if (p.dim == 0) {
    std::fill(p.max_logits, p.max_logits + p.heads, 0.0f);
    return Status::ok();
  }
  const Cut cut(p);
  const Memory memory(cut, p.dim, p.workspace);
  // The last blocks of a causal head are its longest: they go first.
  cpu::parallel_tasks(cut.tasks, [&](int64_t task, int thread) {
    const int64_t pairs = p.batch * p.heads, block = cut.blocks_of_head - 1 - task / pairs;
    const int64_t batch = task % pairs / p.heads, head = task % pairs % p.heads;
    const Scratch scratch(cut, p.dim, memory.scratch + thread * memory.scratch_bytes);
    memory.maxima[(head * p.batch + batch) * cut.blocks_of_head + block] =
        largest_of_block(p, cut, batch, head, block, scratch);
  });
  const float* maxima = memory.maxima;
  const int64_t blocks = p.batch * cut.blocks_of_head;
  for (int64_t h = 0; h < p.heads; ++h) {
    float most = none;
    for (int64_t i = h * blocks; i < (h + 1) * blocks && most == most; ++i)
      most = maxima[i] != maxima[i] ? maxima[i] : std::max(most, maxima[i]);
    p.max_logits[h] = most * p.scale;
  }
  return Status::ok();
}

}  // namespace kimi
