// SPDX-License-Identifier: MIT
//
// Every primitive of the host runner and of csrc/device against plain loops, in every fiber order.
#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "device/atomic.cuh"
#include "device/barrier.cuh"
#include "device/launch.cuh"
#include "device/math.cuh"
#include "device/mbarrier.cuh"
#include "device/vec.cuh"
#include "device/warp.cuh"

namespace {

using namespace kimi;

constexpr uint64_t kSeeds = 12;

template <class Body>
void for_each_seed(Body body) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    simt::settings().seed = seed;
    body();
  }
}

// ---- warp operations ----------------------------------------------------------------------------

enum Operation {
  kIdx,
  kUp,
  kDown,
  kXor,
  kBallot,
  kAny,
  kAll,
  kMatch,
  kAdd,
  kMin,
  kMax,
  kOr,
  kXorSum,
  kOperations
};

__global__ void warp_kernel(int operation, uint32_t mask, int argument, int width,
                            const uint32_t* in, uint32_t* out) {
  const int t = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (!(mask >> (t % 32) & 1)) return;
  const uint32_t v = in[t];
  uint32_t r = 0;
  switch (operation) {
    case kIdx:
      r = __shfl_sync(mask, v, argument, width);
      break;
    case kUp:
      r = __shfl_up_sync(mask, v, static_cast<unsigned>(argument), width);
      break;
    case kDown:
      r = __shfl_down_sync(mask, v, static_cast<unsigned>(argument), width);
      break;
    case kXor:
      r = __shfl_xor_sync(mask, v, argument, width);
      break;
    case kBallot:
      r = __ballot_sync(mask, v & 1);
      break;
    case kAny:
      r = static_cast<uint32_t>(__any_sync(mask, v % 13 == 0));
      break;
    case kAll:
      r = static_cast<uint32_t>(__all_sync(mask, v % 13 != 0));
      break;
    case kMatch:
      r = __match_any_sync(mask, v % 5);
      break;
    case kAdd:
      r = __reduce_add_sync(mask, v);
      break;
    case kMin:
      r = static_cast<uint32_t>(__reduce_min_sync(mask, static_cast<int32_t>(v)));
      break;
    case kMax:
      r = __reduce_max_sync(mask, v);
      break;
    case kOr:
      r = __reduce_or_sync(mask, v);
      break;
    case kXorSum:
      r = __reduce_xor_sync(mask, v);
      break;
  }
  out[t] = r;
}

// The PTX ISA's definition of each operation, for one lane.
uint32_t expected(int operation, uint32_t mask, int argument, int width, const uint32_t* warp,
                  int lane) {
  const int low = lane / width * width, high = low + width - 1;
  std::vector<uint32_t> named;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) named.push_back(warp[i]);
  switch (operation) {
    case kIdx:
      return warp[low + argument % width];
    case kUp:
      return warp[lane - argument < low ? lane : lane - argument];
    case kDown:
      return warp[lane + argument > high ? lane : lane + argument];
    case kXor:
      return warp[(lane ^ argument) > high ? lane : lane ^ argument];
    case kBallot: {
      uint32_t bits = 0;
      for (int i = 0; i < 32; ++i) bits |= (mask >> i & 1) * (warp[i] & 1) << i;
      return bits;
    }
    case kAny:
      return std::any_of(named.begin(), named.end(), [](uint32_t v) { return v % 13 == 0; });
    case kAll:
      return std::all_of(named.begin(), named.end(), [](uint32_t v) { return v % 13 != 0; });
    case kMatch: {
      uint32_t bits = 0;
      for (int i = 0; i < 32; ++i)
        bits |= uint32_t{(mask >> i & 1) != 0 && warp[i] % 5 == warp[lane] % 5} << i;
      return bits;
    }
    case kAdd:
      return std::accumulate(named.begin(), named.end(), 0u);
    case kMin: {
      const auto less = [](uint32_t a, uint32_t b) {
        return static_cast<int32_t>(a) < static_cast<int32_t>(b);
      };
      return *std::min_element(named.begin(), named.end(), less);
    }
    case kMax:
      return *std::max_element(named.begin(), named.end());
    case kOr:
      return std::accumulate(named.begin(), named.end(), 0u, std::bit_or<>());
    default:
      return std::accumulate(named.begin(), named.end(), 0u, std::bit_xor<>());
  }
}

TEST(warp_operations_agree_with_their_definitions) {
  std::mt19937 random(1);
  for_each_seed([&] {
    for (int operation = 0; operation < kOperations; ++operation)
      for (int width : {32, 8, 1}) {
        const bool shuffle = operation <= kXor;
        if (!shuffle && width != 32) continue;
        const int argument = static_cast<int>(random() % 32);
        const uint32_t mask = shuffle ? ~0u : random() | 1u << random() % 32;
        std::vector<uint32_t> in(192), out(192, 77), want(192, 77);
        for (uint32_t& v : in) v = random();
        simt::launch(warp_kernel, {3, 64}, operation, mask, argument, width, in.data(), out.data());
        for (int t = 0; t < 192; ++t)
          if (mask >> t % 32 & 1)
            want[t] = expected(operation, mask, argument, width, &in[t / 32 * 32], t % 32);
        CHECK(out == want);
      }
  });
}

// The two halves of a diverged warp hold rendezvous of their own, then meet again.
__global__ void diverged_kernel(int* out) {
  const int lane = lane_id();
  int r = 0;
  if (lane < 12)
    for (int i = 0; i <= 2; ++i) r += __shfl_xor_sync(0x00000fffu, lane, 1 << i & 3);
  else
    r = __reduce_add_sync(0xfffff000u, lane);
  out[lane] = r + static_cast<int>(__reduce_max_sync(kFullWarp, lane));
}

TEST(disjoint_masks_of_a_diverged_warp_do_not_meet) {
  for_each_seed([] {
    std::vector<int> out(32);
    simt::launch(diverged_kernel, {1, 32}, out.data());
    for (int lane = 0; lane < 32; ++lane) {
      const int low = (lane ^ 1) + (lane ^ 2) + (lane ^ 0), high = (12 + 31) * 20 / 2;
      CHECK(out[lane] == (lane < 12 ? low : high) + 31);
    }
  });
}

__global__ void wide_values_kernel(double* out) {
  out[lane_id()] = __shfl_xor_sync(kFullWarp, 1.0 / (1 + lane_id()), 5) +
                   static_cast<double>(warp_exchange(1ll << 40, 1));
}

TEST(shuffles_carry_64_bits) {
  std::vector<double> out(32);
  simt::launch(wide_values_kernel, {1, 32}, out.data());
  for (int lane = 0; lane < 32; ++lane)
    CHECK(out[lane] == 1.0 / (1 + (lane ^ 5)) + static_cast<double>(1ll << 40));
}

// ---- blocks -------------------------------------------------------------------------------------

// Hillis-Steele inclusive scan, 3-dimensional block, and a static array beside the dynamic one.
__global__ void scan_kernel(const int* in, int* out, int* odd) {
  KIMI_SHARED(int, tile);
  KIMI_STATIC_SHARED(int, total, 1);
  const int n = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  const int t =
      static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
  const int64_t base = int64_t{blockIdx.y * gridDim.x + blockIdx.x} * n;
  tile[t] = in[base + t];
  __syncthreads();
  for (int d = 1; d < n; d *= 2) {
    const int v = t >= d ? tile[t - d] : 0;
    __syncthreads();
    tile[t] += v;
    __syncthreads();
  }
  if (t == n - 1) total[0] = tile[t];
  const int count = __syncthreads_count(tile[t] & 1);
  const int any = __syncthreads_or(t == 5), all = __syncthreads_and(t != 5);
  out[base + t] = tile[t] + (total[0] << 16);
  if (t == 0) odd[blockIdx.y * gridDim.x + blockIdx.x] = count + 1000 * any + 10000 * all;
}

TEST(block_scan_in_shared_memory) {
  for_each_seed([] {
    constexpr int kThreads = 4 * 3 * 5, kBlocks = 6;
    std::vector<int> in(kThreads * kBlocks), out(in.size()), odd(kBlocks);
    for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i * 7 % 11);
    simt::launch(scan_kernel, {{3, 2}, {4, 3, 5}, kThreads * sizeof(int)}, in.data(), out.data(),
                 odd.data());
    for (int b = 0; b < kBlocks; ++b) {
      const int total = std::accumulate(&in[b * kThreads], &in[b * kThreads] + kThreads, 0);
      int sum = 0, count = 0;
      for (int t = 0; t < kThreads; ++t) {
        sum += in[b * kThreads + t];
        count += sum & 1;
        CHECK(out[b * kThreads + t] == sum + (total << 16));
      }
      CHECK(odd[b] == count + 1000);
    }
  });
}

__global__ void named_barrier_kernel(int* out) {
  KIMI_STATIC_SHARED(int, half, 128);
  const int t = static_cast<int>(threadIdx.x), id = 1 + t / 64;
  half[t] = t * t;
  named_barrier_sync(id, 64);
  out[t] = half[t ^ 63];
}

TEST(named_barriers_join_half_a_block) {
  for_each_seed([] {
    std::vector<int> out(128);
    simt::launch(named_barrier_kernel, {1, 128}, out.data());
    for (int t = 0; t < 128; ++t) CHECK(out[t] == (t ^ 63) * (t ^ 63));
  });
}

__global__ void atomics_kernel(int* sums, unsigned* low, unsigned long long* wide,
                               uint32_t* slots) {
  const unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
  atomic_add(&sums[t % 3], static_cast<int>(t));
  atomic_max(&sums[3], static_cast<int>(t * 37 % 101));
  atomicMin(low, 1000u + t * 37 % 101);
  atomicAdd(wide, 1ull << 40);
  uint32_t place = t % 8;  // a hash table by compare-and-swap
  while (atomic_cas(&slots[place], 0, t + 1) != 0) place = (place + 1) % 256;
}

TEST(integer_atomics) {
  for_each_seed([] {
    std::vector<int> sums(4), want(4);
    unsigned low = ~0u;
    unsigned long long wide = 0;
    std::vector<uint32_t> slots(256);
    simt::launch(atomics_kernel, {5, 50}, sums.data(), &low, &wide, slots.data());
    for (int t = 0; t < 250; ++t) want[t % 3] += t;
    want[3] = 100;
    CHECK(sums == want);
    CHECK(low == 1000);
    CHECK(wide == 250ull << 40);
    std::sort(slots.begin(), slots.end());
    for (uint32_t i = 0; i < 256; ++i) CHECK(slots[i] == (i < 6 ? 0 : i - 5));
  });
}

// Blocks that wait for each other: the last one adds what all have stored.
__global__ void grid_barrier_kernel(unsigned* arrived, const int* in, int* partial, int* out) {
  const unsigned b = blockIdx.x;
  if (threadIdx.x == 0) {
    partial[b] = in[b];
    __threadfence();
    atomicAdd(arrived, 1);
    simt::spin_until([&] { return atomicAdd(arrived, 0) == gridDim.x; },
                     [] { return std::string("all blocks"); });
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 1) out[b] = std::accumulate(partial, partial + gridDim.x, 0);
}

TEST(cooperative_launch_keeps_all_blocks_live) {
  for_each_seed([] {
    unsigned arrived = 0;
    std::vector<int> in{1, 2, 4, 8, 16, 32, 64}, partial(7), out(7);
    simt::launch(grid_barrier_kernel, {7, 32, 0, true}, &arrived, in.data(), partial.data(),
                 out.data());
    for (int v : out) CHECK(v == 127);
    arrived = 0;
    const std::string text = EXPECT_ERROR(simt::Error, "blocks have not started",
                                          simt::launch(grid_barrier_kernel, {7, 32}, &arrived,
                                                       in.data(), partial.data(), out.data()));
    CHECK(text.find("wait for all blocks") != std::string::npos);
  });
}

// ---- mbarrier: a ring of three tiles between one producing and two consuming warps --------------

__global__ void ring_kernel(const int* in, int* out, int steps) {
  constexpr int kStages = 3;
  KIMI_STATIC_SHARED(int, tile, kStages * 32);
  KIMI_STATIC_SHARED(MBarrier, full, kStages);
  KIMI_STATIC_SHARED(MBarrier, empty, kStages);
  if (threadIdx.x == 0)
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(full[s], 32);
      mbarrier_init(empty[s], 64);
    }
  mbarrier_fence_init();
  __syncthreads();
  int sum = 0;
  for (int i = 0; i < steps; ++i) {
    const int s = i % kStages;
    const uint32_t parity = static_cast<uint32_t>(i / kStages & 1);
    if (warp_id() == 2) {
      mbarrier_wait(empty[s], parity ^ 1);
      tile[s * 32 + lane_id()] = in[i * 32 + lane_id()];
      if (lane_id() == 0) {  // a copy of 128 bytes that lands before its announcement
        mbarrier_complete_tx(full[s], 128);
        mbarrier_arrive_expect_tx(full[s], 128);
      } else {
        mbarrier_arrive(full[s]);
      }
    } else {
      mbarrier_wait(full[s], parity);
      sum += tile[s * 32 + (lane_id() + i) % 32];
      mbarrier_arrive(empty[s]);
    }
  }
  if (warp_id() < 2) out[threadIdx.x] = sum;
}

TEST(mbarrier_ring_of_producer_and_consumers) {
  for_each_seed([] {
    constexpr int kSteps = 11;
    std::vector<int> in(32 * kSteps), out(64);
    for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i * i % 1009);
    simt::launch(ring_kernel, {1, 96}, in.data(), out.data(), kSteps);
    for (int t = 0; t < 64; ++t) {
      int sum = 0;
      for (int i = 0; i < kSteps; ++i) sum += in[i * 32 + (t + i) % 32];
      CHECK(out[t] == sum);
    }
  });
}

// ---- vectors, arithmetic, launches --------------------------------------------------------------

__global__ void copy_kernel(const uint32_t* in, uint32_t* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (i + 4 > n) return;
  store16(out + i, load16_streaming(in + i));
  uint4 v = load16(out + i);
  v.x += 1;
  store16_streaming(out + i, v);
}

TEST(sixteen_byte_accesses) {
  std::vector<uint32_t> storage(68), out(64);
  uint32_t* in = storage.data();
  while (reinterpret_cast<uintptr_t>(in) % 16 != 0) ++in;
  std::iota(in, in + 64, 5u);
  simt::launch(copy_kernel, {1, 32}, in, out.data(), 64);
  for (uint32_t i = 0; i < 64; ++i) CHECK(out[i] == 5 + i + (i % 4 == 0));
  EXPECT_ERROR(simt::Error, "multiple of 16 bytes",
               simt::launch(copy_kernel, {1, 32}, in + 1, out.data(), 60));
}

TEST(arithmetic_is_not_contracted) {
  const volatile float a = 1.0f + 0x1p-12f, b = 1.0f + 0x1p-12f, c = -1.0f - 0x1p-11f;
  CHECK(add_rn(mul_rn(a, b), c) == 0.0f);
  CHECK(fma_rn(a, b, c) == 0x1p-24f);
  CHECK(div_rn(1.0f, 3.0f) == 0x1.555556p-2f);
  CHECK(reciprocal_rn(3.0f) == div_rn(1.0f, 3.0f));
  CHECK(sqrt_rn(2.0f) == 0x1.6a09e6p0f);
  CHECK(sub_rn(1.0f, 0x1p-25f) == 1.0f);
}

__global__ void identity_kernel(int* out) { out[blockIdx.x * blockDim.x + threadIdx.x] += 1; }

TEST(every_thread_of_every_block_runs_once) {
  for_each_seed([] {
    for (unsigned threads : {1u, 31u, 33u, 1024u}) {
      std::vector<int> out(threads * 9, 0);
      CHECK(launch(identity_kernel, LaunchConfig{9, threads}, out.data()).is_ok());
      CHECK(std::all_of(out.begin(), out.end(), [](int v) { return v == 1; }));
    }
  });
  std::vector<int> out(4, 3);
  CHECK(memset_async(out.data(), 0, 3 * sizeof(int), nullptr).is_ok());
  CHECK((out == std::vector<int>{0, 0, 0, 3}));
  EXPECT_ERROR(simt::Error, "1 to 1024 threads",
               simt::launch(identity_kernel, {1, 1025}, out.data()));
  EXPECT_ERROR(simt::Error, "grid", simt::launch(identity_kernel, {0, 32}, out.data()));
  EXPECT_ERROR(simt::Error, "outside of a kernel", (void)lane_id());
}

}  // namespace

TEST_MAIN()
