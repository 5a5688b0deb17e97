// SPDX-License-Identifier: MIT
//
// Rules of the PTX ISA whose breach may go well here and fails on a GPU, or fails there later and
// elsewhere: each is refused by name.
#include <string>
#include <vector>

#include "check.h"
#include "device/barrier.cuh"
#include "device/cluster.cuh"
#include "device/cp_async.cuh"
#include "device/fence.cuh"
#include "device/launch.cuh"
#include "device/mma.cuh"
#include "device/registers.cuh"
#include "device/tma.cuh"
#include "device/vec.cuh"
#include "device/warp.cuh"
#include "device/wgmma.cuh"

namespace {

using namespace kimi;

/// The kernel, which takes a number that says what it does wrong, must fail for every seed.
void expect(const char* text, void (*kernel)(int), int mistake, const simt::LaunchShape& shape) {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    simt::settings().seed = seed;
    EXPECT_ERROR(simt::Error, text, simt::launch(kernel, shape, mistake));
  }
}
/// Without a mistake it must not.
void expect_right(void (*kernel)(int), const simt::LaunchShape& shape) {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    simt::settings().seed = seed;
    simt::launch(kernel, shape, 0);
  }
}

// ---- launches -----------------------------------------------------------------------------------

__global__ void static_kernel(int bytes) {
  KIMI_STATIC_SHARED(char, half, 24 * 1024);
  KIMI_STATIC_SHARED(char, rest, 24 * 1024);
  half[threadIdx.x] = rest[threadIdx.x] = 0;
  if (bytes > 0) {
    KIMI_STATIC_SHARED(char, more, 16);
    more[threadIdx.x % 16] = 0;
  }
}

TEST(shared_memory_of_a_block) {
  expect_right(static_kernel, {1, 32, (227 - 48) * 1024});
  expect("launch: dynamic shared memory: expected at most 232448 bytes, got 232449", static_kernel,
         0, {1, 32, 227 * 1024 + 1});
  expect("shared memory: expected at most 232448 bytes, got 49152 static and 183297 dynamic ones",
         static_kernel, 0, {1, 32, (227 - 48) * 1024 + 1});
  expect("static shared memory: expected at most 49152 bytes in a kernel, got 49168", static_kernel,
         1, {1, 32});
}

TEST(blocks_of_a_cooperative_launch) {
  LaunchConfig config{5, 32};
  config.cooperative = true;
  CHECK(launch(static_kernel, config, 0).is_ok());
  config.grid = 6;
  EXPECT_ERROR(simt::Error, "launch: cooperative: expected at most the 5 blocks that are resident",
               (void)launch(static_kernel, config, 0));
}

// ---- barriers of whole warps --------------------------------------------------------------------

enum NamedBarrier { kRightBarrier, kBarrierZero, kNoThreads, kHalfWarps };

__global__ void named_barrier_kernel(int mistake) {
  if (mistake == kHalfWarps && lane_id() >= 16) return;
  named_barrier_sync(mistake == kBarrierZero ? 0 : 1, mistake == kNoThreads   ? 0
                                                      : mistake == kHalfWarps ? 32
                                                                              : 64);
}

TEST(named_barriers) {
  expect_right(named_barrier_kernel, {1, 64});
  expect("named_barrier_sync: id: expected 1 to 15, got 0", named_barrier_kernel, kBarrierZero,
         {1, 64});
  expect("named_barrier_sync: threads: expected 32 or more, got 0", named_barrier_kernel,
         kNoThreads, {1, 64});
  expect("named_barrier_sync: expected whole warps, got lanes 0-15 of warp 0", named_barrier_kernel,
         kHalfWarps, {1, 64});
}

enum ClusterBarrier { kRightCluster, kOneLaneArrives, kOneLaneWaits, kNeverWaits };

__global__ void cluster_barrier_kernel(int mistake) {
  if (mistake == kOneLaneArrives && lane_id() != 0) return;
  cluster_arrive();
  if (mistake == kNeverWaits || (mistake == kOneLaneWaits && lane_id() != 0)) return;
  cluster_wait();
}

TEST(cluster_barriers) {
  const simt::LaunchShape pair{2, 32, 0, false, 2};
  expect_right(cluster_barrier_kernel, pair);
  expect("the mask names an exited lane", cluster_barrier_kernel, kOneLaneArrives, pair);
  expect("cluster_arrive: not waited for when the thread ended", cluster_barrier_kernel,
         kOneLaneWaits, pair);
  expect("cluster_arrive: not waited for when the thread ended", cluster_barrier_kernel,
         kNeverWaits, pair);
}

// ---- mbarriers ----------------------------------------------------------------------------------

enum BarrierMistake {
  kRightUse,
  kInitialisedTwice,
  kNoArrivals,
  kTooManyArrivals,
  kMisalignedBarrier,
  kTooManyBytes,
  kTooManyBytesCome,
  kBarrierOutsideShared,
  kBarrierOfThePeer,
  kNoFenceBeforeArrival,
};

__global__ void mbarrier_kernel(int mistake) {
  KIMI_STATIC_SHARED(MBarrier, barriers, 2);
  static MBarrier outside{};
  if (threadIdx.x == 0) {
    mbarrier_init(barriers[0], mistake == kNoArrivals        ? 0
                               : mistake == kTooManyArrivals ? 1u << 20
                                                             : 2);
    if (mistake == kInitialisedTwice) mbarrier_init(barriers[0], 1);
    if (mistake == kMisalignedBarrier)
      mbarrier_init(*reinterpret_cast<MBarrier*>(reinterpret_cast<char*>(barriers) + 4), 1);
    if (mistake == kBarrierOutsideShared) mbarrier_init(outside, 1);
    if (mistake != kNoFenceBeforeArrival) mbarrier_fence_init();
  }
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0) {
    MBarrier& b = barriers[0];
    if (mistake == kTooManyBytes) mbarrier_expect_tx(b, 1u << 20);
    if (mistake == kTooManyBytesCome) mbarrier_complete_tx(b, 1u << 20);
    if (mistake == kBarrierOfThePeer)
      mbarrier_arrive(*static_cast<MBarrier*>(simt::in_peer(&b, cluster_rank() ^ 1)));
    mbarrier_expect_tx(b, (1u << 20) - 1);
    mbarrier_complete_tx(b, (1u << 20) - 1);
    mbarrier_arrive(b);
    mbarrier_arrive_in(b, cluster_rank() ^ 1);
  }
  mbarrier_wait(barriers[0], 0);
  cluster_arrive();
  cluster_wait();
}

TEST(mbarriers) {
  const simt::LaunchShape pair{2, 32, 0, false, 2};
  expect_right(mbarrier_kernel, pair);
  expect("has been initialised before", mbarrier_kernel, kInitialisedTwice, pair);
  expect("arrivals: expected 1 to 2^20-1, got 0", mbarrier_kernel, kNoArrivals, pair);
  expect("arrivals: expected 1 to 2^20-1, got 1048576", mbarrier_kernel, kTooManyArrivals, pair);
#if !defined(__SANITIZE_ADDRESS__)  // UBSan refuses the reference already
  expect("must be 8-byte aligned", mbarrier_kernel, kMisalignedBarrier, pair);
#endif
  expect(
      "mbarrier_expect_tx: mbarrier at static shared + 0: expected -(2^20-1) to 2^20-1 bytes to "
      "be pending, got 1048576",
      mbarrier_kernel, kTooManyBytes, pair);
  expect("bytes to be pending, got -1048576", mbarrier_kernel, kTooManyBytesCome, pair);
  expect("mbarrier_init: 8 bytes from no shared memory on are not all in", mbarrier_kernel,
         kBarrierOutsideShared, pair);
  expect("mbarrier_arrive: 8 bytes from no shared memory on are not all in", mbarrier_kernel,
         kBarrierOfThePeer, pair);
  expect("mbarrier_arrive_in: ", mbarrier_kernel, kNoFenceBeforeArrival, pair);
  expect("no mbarrier_fence_init since it was initialised", mbarrier_kernel, kNoFenceBeforeArrival,
         pair);
}

__global__ void unfenced_load_kernel(const __grid_constant__ TensorMap map, bool fenced) {
  KIMI_SHARED(char, tile);
  KIMI_STATIC_SHARED(MBarrier, full, 1);
  if (threadIdx.x != 0) return;
  mbarrier_init(full[0], 1);
  if (fenced) mbarrier_fence_init();
  mbarrier_arrive_expect_tx(full[0], 256);
  tma_load(tile, map, full[0], 0, 0);
  mbarrier_wait(full[0], 0);
}

TEST(mbarriers_of_tma) {
  alignas(16) static char data[256];
  const int64_t sizes[2] = {128, 2}, stride = 128;
  const int32_t box[2] = {128, 2};
  TensorMap map;
  CHECK(encode_tensor_map<e4m3>(&map, data, 2, sizes, &stride, box, Swizzle::kNone).is_ok());
  for (uint64_t seed = 0; seed < 12; ++seed) {
    simt::settings().seed = seed;
    simt::launch(unfenced_load_kernel, {1, 32, 256}, map, true);
    EXPECT_ERROR(simt::Error,
                 "tma_load: mbarrier at static shared + 0: no mbarrier_fence_init since it was",
                 simt::launch(unfenced_load_kernel, {1, 32, 256}, map, false));
  }
}

// ---- spaces of memory ---------------------------------------------------------------------------

enum Space {
  kRightSpaces,
  kCopyToGlobal,
  kCopyFromShared,
  kMisalignedWithoutData,
  kStreamFromShared,
  kStreamToShared,
  kMatrixInGlobal,
  kMatrixBeyond,
};

__global__ void space_kernel(int mistake) {
  KIMI_SHARED(uint4, tile);  // 64 of them
  static uint4 global[64];
  const int t = static_cast<int>(threadIdx.x);
  uint4* const to = mistake == kCopyToGlobal ? global : tile;
  const uint4* const from = mistake == kCopyFromShared ? tile + 32 : global;
  const auto* const odd = reinterpret_cast<const char*>(global) + 8;
  cp_async16(to + t, from + t, true);
  cp_async16(to + t, mistake == kMisalignedWithoutData ? odd : nullptr, false);
  cp_async_commit();
  cp_async_wait<0>();
  store16_streaming(mistake == kStreamToShared ? tile + t : global + t,
                    load16_streaming(mistake == kStreamFromShared ? tile + t : global + t));
  warp_barrier();
  uint32_t r[4];
  ldmatrix_x4(r, mistake == kMatrixInGlobal ? global + t : tile + t);
  ldmatrix_x4_transposed(r, mistake == kMatrixBeyond ? tile + 33 + t : tile + t);
}

TEST(spaces_of_memory) {
  const simt::LaunchShape shape{1, 32, 1024};
  expect_right(space_kernel, shape);
  expect("cp_async16: 16 bytes from no shared memory on", space_kernel, kCopyToGlobal, shape);
  expect("cp_async16: expected global memory, got dynamic shared + ", space_kernel, kCopyFromShared,
         shape);
  expect("cp_async16: both addresses must be multiples of 16 bytes", space_kernel,
         kMisalignedWithoutData, shape);
  expect("load16_streaming: expected global memory, got dynamic shared + ", space_kernel,
         kStreamFromShared, shape);
  expect("store16_streaming: expected global memory, got dynamic shared + ", space_kernel,
         kStreamToShared, shape);
  expect("ldmatrix_x4: 16 bytes from no shared memory on", space_kernel, kMatrixInGlobal, shape);
  expect("ldmatrix_x4_transposed: 16 bytes from ", space_kernel, kMatrixBeyond, shape);
}

// ---- warpgroups ---------------------------------------------------------------------------------

enum Registers {
  kRightRegisters,
  kAnotherCount,
  kThreeWarps,
  kOneLane,
  kFewerByIncrease,
  kMoreByDecrease,
  kMoreThanThereAre,
};

__global__ void registers_kernel(int mistake) {  // 384 threads begin with 168 each
  const int group = warp_id() / 4;
  if (mistake == kOneLane && warp_id() == 0 && lane_id() != 5) return;
  if (group == 0) {
    if (mistake == kAnotherCount && warp_id() == 2)
      registers_decrease<48>();
    else if (mistake == kMoreByDecrease)
      registers_decrease<176>();
    else if (mistake != kThreeWarps || warp_id() != 3)
      registers_decrease<40>();
  } else if (mistake == kThreeWarps) {
    registers_increase<168>();
  } else if (mistake == kFewerByIncrease) {
    registers_increase<160>();
  } else if (mistake == kMoreThanThereAre) {
    registers_increase<240>();
  } else {
    registers_increase<232>();
  }
}

// Rows that cp.async brings and a barrier counts, and wgmma reads.
enum { kNoFence = 1, kNoArrival };

__global__ void counted_kernel(int mistake) {
  KIMI_SHARED(char, tiles);  // a, b: 64 rows of 128 bytes
  KIMI_STATIC_SHARED(MBarrier, full, 1);
  alignas(16) static const char zeros[16] = {};
  if (threadIdx.x == 0) {
    mbarrier_init(full[0], 128);
    mbarrier_fence_init();
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < 1024; i += 128)
    cp_async16(tiles + 16 * i, zeros, true);
  if (mistake != kNoArrival || threadIdx.x > 0) cp_async_arrive(full[0]);
  mbarrier_wait(full[0], 0);
  if (mistake != kNoFence) fence_async_shared();
  float d[32];
  wgmma_fence(d);
  wgmma_fence();
  wgmma<bf16, 64, Major::kDepth, Major::kDepth>(d, wgmma_descriptor<Major::kDepth>(tiles),
                                                wgmma_descriptor<Major::kDepth>(tiles + 8192),
                                                false);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_fence(d);
  for (float sum : d)
    if (sum != 0.0f) simt::fail("a sum of what had not landed");
}

TEST(copies_that_a_barrier_counts) {
  const simt::LaunchShape shape{1, 128, 2 * 8192};
  expect_right(counted_kernel, shape);
  for (uint64_t seed : {0, 1, 2, 3, 8, 11}) {  // of those whose copies land late
    simt::settings().seed = seed;
    EXPECT_ERROR(simt::Error, "there was no fence_async_shared since",
                 simt::launch(counted_kernel, shape, +kNoFence));
  }
  expect("1 of 128 arrivals", counted_kernel, kNoArrival, shape);
}

TEST(registers_move_between_warpgroups) {
  const simt::LaunchShape shape{2, 384};
  expect_right(registers_kernel, shape);
  expect("registers_decrease: registers: expected ", registers_kernel, kAnotherCount, shape);
  expect("thread 96: registers_decrease: thread ", registers_kernel, kThreeWarps, shape);
  expect("the mask names an exited lane", registers_kernel, kOneLane, shape);
  expect(
      "registers_increase: expected 168 registers a thread, which the warp has, or more, got 160",
      registers_kernel, kFewerByIncrease, shape);
  expect(
      "registers_decrease: expected 168 registers a thread, which the warp has, or fewer, got "
      "176",
      registers_kernel, kMoreByDecrease, shape);
  expect("wait for registers_increase: 2304 registers more for the warp (the block's pool has ",
         registers_kernel, kMoreThanThereAre, shape);
}

enum Product {
  kRightProduct,
  kOtherTile,
  kOtherSize,
  kOtherKeep,
  kThreeWarpsMultiply,
  kOneMore,
  kAdvancedTooFar,
  kAdvancedTooFarOuter,
};

template <int kN>
__device__ void product(uint64_t a, uint64_t b, bool keep) {
  float d[kN / 2] = {};
  wgmma_fence();
  wgmma<bf16, kN, Major::kDepth, Major::kDepth>(d, a, b, keep);
  wgmma_commit();
  wgmma_wait<0>();
}

__global__ void product_kernel(int mistake) {
  KIMI_SHARED(char, tiles);  // of 8192 bytes
  for (int i = static_cast<int>(threadIdx.x); i < 3 * 8192; i += 128) tiles[i] = 0;
  fence_async_shared();
  __syncthreads();
  const bool other = warp_id() == 2;
  if (mistake == kThreeWarpsMultiply && other) return;
  uint64_t a = wgmma_descriptor<Major::kDepth>(tiles);
  uint64_t b =
      wgmma_descriptor<Major::kDepth>(tiles + (mistake == kOtherTile && other ? 2 : 1) * 8192);
  if (mistake == kAdvancedTooFar) a = wgmma_advance<Major::kDepth>(a, 4);
  if (mistake == kAdvancedTooFarOuter) b += 16;
  product<16>(a, b, mistake == kOtherKeep && other);
  if (mistake == kOtherSize && other)
    product<24>(a, b, false);
  else
    product<16>(a, b, false);
  if (mistake == kOneMore && other) product<16>(a, b, false);
}

TEST(warpgroups_multiply_together) {
  const simt::LaunchShape shape{1, 128, 3 * 8192};
  expect_right(product_kernel, shape);
  expect("wgmma: B: expected ", product_kernel, kOtherTile, shape);
  expect("wgmma: N: expected ", product_kernel, kOtherSize, shape);
  expect("wgmma: keep: expected ", product_kernel, kOtherKeep, shape);
  expect("thread 64: wgmma: thread ", product_kernel, kThreeWarpsMultiply, shape);
  expect("of its warpgroup has executed 3 operations that all", product_kernel, kOneMore, shape);
  expect("wgmma: A: the descriptor was advanced beyond its four steps, to dynamic shared + 128",
         product_kernel, kAdvancedTooFar, shape);
  expect("wgmma: B: the descriptor was advanced beyond its four steps, to dynamic shared + 8208",
         product_kernel, kAdvancedTooFarOuter, shape);
}

}  // namespace

TEST_MAIN()
