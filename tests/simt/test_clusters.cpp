// SPDX-License-Identifier: MIT
//
// Clusters: multicast, arrivals at other blocks' barriers, the cluster's barrier; and their misuse.
#include <vector>

#include "check.h"
#include "device/cluster.cuh"
#include "device/launch.cuh"
#include "device/tma.cuh"

namespace {

using namespace kimi;

template <class Body>
void for_each_seed(Body body) {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    simt::settings().seed = seed;
    body();
  }
}

// Each block loads its share of a tile into all blocks, `rounds` times through one buffer. Every
// block tells every other that the buffer is empty. out [block][round][threads].
__global__ void multicast_kernel(const __grid_constant__ TensorMap map, int rounds, float* out) {
  constexpr int kRows = 8;  // of a share: 128 bytes each
  KIMI_SHARED(float, tile);
  KIMI_STATIC_SHARED(MBarrier, full, 1);
  KIMI_STATIC_SHARED(MBarrier, empty, 1);
  const int blocks = cluster_blocks(), rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbarrier_init(full[0], 1);
    mbarrier_init(empty[0], static_cast<uint32_t>(blocks));
    mbarrier_fence_init();
  }
  cluster_arrive();
  cluster_wait();
  for (int i = 0; i < rounds; ++i) {
    const uint32_t parity = static_cast<uint32_t>(i & 1);
    if (threadIdx.x == 0) {
      mbarrier_wait(empty[0], parity ^ 1);
      mbarrier_arrive_expect_tx(full[0], static_cast<uint32_t>(blocks) * kRows * 128);
      tma_load_multicast(tile + rank * kRows * 32, map, full[0], 0, (i * blocks + rank) * kRows,
                         static_cast<uint16_t>((1 << blocks) - 1));
    }
    mbarrier_wait(full[0], parity);
    float sum = 0;
    for (int r = 0; r < blocks * kRows; ++r) sum += tile[r * 32 + static_cast<int>(threadIdx.x)];
    out[(static_cast<int>(blockIdx.x) * rounds + i) * 32 + static_cast<int>(threadIdx.x)] = sum;
    __syncwarp();
    if (static_cast<int>(threadIdx.x) < blocks)
      mbarrier_arrive_in(empty[0], static_cast<int>(threadIdx.x));
  }
  cluster_arrive();
  cluster_wait();
}

TEST(multicast_and_arrivals_in_a_cluster) {
  for (unsigned blocks : {1u, 2u, 4u})
    for_each_seed([=] {
      constexpr int kRounds = 5;
      const int rows = static_cast<int>(blocks) * 8;
      std::vector<float4> data(static_cast<size_t>(kRounds * rows) * 8);
      float* const values = reinterpret_cast<float*>(data.data());
      for (int i = 0; i < kRounds * rows * 32; ++i) values[i] = static_cast<float>(i * 7 % 101);
      const int64_t sizes[2] = {32, kRounds * rows}, stride = 128;
      const int32_t box[2] = {32, 8};
      TensorMap map;
      CHECK(encode_tensor_map<float>(&map, values, 2, sizes, &stride, box, Swizzle::kNone).is_ok());
      const unsigned grid = 3 * blocks;
      std::vector<float> out(size_t{grid} * kRounds * 32);
      LaunchConfig config{grid, 32, static_cast<size_t>(rows) * 128};
      config.cluster = blocks;
      CHECK(launch(multicast_kernel, config, map, kRounds, out.data()).is_ok());
      for (unsigned block = 0; block < grid; ++block)
        for (int i = 0; i < kRounds; ++i)
          for (int c = 0; c < 32; ++c) {
            float sum = 0;
            for (int r = 0; r < rows; ++r) sum += values[(i * rows + r) * 32 + c];
            CHECK(out[(block * kRounds + static_cast<size_t>(i)) * 32 + static_cast<size_t>(c)] ==
                  sum);
          }
      config.grid = grid + 1;
      if (blocks > 1)
        EXPECT_ERROR(simt::Error, "that divide the grid's x",
                     (void)launch(multicast_kernel, config, map, kRounds, out.data()));
    });
}

// Every block hands a number to the next one; some threads leave before the second barrier.
__global__ void ring_of_blocks_kernel(int* out) {
  KIMI_STATIC_SHARED(uint4, mailbox, 1);
  const int rank = cluster_rank(), blocks = cluster_blocks();
  if (threadIdx.x == 0) mailbox[0] = {};
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x >= 32) return;
  if (threadIdx.x == 0) store16_in(mailbox, {1, 2, 3, blockIdx.x}, (rank + 1) % blocks);
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 1 && mailbox[0].x + mailbox[0].y + mailbox[0].z == 6)
    out[blockIdx.x] = static_cast<int>(mailbox[0].w);
}

TEST(cluster_barriers_order_blocks_and_do_not_wait_for_exited_threads) {
  for_each_seed([] {
    std::vector<int> out(8);
    simt::launch(ring_of_blocks_kernel, {8, 64, 0, false, 4}, out.data());
    for (int b = 0; b < 8; ++b) CHECK(out[static_cast<size_t>(b)] == b / 4 * 4 + (b + 3) % 4);
  });
}

// ---- misuse -------------------------------------------------------------------------------------

enum Mistake {
  kWaitsAlone,
  kArrivesTwice,
  kNoSuchBlock,
  kPeerEnded,
  kMulticastToNobody,
  kNoArrival,
  kNotMet
};

__global__ void misuse_kernel(const __grid_constant__ TensorMap map, Mistake mistake) {
  KIMI_SHARED(float, tile);
  KIMI_STATIC_SHARED(MBarrier, barrier, 1);
  switch (mistake) {  // of whole warps
    case kWaitsAlone:
      return cluster_wait();
    case kArrivesTwice:
      cluster_arrive();
      return cluster_arrive();
    case kNoArrival:
      if (threadIdx.x >= 32)
        simt::spin_until([] { return false; }, [] { return std::string("a word from nobody"); });
      cluster_arrive();
      return cluster_wait();
    default:
      break;
  }
  if (threadIdx.x != 0) return;
  mbarrier_init(barrier[0], 1);
  mbarrier_fence_init();
  switch (mistake) {
    case kNoSuchBlock:
      mbarrier_arrive_in(barrier[0], 2);
      break;
    case kPeerEnded:  // block 1 has nothing to do
      if (cluster_rank() == 0) {
        int looks = 0;  // until nothing else can run
        simt::spin_until([&] { return ++looks > 8; }, [] { return std::string("the other"); });
        mbarrier_arrive_in(barrier[0], 1);
      }
      break;
    case kNotMet:
      store16_in(tile, {}, 1 - cluster_rank());
      break;
    case kMulticastToNobody:
      tma_load_multicast(tile, map, barrier[0], 0, 0, uint16_t{4});
      break;
    default:
      break;
  }
}

TEST(misused_clusters) {
  for_each_seed([] {
    alignas(16) static float data[32 * 8];
    const int64_t sizes[2] = {32, 8}, stride = 128;
    const int32_t box[2] = {32, 8};
    TensorMap map;
    CHECK(encode_tensor_map<float>(&map, data, 2, sizes, &stride, box, Swizzle::kNone).is_ok());
    const auto run = [&](Mistake mistake) {
      simt::launch(misuse_kernel, {2, 64, 1024, false, 2}, map, mistake);
    };
    EXPECT_ERROR(simt::Error, "cluster_wait: the thread has not arrived", run(kWaitsAlone));
    EXPECT_ERROR(simt::Error, "has not waited since it arrived", run(kArrivesTwice));
    EXPECT_ERROR(simt::Error, "block 2 of a cluster of 2", run(kNoSuchBlock));
    EXPECT_ERROR(simt::Error, "block 1 of the cluster has ended", run(kPeerEnded));
    EXPECT_ERROR(simt::Error, "of the cluster may not have started", run(kNotMet));
    EXPECT_ERROR(simt::Error, "blocks: names none or more than the 2", run(kMulticastToNobody));
    EXPECT_ERROR(simt::Error, "cluster_wait (64 of 128 threads have arrived)", run(kNoArrival));
  });
  EXPECT_ERROR(simt::Error, "cluster: expected 1 to 8 blocks",
               simt::launch(misuse_kernel, {9, 32, 0, false, 9}, TensorMap{}, kNoArrival));
}

}  // namespace

TEST_MAIN()
