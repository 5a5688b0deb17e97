// SPDX-License-Identifier: MIT
// Block products of every engine of this machine against sums in double precision over element():
// all storages, strides and gathers of both operands, tails, several depth blocks, in buffers of
// exactly the promised bytes (see Buffer). Built twice: with the engines as they are,
// and with KIMI_HOST_TILES for the AMX engine alone, on the model of the tiles.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/features.h"
#include "gemm/cpu/block.h"
#include "gemm_operands.h"
#if defined(KIMI_HOST_TILES)
#include "tiles.h"
#endif

namespace {

using namespace kimi;
using namespace kimi::cpu;

struct Named {
  const char* name;
  const BlockEngine* engine;
  bool is_bf16() const { return engine->element_bytes == 2; }
};
std::vector<Named> engines() {
  std::vector<Named> all;
#if !defined(KIMI_HOST_TILES)
  all.push_back({"portable", &kPortableBlocks});
#endif
#if defined(KIMI_OPS_X86)
  const kimi_isa best = detected_isa();
#if !defined(KIMI_HOST_TILES)
  if (best >= KIMI_ISA_AVX2) all.push_back({"avx2", &kAvx2Blocks});
  if (best >= KIMI_ISA_AVX512) all.push_back({"avx512", &kAvx512Blocks});
  if (best >= KIMI_ISA_AVX512_BF16) all.push_back({"avx512_bf16", &kAvx512Bf16Blocks});
#endif
  if (best >= KIMI_ISA_AMX) all.push_back({"amx", &kAmxBlocks});
#endif
  return all;
}

// The part of a matrix that a product takes.
struct Part {
  const Operand& x;
  int64_t row, rows;
};

std::vector<double> converted(const Part& m, int64_t depth, int64_t count, bool to_bf16) {
  std::vector<double> all(size_t(m.rows * count));
  for (int64_t r = 0; r < m.rows; ++r)
    for (int64_t d = 0; d < count; ++d) {
      const float value = element(m.x, m.row + r, depth + d);
      all[r * count + d] = to_bf16 ? to_float(from_float<bf16>(value)) : value;
    }
  return all;
}

constexpr uint32_t kUntouched = 0xffffffff;  // of a new Buffer

// What a caller does: the panel once, then strip by strip and block by block. [p.rows][stride]
Buffer<float> product(const BlockEngine& e, const Part& p, const Part& s, int64_t depth,
                      int64_t count, int64_t stride) {
  Bytes panel(e.panel_bytes(p.rows, count)), strip(e.strip_bytes());
  e.pack_panel(p.x, p.row, p.rows, depth, count, panel.data());
  const int64_t padded_rows = round_up(p.rows, e.panel_rows),
                padded_columns = round_up(s.rows, kStripRows);
  Buffer<float> c((padded_rows - 1) * stride + padded_columns);
  for (int64_t j = 0; j < s.rows; j += kStripRows)
    for (int64_t d = 0; d < count; d += e.depth_block) {
      const int64_t block = std::min(e.depth_block, count - d);
      e.pack_strip(s.x, s.row + j, std::min(kStripRows, s.rows - j), depth + d, block,
                   strip.data());
#if defined(KIMI_HOST_TILES)  // as another library on this thread might
      unsigned char other[64] = {1};
      other[16] = 4, other[48] = 1;
      if (d) tiles::load_config(other);
#endif
      Upcoming next;
      if (j + kStripRows < s.rows) next = {static_cast<const char*>(s.x.data), 1024};
      e.multiply(panel.data() + d * padded_rows * e.element_bytes, p.rows, strip.data(), block,
                 next, c.data() + j, stride, d > 0);
    }
  if (e.finish) e.finish(c.data(), p.rows, s.rows, stride);
  // Columns beyond the strips, and rows beyond the product unless `finish` moves whole groups.
  for (int64_t i = 0; i < padded_rows; ++i)
    for (int64_t j = !e.finish && i >= p.rows ? 0 : padded_columns;
         j < (i + 1 < padded_rows ? stride : padded_columns); ++j)
      CHECK(bits_of(c[i * stride + j]) == kUntouched);
  return c;
}

// Any order of n fp32 multiply-adds errs by at most n / 2^24 of the sum of magnitudes.
void expect_close(const std::string& what, const std::vector<double>& p, int64_t rows,
                  const std::vector<double>& s, int64_t columns, int64_t count, const float* c,
                  int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0, magnitude = 0;
      for (int64_t d = 0; d < count; ++d) {
        const double term = p[size_t(i * count + d)] * s[size_t(j * count + d)];
        sum += term;
        magnitude += std::fabs(term);
      }
      const float got = c[i * stride + j];
      if (!(std::fabs(got - sum) <= double(count + 2) * 0x1p-24 * magnitude))
        check::fail(__FILE__, __LINE__,
                    what + ": c[" + std::to_string(i) + ", " + std::to_string(j) + "] expected " +
                        std::to_string(sum) + ", got " + std::to_string(got));
    }
}

void expect_product(const Named& e, const std::string& what, const Part& p, const Part& s,
                    int64_t depth, int64_t count, int64_t gap) {
  const int64_t stride = round_up(s.rows, kStripRows) + gap;
  const std::string text = std::string(e.name) + ": " + what + ", " + std::to_string(p.rows) +
                           " x " + std::to_string(s.rows) + " x " + std::to_string(count);
  Buffer<float> c = product(*e.engine, p, s, depth, count, stride);
  expect_close(text, converted(p, depth, count, e.is_bf16()), p.rows,
               converted(s, depth, count, e.is_bf16()), s.rows, count, c.data(), stride);
}

// As pack_strip packs it, and the product is the same.
TEST(the_next_strip_is_packed_beside_a_product) {
  for (const Named& e : engines()) {
    const BlockEngine& engine = *e.engine;
    if (!engine.packs_beside) continue;
    for (int64_t rows : {1, 14, 27, 28, 70})
      for (int64_t count : {32, 288, 512})
        for (int64_t now : {1, 96, 512}) {
          const Matrix p({Storage::kBfloat16}, rows, now, 5),
              s({Storage::kBfloat16}, 2 * kStripRows, 512, 6);
          Bytes panel(engine.panel_bytes(rows, now)), strip(engine.strip_bytes());
          engine.pack_panel(p.x, 0, rows, 0, now, panel.data());
          engine.pack_strip(s.x, 0, kStripRows, 0, now, strip.data());
          Bytes want(kStripRows * count * 2), got(kStripRows * count * 2);
          engine.pack_strip(s.x, kStripRows, kStripRows, 0, count, want.data());
          const int64_t sums = round_up(rows, engine.panel_rows) * kStripRows;
          Buffer<float> c(sums), alone(sums);
          Upcoming next;
          next.row_bytes = s.x.row_stride * 2;
          next.data = static_cast<const char*>(s.x.data) + kStripRows * next.row_bytes;
          next.strip = got.data();
          next.count = count;
          engine.multiply(panel.data(), rows, strip.data(), now, next, c.data(), kStripRows, false);
          engine.multiply(panel.data(), rows, strip.data(), now, {}, alone.data(), kStripRows,
                          false);
          CHECK(std::memcmp(got.data(), want.data(), size_t(kStripRows * count * 2)) == 0);
          CHECK(std::memcmp(c.data(), alone.data(), size_t(sums * 4)) == 0);
        }
  }
}

// Every kind of operand on either side; rows 1..70 and depths 1..600 in turn, often at the edges.
TEST(products) {
  for (const Named& e : engines()) {
    uint32_t i = 0;
    for (const Kind& panel : kinds(false))
      for (const Kind& strip : kinds(true)) {
        constexpr int64_t kEdges[] = {31, 32, 33, 64, 255, 256, 257, 511, 512, 513, 544, 600};
        const int64_t rows = 1 + i % 70, columns = 1 + i * 31 % 70;
        const int64_t count = i % 3 ? 1 + i * 7919 % 600 : kEdges[i / 3 % std::size(kEdges)];
        const Matrix p(panel, rows, count, i), s(strip, columns, count, ~i);
        expect_product(e, panel.text() + " x " + strip.text(), {p.x, 0, rows}, {s.x, 0, columns}, 0,
                       count, i % 5);
        ++i;
      }
    for (int64_t rows = 1; rows <= 70; ++rows) {  // each by depths that the loop above may miss
      const int64_t count = rows * 9 % 601 + 1;
      const Matrix p({Storage::kBfloat16}, rows, count, 5), s({Storage::kBfloat16}, 40, count, 6);
      expect_product(e, "rows", {p.x, 0, rows}, {s.x, 0, 40}, 0, count, 0);
    }
    for (int64_t count = 1; count <= 600; ++count) {
      const Matrix p({Storage::kFloat32}, 3, count, 5), s({Storage::kBfloat16}, 5, count, 6);
      expect_product(e, "depths", {p.x, 0, 3}, {s.x, 0, 5}, 0, count, 0);
    }
  }
}

TEST(parts_of_a_matrix) {
  for (const Named& e : engines())
    for (const Kind& kind : kinds(true))
      for (int64_t depth : {int64_t{32}, e.engine->depth_block}) {
        const int64_t count = 70;
        const Kind panel = is_quantised(kind.storage) ? Kind{Storage::kBfloat16} : kind;
        const Matrix p(panel, 60, depth + count, 1), s(kind, 75, depth + count, 2);
        expect_product(e, "part of " + kind.text(), {p.x, 23, 30}, {s.x, 32, 43}, depth, count, 0);
      }
}

TEST(rows_do_not_depend_on_their_neighbours) {
  for (const Named& e : engines())
    for (int64_t count : {5, 300, 600}) {
      constexpr int64_t kCount = 70, kColumns = 40, kStride = 64;
      const Matrix p({Storage::kFloat32}, kCount, count, 3), s({Storage::kBfloat16}, 40, count, 4);
      Buffer<float> all =
          product(*e.engine, {p.x, 0, kCount}, {s.x, 0, kColumns}, 0, count, kStride);
      for (int64_t size : {1, 2, 15, 17, 33})
        for (int64_t row = 0; row + size <= kCount; row += size) {
          Buffer<float> some =
              product(*e.engine, {p.x, row, size}, {s.x, 0, kColumns}, 0, count, kStride);
          for (int64_t i = 0; i < size; ++i)
            CHECK(std::memcmp(&all[(row + i) * kStride], &some[i * kStride], kColumns * 4) == 0);
        }
    }
}

TEST(nan_stays_in_its_row) {
  for (const Named& e : engines())
    for (int64_t bad : {0, 16, 38}) {
      Matrix p({Storage::kBfloat16}, 39, 65, 1), s({Storage::kBfloat16}, 39, 65, 2);
      const uint16_t nan = 0x7fc0;
      std::memcpy(&p.data[(p.x.row_stride < 0 ? (bad - 38) : bad) * p.x.row_stride * 2 + 128], &nan,
                  2);
      Buffer<float> rows = product(*e.engine, {p.x, 0, 39}, {s.x, 0, 39}, 0, 65, 64);
      Buffer<float> columns = product(*e.engine, {s.x, 0, 39}, {p.x, 0, 39}, 0, 65, 64);
      for (int64_t i = 0; i < 39; ++i)
        for (int64_t j = 0; j < 39; ++j) {
          CHECK(std::isnan(rows[i * 64 + j]) == (i == bad));
          CHECK(std::isnan(columns[i * 64 + j]) == (j == bad));
        }
    }
}

// What products of few rows read straight from memory.
std::vector<Kind> few_kinds() {
  std::vector<Kind> all;
  for (Storage storage : kStorages) {
    all.push_back({storage});
    if (!is_quantised(storage)) all.push_back({storage, kAlongRows});
  }
  return all;
}

TEST(few_rows) {
  for (const Named& named : engines()) {
    const BlockEngine& e = *named.engine;
    uint32_t i = 0;
    for (int64_t tokens = 1; tokens <= std::max(e.dot_tokens, e.spread_tokens); ++tokens)
      for (const Kind& kind : kinds(false))
        for (const Kind& strip : few_kinds()) {
          const bool along_rows = strip.order == kAlongRows;
          if (tokens > (along_rows ? e.spread_tokens : e.dot_tokens)) continue;
          if (along_rows && named.is_bf16() && strip.storage != Storage::kBfloat16) continue;
          const int64_t rows = 1 + ++i % (along_rows ? 101 : 13), count = 1 + i * 97 % 600;
          const int64_t gap = i % 3, first = i % 4;
          const Matrix x(kind, first + tokens, count, i), s(strip, first + rows, count, ~i);
          Bytes packed(tokens * e.dot_stride(count) * e.element_bytes);
          e.pack_dot(x.x, first, tokens, count, packed.data());
          const int64_t stride = rows + gap;
          Buffer<float> c((tokens - 1) * stride + rows);
          (along_rows ? e.spread : e.dot)(packed.data(), tokens, s.x, first, rows, count, c.data(),
                                          stride);
          // Quantised rows are not rounded: their scales come to the sums.
          const bool bf16 = named.is_bf16(), quantised = strip.storage > Storage::kFloat16;
          expect_close(std::string(named.name) + ": few rows of " + kind.text() + " x " +
                           strip.text() + ", depth " + std::to_string(count),
                       converted({x.x, first, tokens}, 0, count, bf16), tokens,
                       converted({s.x, first, rows}, 0, count, bf16 && !quantised), rows, count,
                       c.data(), stride);
          for (int64_t t = 0; t + 1 < tokens; ++t)
            for (int64_t j = rows; j < stride; ++j) CHECK(bits_of(c[t * stride + j]) == kUntouched);
        }
  }
}

TEST(the_instruction_set_chooses_the_engine) {
  const kimi_isa before = current_isa();
  for (const Named& e : engines()) {
    for (int isa = KIMI_ISA_PORTABLE; isa <= detected_isa(); ++isa)
      if (std::string(e.name) == isa_name(kimi_isa(isa))) {
        CHECK(set_isa(kimi_isa(isa)).is_ok());
        CHECK(&block_engine(KIMI_BFLOAT16) == e.engine);
        CHECK(block_engine_isa() == isa);
        CHECK(block_engine(KIMI_FLOAT32).element_bytes == 4);
      }
  }
  CHECK(set_isa(before).is_ok());
}

#if defined(KIMI_HOST_TILES)
TEST(tile_products_are_as_few_as_the_shape_allows) {
  for (int64_t rows = 1; rows <= 70; ++rows) {
    const int64_t count = 1 + rows * 17 % 600, groups = (rows + 15) / 16, steps = (count + 31) / 32;
    const Matrix p({Storage::kBfloat16}, rows, count, 5), s({Storage::kBfloat16}, 32, count, 6);
    const int64_t before = tiles::dots();
    (void)product(kAmxBlocks, {p.x, 0, rows}, {s.x, 0, 32}, 0, count, 32);
    CHECK(tiles::dots() - before == 2 * groups * steps);
    unsigned char config[64];
    tiles::store_config(config);
    for (unsigned char byte : config) CHECK(byte == 0);  // given up by `finish`
  }
}
#endif

}  // namespace

int main(int argc, char** argv) {
  if (engines().empty()) {
    std::puts("skipped: the model of the AMX tiles needs a processor with avx512_bf16");
    return 77;
  }
  return check::run_all(argc, argv);
}
