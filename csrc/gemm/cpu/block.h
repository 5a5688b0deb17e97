// SPDX-License-Identifier: MIT
// Block products of the CPU engines: C[i, j] (+)= sum_d P[i, d] * S[j, d] in fp32.
//
//   P, the panel: up to a few hundred rows, packed once and kept in the L2 cache
//   S, the strip: at most kStripRows rows, packed just before its use, or straight from memory
//
//        d ->                        j ->  (strip, 32 rows)
//     P  [===========]   x  S^T   =  C     i     each strip is read from memory once for all rows
//        [===========]                     |     of the panel; C stays in the L2 cache until its
//        (panel rows)                      v     sums are complete
//
// Operands lie where they are: any strides, rows or depth gathered through an index, storage of 32,
// 16, 8 or 4 bits. Packing converts to the engine's compute type: fp32, or bf16 where the processor
// multiplies bf16 pairs. Rows and depth beyond the operand are zeros in a packed block; nothing
// outside of the operand is read.
//
// Every C element is the sum over depth blocks of kDepthBlock elements in ascending order, or, on
// the path of few rows, a sum along vectors: either way it depends neither on the values of the
// rows that share its block nor on the number of threads.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/integer.h"
#include "common/status.h"
#include "common/storage.h"
#include "common/volume.h"

namespace kimi::cpu {

// The first three are kimi_dtype.
enum class Storage : int32_t {
  kFloat32 = KIMI_FLOAT32,
  kBfloat16 = KIMI_BFLOAT16,
  kFloat16 = KIMI_FLOAT16,
  kFp8Block,   // e4m3, times the fp32 scale of its 128 x 128 block
  kInt4Group,  // nibble - 8, lower nibble first, times the bf16 scale of its 32 depths
};

// A matrix of `rows` x `depth` (sizes are arguments of what reads it). Element (r, d) lies at
// data + row(r) * row_stride + depth(d) * depth_stride, in elements.
struct Operand {
  const void* data = nullptr;
  int64_t row_stride = 0, depth_stride = 1;
  Storage storage = Storage::kFloat32;
  // Gather: row(r) = row_index[r] / index_divisor, zeros where negative; likewise depth. At most
  // one of both. None for quantised storage.
  const int32_t* row_index = nullptr;
  const int32_t* depth_index = nullptr;
  int32_t index_divisor = 1;
  // Quantised storage (depth_stride 1): fp8 [ceil(rows / 128), ceil(depth / 128)] fp32, int4
  // [rows, ceil(depth / 32)] bf16.
  const void* scale = nullptr;
  int64_t scale_stride = 0;
};

// One element as fp32: the definition of every storage.
float element(const Operand& x, int64_t row, int64_t depth);

constexpr int64_t kStripRows = 32;

// The strip that is packed next, for engines that fetch it ahead while they multiply: two cache lines
// a step, at data and data + second; then data += advance, and data += jump too after every `period`
// steps. Only a hint: nothing is read. data may be nullptr.
//
// Or for engines that pack it meanwhile (packs_beside), where `strip` is none: kStripRows rows of bf16,
// `row_bytes` apart, of `count` depths, which 32 divides; `after` bytes further the strip begins that
// is fetched.
struct Upcoming {
  const char* data = nullptr;
  int64_t second = 0, advance = 0, jump = 0;
  int period = 0;
  void* strip = nullptr;
  int64_t row_bytes = 0, count = 0, after = 0;
};

struct BlockEngine {
  int64_t panel_rows;      // panels are packed in groups of so many rows
  int64_t depth_block;     // depth of one strip; panels may hold several blocks
  int64_t depth_multiple;  // packed depth is rounded up to it; divides depth_block
  int64_t element_bytes;   // of a packed element

  // Packs rows [row, row + rows) x depths [depth, depth + count): all groups of panel_rows rows, in
  // depth blocks: block b of group g begins at element
  //   (b * depth_block * groups + g * depth(b)) * panel_rows, depth(b) <= depth_block rounded up.
  void (*pack_panel)(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t count,
                     void* panel);
  // Packs at most kStripRows rows and depth_block depths.
  void (*pack_strip)(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t count,
                     void* strip);
  // c[i * stride + j] (+)= panel block * strip for i < rows (whole groups if there is `finish`), j <
  // kStripRows; `panel` is one depth block of all groups, `count` its depth before rounding.
  void (*multiply)(const void* panel, int64_t rows, const void* strip, int64_t count,
                   const Upcoming& next, float* c, int64_t stride, bool accumulate);
  // Called once all blocks of depth are in c [rows rounded up, cols rounded up to kStripRows]:
  // engines that keep C in another order of elements meanwhile put it right. May be nullptr.
  void (*finish)(float* c, int64_t rows, int64_t cols, int64_t stride);

  // Few rows: c[t * stride + j] = sum_d x[t, d] * s[j, d] for t < tokens, j < rows, S read straight
  // from memory, not gathered. x: packed by pack_dot, a token after the other. The sums have an
  // order of their own. `dot`: depth_stride 1, tokens <= dot_tokens, or dot_quantised where every pass
  // over S converts it again. `spread`: row_stride 1, the storage of the tokens, tokens <=
  // spread_tokens.
  int64_t dot_tokens, dot_quantised, spread_tokens;
  void (*pack_dot)(const Operand& x, int64_t row, int64_t rows, int64_t count, void* tokens);
  void (*dot)(const void* tokens, int64_t num_tokens, const Operand& s, int64_t row, int64_t rows,
              int64_t count, float* c, int64_t stride);
  void (*spread)(const void* tokens, int64_t num_tokens, const Operand& s, int64_t row,
                 int64_t rows, int64_t count, float* c, int64_t stride);
  // Whether multiply packs the next strip, as pack_strip would.
  bool packs_beside = false;

  int64_t dot_stride(int64_t count) const { return round_up(count, 64); }  // elements of a token

  int64_t packed_depth(int64_t count) const { return round_up(count, depth_multiple); }
  int64_t panel_bytes(int64_t rows, int64_t count) const {
    return volume(round_up(rows, panel_rows), packed_depth(count), element_bytes);
  }
  int64_t strip_bytes() const { return kStripRows * depth_block * element_bytes; }
};

// The engine of the current instruction set that multiplies operands of this dtype.
const BlockEngine& block_engine(kimi_dtype dtype);
kimi_isa block_engine_isa();

// block_<isa>.cpp; `Bf16`: products of bf16 pairs, for bf16 operands only.
extern const BlockEngine kPortableBlocks, kAvx2Blocks, kAvx512Blocks, kAvx512Bf16Blocks, kAmxBlocks;

}  // namespace kimi::cpu
