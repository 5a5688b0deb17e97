// SPDX-License-Identifier: MIT
//
// The order of tiles of a grouped product against a list made by plain loops: every tile once, in
// the very order, whatever the number of blocks that share them.
#include <algorithm>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "device/launch.cuh"
#include "gemm/schedule.cuh"

namespace {

using namespace kimi;
using namespace kimi::gemm;

constexpr Order kOrder{4, true};
constexpr int64_t kTileCols = 8;

struct Found {
  Tile tile;
  int32_t times;
};

bool same(const Tile& a, const Tile& b) {
  return a.group == b.group && a.row_tile == b.row_tile && a.col_tile == b.col_tile &&
         a.begin == b.begin && a.end == b.end;
}

// A warp a block; `resumes`: only the place is kept from one tile to the next.
template <int kTileRows>
__global__ void row_kernel(Product p, bool zero_rows, bool resumes, Found* found, int64_t room) {
  using Schedule = RowSchedule<kTileRows>;
  const uint32_t col_tiles = static_cast<uint32_t>(ceil_div(p.cols, kTileCols));
  Schedule whole(p.groups, col_tiles, zero_rows, {}, kOrder);
  typename Schedule::Place place;
  Tile tile;
  for (uint32_t i = blockIdx.x;; i += gridDim.x) {
    Schedule resumed(p.groups, col_tiles, zero_rows, place, kOrder);
    if (!(resumes ? resumed : whole).find(i, tile)) return;
    place = resumed.place();
    if (lane_id() == 7 && i < room) found[i] = {tile, found[i].times + 1};
  }
}

__global__ void matrix_kernel(Product p, uint32_t row_tiles, uint32_t col_tiles, uint32_t ratio,
                              Found* found, int64_t room) {
  const MatrixSchedule schedule(p, row_tiles, col_tiles, ratio, kOrder);
  Tile tile;
  for (uint32_t i = blockIdx.x; schedule.find(i, tile); i += gridDim.x)
    if (lane_id() == 7 && i < room) found[i] = {tile, found[i].times + 1};
}

// Within a group `swizzle` row tiles share a column tile before the next one comes; each group
// begins one row tile and one column tile later, each column one row tile.
void add_group(std::vector<Tile>& want, int32_t group, int64_t row_tiles, int64_t col_tiles,
               int64_t begin, int64_t end, int64_t row_step) {
  for (int64_t first = 0; first < row_tiles; first += kOrder.swizzle)
    for (int64_t c = 0; c < col_tiles; ++c) {
      const int64_t rows = std::min<int64_t>(kOrder.swizzle, row_tiles - first);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t r = first + (i + c + group) % rows;
        want.push_back({group, static_cast<int32_t>(r),
                        static_cast<int32_t>((c + group) % col_tiles), begin + r * row_step, end});
      }
    }
}

void compare(const std::vector<Tile>& want, const std::vector<Found>& found) {
  for (size_t i = 0; i < found.size(); ++i)
    CHECK(i < want.size() ? found[i].times == 1 && same(found[i].tile, want[i])
                          : found[i].times == 0);
}

template <int kTileRows>
void compare_rows(uint64_t seed) {
  simt::settings().seed = seed;
  std::mt19937 random(static_cast<unsigned>(seed));
  const int groups = seed % 5 == 0 ? 0 : static_cast<int>(random() % (seed % 3 == 0 ? 140 : 34));
  std::vector<int32_t> offsets, starts;
  const bool gaps = seed % 2 != 0;
  int32_t end = 0;
  for (int e = 0; e < groups; ++e) {
    if (gaps && random() % 2 != 0) end += static_cast<int32_t>(random() % 200);
    starts.push_back(end);
    if (random() % 3 != 0) end += static_cast<int32_t>(random() % (random() % 8 == 0 ? 1500 : 40));
    offsets.push_back(end);
  }
  Product p{};
  p.groups = {offsets.data(), end + static_cast<int64_t>(random() % 3 * 70), groups};
  if (gaps) p.groups.starts = starts.data();
  p.cols = 1 + static_cast<int64_t>(random() % 30);
  const int64_t col_tiles = (p.cols + kTileCols - 1) / kTileCols;
  for (bool zero_rows : {false, true}) {
    if (gaps && !zero_rows) continue;
    std::vector<Tile> want;
    const auto add = [&](int32_t e, int64_t begin, int64_t last) {
      add_group(want, e, (last - begin + kTileRows - 1) / kTileRows, col_tiles, begin, last,
                kTileRows);
    };
    for (int32_t e = 0; e < groups + (zero_rows ? 1 : 0); ++e) {
      const int64_t before = e == 0 ? 0 : offsets[e - 1],
                    last = e < groups ? offsets[e] : p.groups.num_rows;
      const bool of_group = gaps && e < groups;
      if (of_group) add(groups, before, starts[e]);  // zero rows, as those after the last group
      add(e, of_group ? starts[e] : before, last);
    }
    CHECK(static_cast<int64_t>(want.size()) <= most_tiles(p, kTileRows, kTileCols));
    for (bool resumes : {false, true}) {
      std::vector<Found> found(want.size() + 3);
      const unsigned blocks = 1 + static_cast<unsigned>(random() % 40);
      CHECK(launch(row_kernel<kTileRows>, LaunchConfig{blocks, 32}, p, zero_rows, resumes,
                   found.data(), static_cast<int64_t>(found.size()))
                .is_ok());
      compare(want, found);
    }
  }
}

TEST(tiles_of_rows) {
  for (uint64_t seed = 0; seed < 24; ++seed) {
    compare_rows<16>(seed);
    compare_rows<128>(seed);
  }
}

// Wrong offsets must not lead out of the rows.
TEST(tiles_of_wrong_offsets) {
  const std::vector<int32_t> offsets{-5, 40, 20, 1000, 30};
  Product p{};
  p.groups = {offsets.data(), 64, static_cast<int32_t>(offsets.size())};
  p.cols = 8;
  std::vector<Found> found(200);
  CHECK(launch(row_kernel<16>, LaunchConfig{3, 32}, p, true, false, found.data(), int64_t{200})
            .is_ok());
  for (const Found& f : found)
    if (f.times > 0) CHECK(f.tile.begin >= 0 && f.tile.begin < f.tile.end && f.tile.end <= 64);
}

TEST(tiles_of_the_depth) {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    simt::settings().seed = seed;
    const std::vector<int32_t> offsets{0, 7, 7, 100, 100};
    const int64_t row_tiles = static_cast<int64_t>(seed),
                  col_tiles = 1 + static_cast<int64_t>(seed) % 4;
    Product p{};
    p.groups = {offsets.data(), 120, static_cast<int32_t>(offsets.size())};
    std::vector<Tile> want;
    for (int32_t e = 0; e < p.groups.count; ++e)
      add_group(want, e, row_tiles, col_tiles, e == 0 ? 0 : offsets[e - 1], offsets[e], 0);
    std::vector<Found> found(want.size() + 3);
    CHECK(launch(matrix_kernel, LaunchConfig{1 + static_cast<unsigned>(seed), 32}, p,
                 static_cast<uint32_t>(row_tiles), static_cast<uint32_t>(col_tiles), 0u,
                 found.data(), static_cast<int64_t>(found.size()))
              .is_ok());
    compare(want, found);
  }
}

// Every tile of a batch once; of the lower triangle those that the diagonal or what lies below it
// touches, row after row, each matrix from another one on.
TEST(tiles_of_a_batch_and_of_its_lower_triangle) {
  for (uint32_t ratio : {0u, 1u, 2u, 3u})
    for (uint32_t row_tiles : {1u, 2u, 3u, 7u, 40u}) {
      simt::settings().seed = row_tiles + ratio;
      Product p{};
      p.grouping = Grouping::kBatch;
      p.groups = {nullptr, 0, 3};
      p.depth = 77;
      const uint32_t col_tiles = ratio > 0 ? (row_tiles + ratio - 1) / ratio : 5;
      std::vector<Tile> want;
      for (int32_t e = 0; e < p.groups.count; ++e) {
        if (ratio == 0) add_group(want, e, row_tiles, col_tiles, 0, p.depth, 0);
        if (ratio == 0) continue;
        const int64_t before = static_cast<int64_t>(want.size());
        for (uint32_t r = 0; r < row_tiles; ++r)
          for (uint32_t c = 0; c * ratio <= r; ++c)
            want.push_back({e, static_cast<int32_t>(r), static_cast<int32_t>(c), 0, p.depth});
        const int64_t tiles = static_cast<int64_t>(want.size()) - before;
        const int64_t turned = int64_t{MatrixSchedule::kTurn} * e % tiles;
        std::rotate(want.begin() + before, want.begin() + before + turned, want.end());
      }
      p.rows = p.cols = 128 * row_tiles;
      p.lower = ratio > 0;
      if (ratio > 0) CHECK(most_tiles(p, 128, 128 * ratio) == static_cast<int64_t>(want.size()));
      std::vector<Found> found(want.size() + 3);
      CHECK(launch(matrix_kernel, LaunchConfig{7, 32}, p, row_tiles, col_tiles, ratio, found.data(),
                   static_cast<int64_t>(found.size()))
                .is_ok());
      compare(want, found);
    }
}

// Blocks take every 132nd tile. Without turns a block has the same of six row tiles in all columns
// and groups, and the last, narrower one of six column tiles in a quarter of 48 tiles a group or
// never.
TEST(no_block_has_the_same_place_always) {
  constexpr uint32_t kBlocks = 132, kGroups = 48;
  const auto most_and_least = [](bool turns, uint32_t rows, uint32_t cols, bool of_row) {
    std::vector<int> last(kBlocks);
    for (uint32_t i = 0; i < kGroups * rows * cols; ++i) {
      Tile tile{};
      tile.group = static_cast<int32_t>(i / (rows * cols));
      place_in_group(Order{16, turns}, i % (rows * cols), rows, cols, tile);
      last[i % kBlocks] += static_cast<uint32_t>(of_row ? tile.row_tile + 1 : tile.col_tile + 1) ==
                           (of_row ? rows : cols);
    }
    const auto [least, most] = std::minmax_element(last.begin(), last.end());
    return std::pair(*most, *least);
  };
  CHECK(most_and_least(false, 6, 28, true) == std::pair(62, 0));  // of 61 or 62 tiles
  const auto [most, least] = most_and_least(true, 6, 28, true);
  CHECK(most <= 16 && least >= 6);                        // 10 are even
  CHECK(most_and_least(false, 8, 6, false).second == 0);  // of 17 or 18 tiles
  const auto [most_cols, least_cols] = most_and_least(true, 8, 6, false);
  CHECK(most_cols <= 5 && least_cols >= 1);  // 3 are even
}

// Triangles larger than any that fits a test's list.
__global__ void corner_kernel(uint32_t row_tiles, uint32_t ratio, int* wrong) {
  const uint32_t count = static_cast<uint32_t>(lower_tiles(row_tiles, ratio));
  for (uint32_t row : {row_tiles - 1, row_tiles / 2}) {
    const uint32_t begin = static_cast<uint32_t>(lower_tiles(row, ratio));
    for (uint32_t col : {0u, row / ratio}) {
      Tile tile{};
      if (begin + col >= count) ++*wrong;
      place_in_triangle(begin + col, ratio, tile);
      if (static_cast<uint32_t>(tile.row_tile) != row ||
          static_cast<uint32_t>(tile.col_tile) != col)
        ++*wrong;
    }
  }
}

TEST(corners_of_large_triangles) {
  int wrong = 0;
  for (uint32_t ratio : {1u, 2u})
    for (uint32_t row_tiles : {1000u, 4097u, 30001u, 60000u})
      CHECK(launch(corner_kernel, LaunchConfig{1, 1}, row_tiles, ratio, &wrong).is_ok());
  CHECK(wrong == 0);
}

}  // namespace

TEST_MAIN()
