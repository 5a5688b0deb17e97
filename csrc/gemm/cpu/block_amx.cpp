// SPDX-License-Identifier: MIT
// Block products on AMX. The strip is the A operand: its rows are rows of tiles, plain copies of
// memory; the panel is the B operand in pairs of depths, what avx512_bf16 packs too. A tile of sums
// is then 16 strip rows x 16 panel rows, the transpose of C's; `finish` turns the blocks over.
//
//                       panel groups of 16 rows    B6 [16 pairs][16]   B7
//   strip  32 rows      A4 [16 rows][32 depths]    C0                  C1      4 products of 16
//                       A5                         C2                  C3      clocks for 4 loads
//
// A depth block of 512: the strip is 32 KiB of the 48 KiB L1 and is loaded from there for each pair
// of groups; a pair of groups is 32 KiB too and comes from the 2 MiB L2, where 96 rows of depth
// 7168 or 384 of 2048 leave room for C. A step of 32 depths is 64 clocks of products against 2
// loads from L1 and 2 from L2, of 8 and 21 clocks (2.33 TFLOP/s was measured with all four from
// L2): 58. C passes through the registers once a block: 4 loads and 4 stores, about 150 clocks to
// 1024. A last single group takes 3 loads and 2 products a step, and waits for its two chains of
// sums (52 clocks a product): 830 clocks where a pair takes 1024.
//
// Predicted, not measured: for a core of 3.0 GHz, a block of 32 x 512 weights (32 KiB), packed from
// L2 in about 1200 clocks (loads of 21 clocks a KiB, then a store a clock), while the next one
// comes from memory at 30 GB/s (3280 clocks):
//
//   rows   multiply   pack    memory    time            TFLOP/s a core
//     21       1170   1200      3280    3280            0.63, bound by memory
//     64       2350   1200      3280    3550            1.8, bound by both
//    256       9390   1200      3280   10590            2.4
#include "gemm/cpu/block_dot_avx512.h"
#include "gemm/cpu/block_pack_avx512.h"
#include "gemm/cpu/block_pairs_avx512_bf16.h"
#include "gemm/cpu/tiles_amx.h"

namespace kimi::cpu {
namespace {

constexpr int64_t kGroup = tile::kRows;  // rows of a packed panel group
constexpr int64_t kDepthBlock = 512;
constexpr int64_t kTileWords = tile::kBytes / 4;

// Rows of a strip as whole tiles [16 rows][32 depths], upper and lower 16 rows alternating: the
// order in which they are loaded. Four rows are read side by side to their ends: short pieces of
// all rows would miss the TLB at each, tiles loaded from rows 14 336 bytes apart (depth 7168) would
// share 2 of the 64 sets of L1, and a single row's copies, 2 KiB apart, do so too.
template <Storage S>
void pack_tiles(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t count,
                uint32_t* to) {
  constexpr int64_t kTogether = 4;
  const auto words_of = [&](int64_t d, int64_t r) {  // the 16 words of 32 depths of a row
    return to + (d / tile::kDepths * 2 + r / tile::kRows) * kTileWords + r % tile::kRows * 16;
  };
  if (along_rows(x)) {
    for (int64_t first = 0; first < kStripRows; first += kTogether) {
      int64_t source[kTogether];
      for (int64_t i = 0; i < kTogether; ++i)
        source[i] = first + i < rows ? gathered(x.row_index, x.index_divisor, row + first + i) : -1;
      const auto copy = [&](int64_t d, int64_t n) {
#pragma GCC unroll 4
        for (int64_t i = 0; i < kTogether; ++i)
          _mm512_storeu_si512(
              words_of(d, first + i),
              source[i] < 0 ? _mm512_setzero_si512() : Pairs::row<S>(x, source[i], depth + d, n));
      };
      int64_t d = 0;
      for (; d + tile::kDepths <= count; d += tile::kDepths) copy(d, tile::kDepths);
      if (d < count) copy(d, count - d);
    }
    return;
  }
  alignas(64) uint32_t pairs[16][kStripRows];  // of 32 depths, then turned over
  for (int64_t d = 0; d < count; d += tile::kDepths) {
    const bool packed = Pairs::pack_columns<S, kStripRows>(x, row, rows, depth + d, count - d,
                                                           tile::kDepths, pairs[0]);
    for (int64_t part = 0; part < kStripRows; part += tile::kRows) {
      const int64_t left = rows - part, live = left < 0 ? 0 : left < 16 ? left : 16;
      if (!packed)
        pack_group<Pairs, S>(x, row + part, live, depth + d, count - d < 32 ? count - d : 32, 32,
                             pairs[0] + part, kStripRows, tile::kRows);
      const char* from[16];
      for (int p = 0; p < 16; ++p) from[p] = reinterpret_cast<const char*>(pairs[p] + part);
      store_transposed(from, 16, words_of(d, part), 16, 0xffff);
    }
  }
}

void pack_strip(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t count,
                void* strip) {
  dispatch_storage(x.storage, [&]<Storage S>() {
    pack_tiles<S>(x, row, rows, depth, count, static_cast<uint32_t*>(strip));
  });
}

// The lines of the next strip, two at a time, spread evenly over the steps of all products of this.
class Fetch {
 public:
  Fetch(const Upcoming& next, int64_t steps)
      : next_(next), left_(next.data ? kPairs : 0), each_((kPairs + steps - 1) / steps) {}
  void step() {
    for (int64_t i = 0; i < each_ && left_ > 0; ++i, --left_) {
      _mm_prefetch(next_.data, _MM_HINT_T1);
      _mm_prefetch(next_.data + next_.second, _MM_HINT_T1);
      next_.data += next_.advance;
      if (++done_ != next_.period) continue;
      done_ = 0;
      next_.data += next_.jump;
    }
  }

 private:
  static constexpr int64_t kPairs = kStripRows * kDepthBlock * 2 / 128;  // of lines in a strip
  Upcoming next_;
  int64_t left_, each_;
  int done_ = 0;
};

// One or two panel groups, `group_bytes` apart, by the strip; tile (t, n) of C at c[t][n].
template <bool kTwo>
void tiles(const char* panel, int64_t group_bytes, const char* strip, Fetch& next, float* c,
           int64_t stride, bool accumulate) {
  const int64_t row_bytes = stride * 4;
  float* right = c + tile::kRows * stride;
  if (accumulate) {
    tile::load<0>(c, row_bytes);
    tile::load<2>(c + tile::kRows, row_bytes);
    if constexpr (kTwo) tile::load<1>(right, row_bytes);
    if constexpr (kTwo) tile::load<3>(right + tile::kRows, row_bytes);
  } else {
    tile::zero<0>();
    tile::zero<2>();
    if constexpr (kTwo) tile::zero<1>();
    if constexpr (kTwo) tile::zero<3>();
  }
  for (int64_t at = 0; at < group_bytes; at += tile::kBytes) {
    tile::load<4>(strip + 2 * at, tile::kRowBytes);
    tile::load<6>(panel + at, tile::kRowBytes);
    tile::dot<0, 4, 6>();
    if constexpr (kTwo) tile::load<7>(panel + group_bytes + at, tile::kRowBytes);
    if constexpr (kTwo) tile::dot<1, 4, 7>();
    tile::load<5>(strip + 2 * at + tile::kBytes, tile::kRowBytes);
    tile::dot<2, 5, 6>();
    if constexpr (kTwo) tile::dot<3, 5, 7>();
    next.step();
  }
  tile::store<0>(c, row_bytes);
  tile::store<2>(c + tile::kRows, row_bytes);
  if constexpr (kTwo) tile::store<1>(right, row_bytes);
  if constexpr (kTwo) tile::store<3>(right + tile::kRows, row_bytes);
}

void multiply(const void* panel, int64_t rows, const void* strip, int64_t count,
              const Upcoming& upcoming, float* c, int64_t stride, bool accumulate) {
  const int64_t steps = (count + tile::kDepths - 1) / tile::kDepths;
  const int64_t group_bytes = steps * tile::kBytes;
  const char* p = static_cast<const char*>(panel);
  const char* s = static_cast<const char*>(strip);
  Fetch next(upcoming, steps * ((rows + 2 * kGroup - 1) / (2 * kGroup)));
  tile::configure();
  int64_t i = 0;
  for (; rows - i > kGroup; i += 2 * kGroup, p += 2 * group_bytes)
    tiles<true>(p, group_bytes, s, next, c + i * stride, stride, accumulate);
  if (i < rows) tiles<false>(p, group_bytes, s, next, c + i * stride, stride, accumulate);
}

// Turns over the 16 x 16 blocks, and gives the tiles up: the kernel saves and restores 8 KiB at
// every switch to another thread while they are in use, and a thread that waits should not hold
// them. Once for each C, since the next `multiply` would pay for another ldtilecfg.
void finish(float* c, int64_t rows, int64_t cols, int64_t stride) {
  for (int64_t i = 0; i < rows; i += tile::kRows)
    for (int64_t j = 0; j < cols; j += tile::kRows) {
      float* block = c + i * stride + j;
      alignas(64) uint32_t copy[16][16];
      const char* from[16];
      for (int r = 0; r < 16; ++r) {
        _mm512_store_ps(copy[r], _mm512_loadu_ps(block + r * stride));
        from[r] = reinterpret_cast<const char*>(copy[r]);
      }
      store_transposed(from, 16, reinterpret_cast<uint32_t*>(block), stride, 0xffff);
    }
  tile::release();
}

}  // namespace

extern const BlockEngine kAmxBlocks = {kGroup,
                                       kDepthBlock,
                                       tile::kDepths,
                                       2,
                                       pack<Pairs, kGroup, kDepthBlock, tile::kDepths>,
                                       pack_strip,
                                       multiply,
                                       finish,
                                       DotSums::kPassTokens,
                                       DotSums::kPassTokens,
                                       DotSums::kPassTokens,
                                       pack_dot<DotPairs>,
                                       dot<DotPairs>,
                                       spread<Avx512, bf16, 8>};

}  // namespace kimi::cpu
