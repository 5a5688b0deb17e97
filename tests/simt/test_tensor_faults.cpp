// SPDX-License-Identifier: MIT
//
// A product of matrices with every Hopper primitive in it, and what happens when one step is wrong.
#include <cmath>
#include <utility>
#include <vector>

#include "check.h"
#include "device/barrier.cuh"
#include "device/fence.cuh"
#include "device/launch.cuh"
#include "device/stmatrix.cuh"
#include "device/tma.cuh"
#include "device/vec.cuh"
#include "device/warp.cuh"
#include "device/wgmma.cuh"
#include "races.h"

namespace {

using namespace kimi;

enum Mistake {
  kNothing,
  kStageReleasedEarly,
  kOneThreadReleases,
  kSumsReadEarly,
  kNoCommit,
  kTooFewBytes,
  kTooManyBytes,
  kNoProxyFence,
  kNoWgmmaFence,
  kStagingReusedEarly,
  kStoreNotWaitedFor,
  kOtherMajor,
  kNoSwizzle,
};

constexpr int kN = 32, kStages = 2, kTiles = 3, kSteps = 3, kThreads = 160;
constexpr int kBytesA = 64 * 128, kBytesB = kN * 128, kStage = kBytesA + kBytesB;
constexpr int kStaging = kStages * kStage, kSharedBytes = kStaging + 64 * kN * 2;

// out [tiles 64, N] = a [tiles 64, K] b [N, K]^T, K = 64 kSteps. Warp 4 loads, the warpgroup before
// it multiplies with one group of wgmma in flight, rounds, and stores through one staging buffer.
__global__ void product_kernel(const __grid_constant__ TensorMap a,
                               const __grid_constant__ TensorMap b,
                               const __grid_constant__ TensorMap out, Mistake mistake) {
  KIMI_SHARED(char, shared);
  KIMI_STATIC_SHARED(MBarrier, full, kStages);
  KIMI_STATIC_SHARED(MBarrier, empty, kStages);
  if (threadIdx.x == 0)
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(full[s], 1);
      mbarrier_init(empty[s], mistake == kOneThreadReleases ? 1 : 4);
    }
  mbarrier_fence_init();
  __syncthreads();
  if (warp_id() == 4) {
    if (lane_id() != 0) return;
    for (int i = 0; i < kTiles * kSteps; ++i) {
      const int s = i % kStages, wrong = mistake == kTooFewBytes    ? -16
                                         : mistake == kTooManyBytes ? 16
                                                                    : 0;
      mbarrier_wait(empty[s], static_cast<uint32_t>(i / kStages & 1) ^ 1);
      mbarrier_arrive_expect_tx(full[s], static_cast<uint32_t>(kStage + wrong));
      tma_load(shared + s * kStage, a, full[s], i % kSteps * 64, i / kSteps * 64);
      tma_load(shared + s * kStage + kBytesA, b, full[s], i % kSteps * 64, 0);
    }
    return;
  }
  const int lane = lane_id(), warp = warp_id();
  char* const staging = shared + kStaging;
  const auto release = [&](int stage) {
    if (lane == 0 && (warp == 0 || mistake != kOneThreadReleases)) mbarrier_arrive(empty[stage]);
  };
  for (int tile = 0; tile < kTiles; ++tile) {
    float d[kN / 2];
    for (int step = 0; step < kSteps; ++step) {
      const int i = tile * kSteps + step, s = i % kStages;
      mbarrier_wait(full[s], static_cast<uint32_t>(i / kStages & 1));
      const uint64_t of_a = wgmma_descriptor<Major::kDepth>(shared + s * kStage);
      const uint64_t of_b = wgmma_descriptor<Major::kDepth>(shared + s * kStage + kBytesA);
      if (mistake != kNoWgmmaFence) wgmma_fence();
      for (int k = 0; k < 4; ++k) {
        const uint64_t ak = wgmma_advance<Major::kDepth>(of_a, k);
        const uint64_t bk = wgmma_advance<Major::kDepth>(of_b, k);
        if (mistake == kOtherMajor)
          wgmma<bf16, kN, Major::kDepth, Major::kOuter>(d, ak, bk, step + k > 0);
        else
          wgmma<bf16, kN, Major::kDepth, Major::kDepth>(d, ak, bk, step + k > 0);
      }
      if (mistake != kNoCommit) wgmma_commit();
      if (mistake == kStageReleasedEarly) release(s);
      wgmma_wait<1>();
      if (step > 0 && mistake != kStageReleasedEarly) release((i - 1) % kStages);
    }
    const auto wait_and_release = [&] {
      wgmma_wait<0>();
      if (mistake != kStageReleasedEarly) release((tile * kSteps + kSteps - 1) % kStages);
    };
    if (mistake != kSumsReadEarly) wait_and_release();

    if (threadIdx.x == 0 && mistake != kStagingReusedEarly) tma_store_wait_read<0>();
    named_barrier_sync(1, 128);
    for (int j = 0; j < kN / 8; j += 2) {
      uint32_t pairs[4];
      for (int m = 0; m < 4; ++m) {
        const float* from = d + 4 * (j + m / 2) + 2 * (m % 2);
        pairs[m] = from_float<bf16>(from[0]).bits |
                   static_cast<uint32_t>(from_float<bf16>(from[1]).bits) << 16;
      }
      const int row = warp * 16 + lane % 16, column = (j + lane / 16) * 8;
      stmatrix_x4(staging + (row * kN + column) * 2, pairs[0], pairs[1], pairs[2], pairs[3]);
    }
    if (mistake != kNoProxyFence) fence_async_shared();
    named_barrier_sync(1, 128);
    if (threadIdx.x == 0) {
      tma_store(out, staging, 0, tile * 64);
      tma_store_commit();
    }
    if (mistake == kSumsReadEarly) wait_and_release();
  }
  if (threadIdx.x == 0 && mistake != kStoreNotWaitedFor) tma_store_wait_read<0>();
}

enum Outcome { kRight, kWrong, kCaught };

struct Problem {
  static constexpr int kDepth = 64 * kSteps;
  std::vector<uint4> memory_a{64 * kTiles * kDepth / 8}, memory_b{kN * kDepth / 8},
      memory_out{64 * kTiles * kN / 8};
  bf16* a = reinterpret_cast<bf16*>(memory_a.data());
  bf16* b = reinterpret_cast<bf16*>(memory_b.data());
  bf16* out = reinterpret_cast<bf16*>(memory_out.data());

  Problem() {
    for (int i = 0; i < 64 * kTiles * kDepth; ++i)
      a[i] = from_float<bf16>(static_cast<float>(i * 7 % 11 - 5));
    for (int i = 0; i < kN * kDepth; ++i)
      b[i] = from_float<bf16>(static_cast<float>(i * 5 % 13 - 6));
  }
  void run(Mistake mistake) {
    const auto encode = [](bf16* base, int64_t rows, int64_t columns, int32_t box_rows,
                           int32_t box_columns, Swizzle swizzle) {
      const int64_t sizes[2] = {columns, rows}, stride = columns * 2;
      const int32_t box[2] = {box_columns, box_rows};
      TensorMap map;
      CHECK(encode_tensor_map<bf16>(&map, base, 2, sizes, &stride, box, swizzle).is_ok());
      return map;
    };
    const Swizzle swizzle = mistake == kNoSwizzle ? Swizzle::kNone : Swizzle::k128;
    const TensorMap of_a = encode(a, 64 * kTiles, kDepth, 64, 64, Swizzle::k128);
    const TensorMap of_b = encode(b, kN, kDepth, kN, 64, swizzle);
    const TensorMap of_out = encode(out, 64 * kTiles, kN, 64, kN, Swizzle::kNone);
    CHECK(
        launch(product_kernel, LaunchConfig{1, kThreads, kSharedBytes}, of_a, of_b, of_out, mistake)
            .is_ok());
  }
  bool right() const {
    for (int r = 0; r < 64 * kTiles; ++r)
      for (int c = 0; c < kN; ++c) {
        float sum = 0;
        for (int k = 0; k < kDepth; ++k)
          sum += to_float(a[r * kDepth + k]) * to_float(b[c * kDepth + k]);
        if (out[r * kN + c].bits != from_float<bf16>(sum).bits) return false;
      }
    return true;
  }
};

/// How many of 24 seeds give a wrong result; an error must contain `text`.
struct Count {
  int wrong = 0, caught = 0;
};
Count outcomes(Mistake mistake, const char* text = "no error is expected") {
  Count count;
  for (uint64_t seed = 0; seed < 24; ++seed) {
    simt::settings().seed = seed;
    Problem problem;
    try {
      problem.run(mistake);
      count.wrong += !problem.right();
    } catch (const simt::Error& error) {
      ++count.caught;
      if (std::string(error.what()).find(text) == std::string::npos)
        check::fail(__FILE__, __LINE__, "another error:\n" + std::string(error.what()));
    }
  }
  std::printf("      wrong for %d, caught for %d of 24 seeds\n", count.wrong, count.caught);
  return count;
}

TEST(the_product_is_right_in_every_order) {
  const Count count = outcomes(kNothing);
  CHECK(count.wrong == 0 && count.caught == 0);
}

TEST(misuse_is_an_error_for_every_seed) {
  CHECK(outcomes(kNoWgmmaFence, "no wgmma_fence since the thread began").caught == 24);
  CHECK(outcomes(kNoProxyFence, "there was no fence_async_shared since").caught == 24);
  CHECK(outcomes(kTooFewBytes, "and -16 bytes pending").caught == 24);
  CHECK(outcomes(kTooManyBytes, "and 16 bytes pending").caught == 24);
  CHECK(outcomes(kOtherMajor, "made for the other major dimension").caught == 24);
  CHECK(outcomes(kStoreNotWaitedFor, "TMA store: not waited for").caught == 24);
  CHECK(outcomes(kNoSwizzle).wrong == 24);
}

#if defined(__SANITIZE_THREAD__)

TEST(a_stage_released_early_is_a_race) {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    const auto run = [=](Mistake mistake) {
      simt::settings().seed = seed;
      Problem().run(mistake);
    };
    CHECK(!races([=] { run(kNothing); }));
    if (seed / 4 % 3 == 2) CHECK(races([=] { run(kStageReleasedEarly); }));  // late
  }
}

#else

TEST(a_stage_released_early_gives_wrong_results) {
  CHECK(outcomes(kStageReleasedEarly, "deadlock").wrong > 0);  // or a lane misses a phase
  CHECK(outcomes(kOneThreadReleases, "deadlock").wrong > 0);   // for the whole warpgroup
  CHECK(outcomes(kNoCommit, "wgmma: not waited for when the thread ended").caught == 24);
}

#endif

TEST(what_is_used_early_gives_wrong_results) {
  CHECK(outcomes(kStagingReusedEarly).wrong > 0);
  CHECK(outcomes(kSumsReadEarly).wrong > 0);
}

// ---- addresses, sizes, counts -------------------------------------------------------------------

enum Misuse {
  kTileNotAligned,
  kSwizzledTileNotAligned,
  kTileBeyondShared,
  kThreeCoordinates,
  kBarrierNotInitialised,
  kLoadNotWaitedFor,
  kBytesAdded,
  kDescriptorNotAligned,
  kOperandBeyondShared,
  kHalfAWarpgroup,
  kLoadOverUnfencedWrites,
  kMisuses,
};
constexpr const char* kTexts[kMisuses] = {
    "tma_load: the shared address must be a multiple of 128 bytes",
    "tma_load: the shared address must be a multiple of 1024 bytes",
    "tma_store: 1024 bytes from dynamic shared + 15488 on are not all in the block's shared memory",
    "tma_load: 3 coordinates for a tensor map of rank 2",
    "has not been initialised",
    "a TMA load was not waited for when the block that it writes to ended",
    "tma_reduce_add: bytes cannot be added",
    "wgmma_descriptor: the tile must be 1024-byte aligned",
    "wgmma: B: 16384 bytes from dynamic shared + 1024 on are not all in",
    "wgmma: the warpgroup has fewer than 128 threads",
    "tma_load: thread 0 has written dynamic shared + 16",
};

__global__ void misuse_kernel(const __grid_constant__ TensorMap plain,
                              const __grid_constant__ TensorMap swizzled, Misuse misuse) {
  KIMI_SHARED(char, shared);  // 16 KB
  KIMI_STATIC_SHARED(MBarrier, full, 2);
  if (misuse >= kDescriptorNotAligned && misuse <= kHalfAWarpgroup) {
    float d[64];
    const int offset = misuse == kDescriptorNotAligned ? 512 : 1024;
    const uint64_t a = wgmma_descriptor<Major::kDepth>(shared);
    const uint64_t b = wgmma_descriptor<Major::kDepth>(shared + offset);
    wgmma_fence();
    wgmma<bf16, 128, Major::kDepth, Major::kDepth>(d, a, b, false);
    return;
  }
  if (threadIdx.x != 0) return;
  mbarrier_init(full[0], 1);
  mbarrier_fence_init();
  mbarrier_arrive_expect_tx(full[0], 1024);
  switch (misuse) {
    case kTileNotAligned:
      return tma_load(shared + 64, plain, full[0], 0, 0);
    case kSwizzledTileNotAligned:
      return tma_load(shared + 512, swizzled, full[0], 0, 0);
    case kTileBeyondShared:
      return tma_store(plain, shared + 15488, 0, 0);
    case kThreeCoordinates:
      return tma_load(shared, plain, full[0], 0, 0, 0);
    case kBarrierNotInitialised:
      tma_load(shared, plain, full[1], 0, 0);
      return mbarrier_wait(full[0], 0);
    case kLoadNotWaitedFor:
      return tma_load(shared, plain, full[0], 0, 0);
    case kBytesAdded:
      return tma_reduce_add(plain, shared, 0, 0);
    default:
      store16(shared + 16, uint4{});
      tma_load(shared, plain, full[0], 0, 0);
  }
}

TEST(misused_addresses_sizes_and_counts) {
  alignas(16) static char data[1024];
  const int64_t sizes[2] = {128, 8}, stride = 128;
  const int32_t box[2] = {128, 8};
  TensorMap plain, swizzled;
  CHECK(encode_tensor_map<e4m3>(&plain, data, 2, sizes, &stride, box, Swizzle::kNone).is_ok());
  CHECK(encode_tensor_map<e4m3>(&swizzled, data, 2, sizes, &stride, box, Swizzle::k128).is_ok());
  for (uint64_t seed = 0; seed < 12; ++seed) {
    simt::settings().seed = seed;
    for (int misuse = 0; misuse < kMisuses; ++misuse) {
      if (misuse == kLoadNotWaitedFor && seed / 4 % 3 != 2) continue;  // else it may have landed
      const unsigned threads = misuse == kHalfAWarpgroup ? 96 : 128;
      EXPECT_ERROR(simt::Error, kTexts[misuse],
                   simt::launch(misuse_kernel, {1, threads, 16384}, plain, swizzled,
                                static_cast<Misuse>(misuse)));
    }
  }
}

// ---- x of a box ---------------------------------------------------------------------------------

enum class Move { kLoad, kMulticast, kStore, kAdd };

__global__ void move_kernel(const __grid_constant__ TensorMap map, Move move, int rank, int x) {
  KIMI_SHARED(char, tile);
  KIMI_STATIC_SHARED(MBarrier, full, 1);
  if (threadIdx.x != 0) return;
  mbarrier_init(full[0], 1);
  mbarrier_fence_init();
  mbarrier_arrive_expect_tx(full[0], 1024);
  switch (move) {
    case Move::kLoad:
      rank == 2 ? tma_load(tile, map, full[0], x, 0) : tma_load(tile, map, full[0], x, 0, 0);
      return mbarrier_wait(full[0], 0);
    case Move::kMulticast:
      tma_load_multicast(tile, map, full[0], x, 0, uint16_t{1});
      return mbarrier_wait(full[0], 0);
    case Move::kStore:
      rank == 2 ? tma_store(map, tile, x, 0) : tma_store(map, tile, x, 0, 0);
      break;
    case Move::kAdd:
      rank == 2 ? tma_reduce_add(map, tile, x, 0) : tma_reduce_add(map, tile, x, 0, 0);
      break;
  }
  tma_store_commit();
  tma_store_wait<0>();
}

template <class T>
void check_x(int rank, Swizzle swizzle) {
  alignas(16) static char data[2048];
  const int size = sizeof(T);
  const int64_t sizes[3] = {128 / size, 8, 2}, strides[2] = {128, 1024};
  const int32_t box[3] = {128 / size, 8, 1};
  TensorMap map;
  CHECK(encode_tensor_map<T>(&map, data, rank, sizes, strides, box, swizzle).is_ok());
  constexpr std::pair<Move, const char*> kMoves[] = {{Move::kLoad, "tma_load"},
                                                     {Move::kMulticast, "tma_load_multicast"},
                                                     {Move::kStore, "tma_store"},
                                                     {Move::kAdd, "tma_reduce_add"}};
  for (const auto& [move, name] : kMoves) {
    if ((size == 1 && move == Move::kAdd) || (rank == 3 && move == Move::kMulticast)) continue;
    const auto run = [&, move = move](int x) {
      simt::launch(move_kernel, {1, 32, 1024}, map, move, rank, x);
    };
    for (int x : {1, 3, -5, 30, 501}) {
      if (x * size % 16 == 0) continue;
      EXPECT_ERROR(simt::Error,
                   std::string(name) + ": x: expected a multiple of " + std::to_string(16 / size) +
                       ", so that 16 divides its bytes, got " + std::to_string(x) +
                       " elements of " + std::to_string(size) + " bytes, " +
                       std::to_string(x * size) + " bytes",
                   run(x));
    }
    for (int x : {0, 16, -16, 512}) run(x);
  }
}

TEST(the_inner_coordinate_of_a_box_lies_on_16_bytes) {
  for (int rank : {2, 3})
    for (Swizzle swizzle : {Swizzle::kNone, Swizzle::k128}) {
      check_x<e4m3>(rank, swizzle);
      check_x<bf16>(rank, swizzle);
      check_x<fp16>(rank, swizzle);
      check_x<float>(rank, swizzle);
    }
}

}  // namespace

TEST_MAIN()
