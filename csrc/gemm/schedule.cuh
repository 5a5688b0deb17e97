// SPDX-License-Identifier: MIT
// Which tile of which group comes next, computed by a warp from the offsets on the device: no list
// from the host, no kernel before this one, no limit on the number of groups.
//
//   tile index     0 1 2 3 | 4 5 | 6 7 8 9 10 11 | ...     block b takes b, b + blocks, ...
//   group             e0     e1        e2
//
// M-grouped: a group has ceil(rows / kTileRows) x column tiles, which begin at its own first row;
// the rows after the last group are one more group, of depth 0, where the epilogue zeroes them. So
// are the rows before each group where groups have starts: they lie in the list between the groups.
// Within a group `swizzle` row tiles share a column tile before the next one comes, so that blocks
// that run together read few distinct tiles of A and of B. Each group begins one row tile and one
// column tile later than the one before, and each column tile one row tile: tiles that are not full
// cost less, and a block that takes every 132nd tile must not have the same place always.
// K-grouped, batch: every group has the same number of tiles. Of a lower triangle row after row,
// each matrix from kTurn tiles further on than the one before, for a block must not have the same
// places in all of them, which cost unlike (sm90/kernel.cuh):
//
//   tiles as high as wide   0             half as high   0
//                           1 2                          1
//                           3 4 5                        2 3
//                                                        4 5
//
// A warp looks at 32 groups at a time: lane l holds the tiles up to group window + l.
#pragma once

#include <cstdint>

#include "device/math.cuh"
#include "device/overlap.cuh"
#include "device/warp.cuh"
#include "gemm/product.h"

namespace kimi::gemm {

struct Tile {
  int32_t group;     // num_groups: the zero rows
  int32_t row_tile;  // within the group
  int32_t col_tile;
  int64_t begin;  // M-grouped: the tile's first row; else the first of the depth
  int64_t end;    // M-grouped: one past the group's last row; else one past the last of the depth
};

// In which the tiles of a group come.
struct Order {
  uint32_t swizzle = 8;
  bool turns = true;
};

// Tile `local` of tile.group. 32 bits are enough for numbers of tiles: a C with more fits no memory.
__device__ inline void place_in_group(const Order& order, uint32_t local, uint32_t row_tiles,
                                      uint32_t col_tiles, Tile& tile) {
  const uint32_t width = order.swizzle * col_tiles;
  const uint32_t chunk = local / width, in_chunk = local - chunk * width;
  const uint32_t left = row_tiles - chunk * order.swizzle;
  const uint32_t rows = left < order.swizzle ? left : order.swizzle, col = in_chunk / rows;
  const uint32_t turn = order.turns ? static_cast<uint32_t>(tile.group) : 0,
                 row = in_chunk + turn + (order.turns ? col : 0);
  tile.col_tile = static_cast<int32_t>((col + turn) % col_tiles);
  tile.row_tile = static_cast<int32_t>(chunk * order.swizzle + row % rows);
}

// Tile `local` of a lower triangle: of row tiles k ratio .. k ratio + ratio - 1 each has k + 1.
__device__ inline void place_in_triangle(uint32_t local, uint32_t ratio, Tile& tile) {
  const uint32_t wanted = local / ratio;
  uint32_t k =
      static_cast<uint32_t>((sqrt_rn(8.0f * static_cast<float>(wanted) + 1.0f) - 1.0f) * 0.5f);
  while (k * (k + 1) / 2 > wanted) --k;
  while ((k + 1) * (k + 2) / 2 <= wanted) ++k;
  const uint32_t in_rows = local - ratio * (k * (k + 1) / 2), row = in_rows / (k + 1);
  tile.row_tile = static_cast<int32_t>(k * ratio + row);
  tile.col_tile = static_cast<int32_t>(in_rows - row * (k + 1));
}

template <int kTileRows>
class RowSchedule {
 public:
  // Where to go on: what a kernel may keep between two tiles in place of the whole schedule.
  struct Place {
    int32_t window = 0;
    uint32_t before = 0;  // tiles of the groups before it
  };

  // `zero_rows`: rows after the last group are tiles too.
  __device__ RowSchedule(const Groups& groups, uint32_t col_tiles, bool zero_rows, Place from = {},
                         Order order = {})
      : groups_(groups),
        order_(order),
        col_tiles_(col_tiles),
        windowed_((groups.starts != nullptr ? 2 : 1) * groups.count + (zero_rows ? 1 : 0)) {
    load_window(from.window, from.before);
  }
  __device__ Place place() const {
    return {window_, warp_broadcast(before_ - tiles_ * col_tiles_, 0)};
  }

  // Tile `index`, which must not be below that of an earlier call; false after the last one.
  // All lanes of a warp call it together.
  __device__ bool find(uint32_t index, Tile& tile) {
    uint32_t last = warp_broadcast(before_, kWarpSize - 1);
    while (index >= last) {
      if (window_ + kWarpSize >= windowed_) return false;
      load_window(window_ + kWarpSize, last);
      last = warp_broadcast(before_, kWarpSize - 1);
    }
    const int lane = __ffs(static_cast<int>(warp_ballot(index < before_))) - 1;
    const uint32_t row_tiles = warp_broadcast(tiles_, lane);
    const uint32_t local = index - (warp_broadcast(before_, lane) - row_tiles * col_tiles_);
    tile.group = group(window_ + lane);
    tile.end = warp_broadcast(end_, lane);
    place_in_group(order_, local, row_tiles, col_tiles_, tile);
    tile.begin = int64_t{warp_broadcast(begin_, lane)} + int64_t{tile.row_tile} * kTileRows;
    return true;
  }

 private:
  // Bad offsets lead to wrong rows, never out of memory.
  __device__ int32_t offset(int32_t e) const {
    if (e < 0) return 0;
    const int32_t rows = static_cast<int32_t>(groups_.num_rows);
    if (e >= groups_.count) return rows;
    return inside(groups_.offsets + e, rows);
  }
  __device__ int32_t start(int32_t e) const {
    const int32_t rows = static_cast<int32_t>(groups_.num_rows);
    return e >= groups_.count ? rows : inside(groups_.starts + e, rows);
  }
  __device__ int32_t inside(const int32_t* bound, int32_t rows) const {
    const int32_t row = groups_.older ? load_older(bound) : *bound;
    return row < 0 ? 0 : row > rows ? rows : row;
  }
  // That of an entry of the list: with starts the odd ones are groups, the even ones zero rows.
  __device__ int32_t group(int32_t entry) const {
    if (groups_.starts == nullptr) return entry;
    return entry % 2 != 0 ? entry / 2 : groups_.count;
  }
  __device__ void load_window(int32_t first, uint32_t tiles_before) {
    window_ = first;
    const int32_t e = first + lane_id();
    const bool exists = e < windowed_;
    if (groups_.starts == nullptr) {
      begin_ = exists ? offset(e - 1) : 0;
      end_ = exists ? offset(e) : 0;
    } else {
      const bool of_group = e % 2 != 0;
      begin_ = !exists ? 0 : of_group ? start(e / 2) : offset(e / 2 - 1);
      end_ = !exists ? 0 : of_group ? offset(e / 2) : start(e / 2);
    }
    const uint32_t rows = end_ > begin_ ? static_cast<uint32_t>(end_ - begin_) : 0;
    tiles_ = (rows + kTileRows - 1) / kTileRows;
    before_ = tiles_ * col_tiles_;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const uint32_t below = __shfl_up_sync(kFullWarp, before_, static_cast<unsigned>(distance));
      if (lane_id() >= distance) before_ += below;
    }
    before_ += tiles_before;
  }

  const Groups& groups_;
  const Order order_;
  uint32_t col_tiles_;
  int32_t windowed_, window_ = 0;
  int32_t begin_ = 0, end_ = 0;  // of the lane's group
  uint32_t tiles_ = 0;           // row tiles of the lane's group
  uint32_t before_ = 0;          // tiles up to and with the lane's group
};

// The same where every group has a matrix C of its own, for all of one size. With offsets the depth
// of a group comes from them. `lower_ratio`: how many row tiles are as high as a tile is wide where
// only the lower triangle is wanted, else 0.
class MatrixSchedule {
 public:
  static constexpr uint32_t kTurn = 5;

  __device__ MatrixSchedule(const Product& p, uint32_t row_tiles, uint32_t col_tiles,
                            uint32_t lower_ratio = 0, Order order = {})
      : p_(p),
        order_(order),
        row_tiles_(row_tiles),
        col_tiles_(col_tiles),
        tiles_(lower_ratio > 0 ? static_cast<uint32_t>(lower_tiles(row_tiles, lower_ratio))
                               : row_tiles * col_tiles),
        lower_ratio_(lower_ratio) {}

  __device__ bool find(uint32_t index, Tile& tile) const {
    const Groups& groups = p_.groups;
    if (tiles_ == 0 || index >= tiles_ * static_cast<uint32_t>(groups.count)) return false;
    const uint32_t group = index / tiles_;
    tile.group = static_cast<int32_t>(group);
    const uint32_t local = index - group * tiles_;
    if (lower_ratio_ > 0)
      place_in_triangle((local + group * kTurn) % tiles_, lower_ratio_, tile);
    else
      place_in_group(order_, local, row_tiles_, col_tiles_, tile);
    tile.begin = 0;
    tile.end = p_.depth;
    if (groups.offsets == nullptr) return true;
    const int64_t begin = groups.starts != nullptr ? groups.starts[group]
                          : group > 0              ? groups.offsets[group - 1]
                                                   : 0;
    const int64_t end = groups.offsets[group];
    tile.begin = begin < 0 ? 0 : begin;
    tile.end = end > groups.num_rows ? groups.num_rows : end;
    if (tile.end < tile.begin) tile.end = tile.begin;
    return true;
  }

 private:
  const Product& p_;
  const Order order_;
  uint32_t row_tiles_, col_tiles_, tiles_, lower_ratio_;
};

}  // namespace kimi::gemm
