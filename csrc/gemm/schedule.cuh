// SPDX-License-Identifier: MIT
// Which tile of which group comes next, computed by every warp for itself from the offsets on the
// device: no list from the host, no kernel before this one, no limit on the number of groups.
//
//   tile index     0 1 2 3 | 4 5 | 6 7 8 9 10 11 | ...     block b takes b, b + blocks, ...
//   group             e0     e1        e2
//
// kRows: a group has ceil(rows / kRows) x column tiles; tiles begin at the group's own first row;
// the rows after the last group are one more group, of depth 0, where the epilogue zeroes them.
// Within a group kSwizzle row tiles share a column tile before the next one comes, so that blocks
// that run together read few distinct tiles of P and of Q.
// kDepth: every group has the same number of tiles.
//
// A warp looks at 32 groups at a time: lane l holds the tiles up to group window + l.
#pragma once

#include <cstdint>

#include "device/warp.cuh"
#include "gemm/product.h"

namespace kimi::grouped {

struct Tile {
  int32_t group;     // num_groups: the zero rows
  int32_t row_tile;  // within the group
  int32_t col_tile;
  int64_t begin;  // rows of the group: kRows first row of the tile, kDepth first of the depth
  int64_t end;    // one past the group's last row
};

// Tile `local` of a group. 32 bits are enough for numbers of tiles: a C with more fits no memory;
// and a division of 64 bits is a call, next to which wgmma would not run asynchronously.
template <int kSwizzle>
__device__ inline void place_in_group(int64_t local, int64_t row_tiles, int64_t col_tiles,
                                      Tile& tile) {
  const uint32_t width = static_cast<uint32_t>(kSwizzle * col_tiles);
  const uint32_t chunk = static_cast<uint32_t>(local) / width;
  const uint32_t in_chunk = static_cast<uint32_t>(local) - chunk * width;
  const uint32_t left = static_cast<uint32_t>(row_tiles) - chunk * kSwizzle;
  const uint32_t rows = left < kSwizzle ? left : kSwizzle, col = in_chunk / rows;
  tile.col_tile = static_cast<int32_t>(col);
  tile.row_tile = static_cast<int32_t>(chunk * kSwizzle + in_chunk - col * rows);
}

template <int kTileRows, int kSwizzle = 8>
class RowSchedule {
 public:
  // Where to go on: what a kernel may keep between two tiles in place of the whole schedule.
  struct Place {
    int32_t window = 0;
    int64_t before = 0;  // tiles of the groups before it
  };

  // `zero_rows`: rows after the last group are tiles too. `blocks`: of a cluster, each of which
  // takes kTileRows of a tile.
  __device__ RowSchedule(const Product& p, int64_t col_tiles, bool zero_rows, Place from = {},
                         int blocks = 1)
      : offsets_(p.offsets),
        num_rows_(p.num_rows),
        col_tiles_(col_tiles),
        tile_rows_(static_cast<uint32_t>(kTileRows * blocks)),
        groups_(p.num_groups),
        windowed_(p.num_groups + (zero_rows ? 1 : 0)) {
    load_window(from.window, from.before);
  }
  __device__ Place place() const {
    return {window_, warp_broadcast(before_ - tiles_ * col_tiles_, 0)};
  }

  // Tile `index`, which must not be below that of an earlier call; false after the last one.
  // All lanes of a warp call it together.
  __device__ bool find(int64_t index, Tile& tile) {
    int64_t last = warp_broadcast(before_, kWarpSize - 1);
    while (index >= last) {
      if (window_ + kWarpSize >= windowed_) return false;
      load_window(window_ + kWarpSize, last);
      last = warp_broadcast(before_, kWarpSize - 1);
    }
    const int lane = __ffs(static_cast<int>(warp_ballot(index < before_))) - 1;
    const int64_t row_tiles = warp_broadcast(tiles_, lane);
    const int64_t local = index - (warp_broadcast(before_, lane) - row_tiles * col_tiles_);
    tile.group = window_ + lane;
    tile.end = warp_broadcast(end_, lane);
    place_in_group<kSwizzle>(local, row_tiles, col_tiles_, tile);
    tile.begin = warp_broadcast(begin_, lane) + int64_t{tile.row_tile} * tile_rows_;
    return true;
  }

 private:
  // Bad offsets lead to wrong rows, never out of memory.
  __device__ int64_t offset(int32_t e) const {
    if (e < 0) return 0;
    if (e >= groups_) return num_rows_;
    const int64_t end = offsets_[e];
    return end < 0 ? 0 : end > num_rows_ ? num_rows_ : end;
  }
  __device__ void load_window(int32_t first, int64_t tiles_before) {
    window_ = first;
    const int32_t e = first + lane_id();
    const bool exists = e < windowed_;
    begin_ = exists ? offset(e - 1) : 0;
    end_ = exists ? offset(e) : 0;
    const int64_t rows = end_ > begin_ ? end_ - begin_ : 0;
    tiles_ = (static_cast<uint32_t>(rows) + tile_rows_ - 1) / tile_rows_;
    before_ = tiles_ * col_tiles_;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int64_t below = __shfl_up_sync(kFullWarp, before_, static_cast<unsigned>(distance));
      if (lane_id() >= distance) before_ += below;
    }
    before_ += tiles_before;
  }

  const int32_t* offsets_;
  int64_t num_rows_, col_tiles_;
  uint32_t tile_rows_;
  int32_t groups_, windowed_, window_ = 0;
  int64_t begin_ = 0, end_ = 0, tiles_ = 0;  // of the lane's group
  int64_t before_ = 0;                       // tiles up to and with the lane's group
};

// The same for kDepth, where only the depth of a group comes from the offsets.
template <int kSwizzle = 8>
class DepthSchedule {
 public:
  __device__ DepthSchedule(const Product& p, int64_t row_tiles, int64_t col_tiles)
      : p_(p), row_tiles_(row_tiles), col_tiles_(col_tiles) {}

  __device__ bool find(int64_t index, Tile& tile) const {
    const int64_t tiles = row_tiles_ * col_tiles_;
    if (tiles == 0 || index >= tiles * p_.num_groups) return false;
    const uint32_t group = static_cast<uint32_t>(index) / static_cast<uint32_t>(tiles);
    tile.group = static_cast<int32_t>(group);
    place_in_group<kSwizzle>(index - group * tiles, row_tiles_, col_tiles_, tile);
    const int64_t begin = group > 0 ? p_.offsets[group - 1] : 0, end = p_.offsets[group];
    tile.begin = begin < 0 ? 0 : begin;
    tile.end = end > p_.num_rows ? p_.num_rows : end;
    if (tile.end < tile.begin) tile.end = tile.begin;
    return true;
  }

 private:
  const Product& p_;
  int64_t row_tiles_, col_tiles_;
};

}  // namespace kimi::grouped
