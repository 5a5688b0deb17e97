// SPDX-License-Identifier: MIT
//
// Broken kernels: each mistake must be caught, and the text must say where.
#include <vector>

#include "check.h"
#include "device/barrier.cuh"
#include "device/mbarrier.cuh"
#include "device/warp.cuh"
#include "races.h"

namespace {

using namespace kimi;

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

// ---- a missing barrier gives a wrong result for some seeds --------------------------------------

enum Omission { kNothing, kAfterStore, kBeforeReuse, kWarpBarrier };

// Reverses two tiles through the same shared memory.
__global__ void reverse_kernel(const int* in, int* out, Omission omission) {
  KIMI_SHARED(int, tile);
  const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  for (int i = 0; i < 2; ++i) {
    if (i > 0 && omission != kBeforeReuse) __syncthreads();
    tile[t] = in[i * n + t];
    if (omission != kAfterStore) __syncthreads();
    out[i * n + t] = tile[n - 1 - t];
  }
}

// Reverses within a warp, twice.
__global__ void reverse_warp_kernel(const int* in, int* out, Omission omission) {
  KIMI_SHARED(int, tile);
  const int t = static_cast<int>(threadIdx.x), partner = t ^ 31, n = static_cast<int>(blockDim.x);
  for (int i = 0; i < 2; ++i) {
    if (i > 0) warp_barrier();
    tile[t] = in[i * n + t];
    if (omission != kWarpBarrier) warp_barrier();
    out[i * n + t] = tile[partner];
  }
}

// The seeds below 40 for which the result is wrong.
std::vector<uint64_t> wrong_seeds(void (*kernel)(const int*, int*, Omission), Omission omission) {
  constexpr int kThreads = 128;
  std::vector<int> in(2 * kThreads), out(2 * kThreads);
  for (int i = 0; i < 2 * kThreads; ++i) in[i] = i + 1;
  const bool within_warps = kernel == reverse_warp_kernel;
  std::vector<uint64_t> wrong;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    simt::settings().seed = seed;
    simt::launch(kernel, {1, kThreads, kThreads * sizeof(int)}, in.data(), out.data(), omission);
    bool right = true;
    for (int i = 0; i < 2 * kThreads; ++i)
      right &= out[i] == in[i ^ (within_warps ? 31 : kThreads - 1)];
    if (!right) wrong.push_back(seed);
  }
  std::printf("      wrong for %zu of 40 seeds, first: %s\n", wrong.size(),
              wrong.empty() ? "none" : std::to_string(wrong[0]).c_str());
  return wrong;
}

#if defined(__SANITIZE_THREAD__)

bool races(void (*kernel)(const int*, int*, Omission), Omission omission, uint64_t seed) {
  return ::races([=] {
    std::vector<int> in(256), out(256);
    simt::settings().seed = seed;
    simt::launch(kernel, {1, 128, 128 * sizeof(int)}, in.data(), out.data(), omission);
  });
}

TEST(missing_barriers_are_races_for_every_seed) {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    CHECK(!races(reverse_kernel, kNothing, seed));
    CHECK(races(reverse_kernel, kAfterStore, seed));
    CHECK(races(reverse_kernel, kBeforeReuse, seed));
    CHECK(!races(reverse_warp_kernel, kNothing, seed));
    CHECK(races(reverse_warp_kernel, kWarpBarrier, seed));
  }
}

#else

TEST(missing_block_barrier_gives_a_wrong_result) {
  CHECK(wrong_seeds(reverse_kernel, kNothing).empty());
  CHECK(wrong_seeds(reverse_kernel, kAfterStore).size() == 40);
  CHECK(!wrong_seeds(reverse_kernel, kBeforeReuse).empty());
}

TEST(missing_warp_barrier_gives_a_wrong_result) {
  CHECK(wrong_seeds(reverse_warp_kernel, kNothing).empty());
  CHECK(wrong_seeds(reverse_warp_kernel, kWarpBarrier).size() == 40);
}

#endif

// ---- shared memory ------------------------------------------------------------------------------

__global__ void overflow_kernel(int dynamic_at, int static_at) {
  KIMI_SHARED(char, bytes);
  KIMI_STATIC_SHARED(char, fixed, 8);
  if (threadIdx.x == 3) {
    const_cast<volatile char*>(bytes)[dynamic_at] = 1;
    const_cast<volatile char*>(fixed)[static_at] = 1;
  }
}

// Under AddressSanitizer the first bad byte ends the process; elsewhere the canary speaks when the
// block ends.
void expect_overflow(int dynamic_at, int static_at, const char* text) {
  const auto run = [=] { simt::launch(overflow_kernel, {4, 32, 20}, dynamic_at, static_at); };
#if defined(__SANITIZE_ADDRESS__)
  (void)text;
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    if (!freopen("/dev/null", "w", stderr)) _exit(2);
    run();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(!(WIFEXITED(status) && WEXITSTATUS(status) == 0));
#else
  CHECK(contains(EXPECT_ERROR(simt::Error, text, run()), "block ("));
#endif
}

TEST(overflow_of_shared_memory_by_one_byte) {
  simt::launch(overflow_kernel, {4, 32, 20}, 19, 7);
  expect_overflow(20, 7, "dynamic shared memory of 20 bytes: written 0 bytes past the end");
  expect_overflow(19, 8, "static shared memory of 8 bytes: written 0 bytes past the end");
#if !defined(__SANITIZE_ADDRESS__)
  expect_overflow(-1, 0, "written 1 bytes before the start");
#endif
}

// ---- barriers that not all threads reach --------------------------------------------------------

__global__ void early_exit_kernel() {
  if (threadIdx.x >= 40) return;
  __syncthreads();
}
__global__ void two_barriers_kernel() {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void different_ids_kernel() { named_barrier_sync(threadIdx.x < 32 ? 1 : 2, 64); }
__global__ void barrier_against_vote_kernel() {
  if (threadIdx.x == 7)
    __syncthreads();
  else
    warp_ballot(true);
}

TEST(divergent_barriers) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    simt::settings().seed = seed;
    EXPECT_ERROR(simt::Error, "divergent barrier", simt::launch(early_exit_kernel, {2, 64}));
    EXPECT_ERROR(simt::Error, "divergent barrier", simt::launch(two_barriers_kernel, {2, 64}));
    std::string text =
        EXPECT_ERROR(simt::Error, "deadlock", simt::launch(different_ids_kernel, {1, 64}));
    CHECK(contains(text, "threads 0-31: wait for named_barrier_sync at test_faults.cpp") &&
          contains(text, "(barrier 1: 32 of 64 threads are there)") &&
          contains(text, "threads 32-63:"));
    text =
        EXPECT_ERROR(simt::Error, "deadlock", simt::launch(barrier_against_vote_kernel, {1, 32}));
    CHECK(contains(text, "thread 7: wait for __syncthreads at test_faults.cpp") &&
          contains(text, "threads 0-6, 8-31: wait for __ballot_sync at warp.cuh") &&
          contains(text, "lane 7 are missing"));
  }
}

// ---- warp operations ----------------------------------------------------------------------------

__global__ void exited_lane_kernel() {
  if (lane_id() == 9) return;
  warp_ballot(true);
}
__global__ void caller_outside_mask_kernel() { __ballot_sync(0xffffu, 1); }
__global__ void source_outside_mask_kernel() {
  if (lane_id() < 16) __shfl_sync(0xffffu, 1, 20);
}
__global__ void different_masks_kernel() { __ballot_sync(lane_id() == 0 ? 0x3u : 0xffffffffu, 1); }

TEST(misused_warp_operations) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    simt::settings().seed = seed;
    CHECK(contains(EXPECT_ERROR(simt::Error, "exited", simt::launch(exited_lane_kernel, {1, 32})),
                   "9"));
    EXPECT_ERROR(simt::Error, "this warp of 16 threads does not have",
                 simt::launch(exited_lane_kernel, {1, 16}));
    EXPECT_ERROR(simt::Error, "and not the calling lane",
                 simt::launch(caller_outside_mask_kernel, {1, 32}));
    EXPECT_ERROR(simt::Error, "reads lane 20", simt::launch(source_outside_mask_kernel, {1, 32}));
    EXPECT_ERROR(simt::Error, "deadlock", simt::launch(different_masks_kernel, {1, 32}));
  }
}

// ---- mbarrier -----------------------------------------------------------------------------------

enum Mistake { kRight, kWrongPhase, kOverArrival, kNotInitialised, kBytesMissing };

// Thread 0 hands a number to all others through a one-element tile: [0] says it is empty, [1] that
// it is full.
__global__ void hand_over_kernel(Mistake mistake, int* out) {
  KIMI_STATIC_SHARED(MBarrier, barriers, 2);
  KIMI_STATIC_SHARED(int, tile, 1);
  if (threadIdx.x == 0 && mistake != kNotInitialised) {
    mbarrier_init(barriers[0], blockDim.x - 1);
    mbarrier_init(barriers[1], 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_wait(barriers[0], mistake == kWrongPhase ? 0 : 1);
    tile[0] = 42;
    mbarrier_arrive_expect_tx(barriers[1], 16);
    if (mistake == kOverArrival) mbarrier_arrive(barriers[1]);
    if (mistake != kBytesMissing) mbarrier_complete_tx(barriers[1], 16);
  } else {
    mbarrier_wait(barriers[1], 0);
    out[threadIdx.x] = tile[0];
    mbarrier_arrive(barriers[0]);
  }
}

TEST(misused_mbarriers) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    simt::settings().seed = seed;
    std::vector<int> out(64);
    const auto run = [&](Mistake mistake) {
      simt::launch(hand_over_kernel, {1, 64}, mistake, out.data());
    };
    run(kRight);
    for (int i = 1; i < 64; ++i) CHECK(out[i] == 42);
    std::string text = EXPECT_ERROR(simt::Error, "deadlock", run(kWrongPhase));
    CHECK(contains(
        text,
        "thread 0: wait for mbarrier at static shared + 0, phase of parity 0 to complete (it is in "
        "phase 0, 63 of 63 arrivals and 0 bytes pending) at test_faults.cpp"));
    CHECK(contains(text, "threads 1-63: wait for mbarrier at static shared + 8"));
    EXPECT_ERROR(simt::Error, "over-arrival", run(kOverArrival));
    EXPECT_ERROR(simt::Error, "has not been initialised", run(kNotInitialised));
    text = EXPECT_ERROR(simt::Error, "deadlock", run(kBytesMissing));
    CHECK(contains(text, "threads 1-63: wait for mbarrier") && contains(text, "16 bytes pending") &&
          contains(text, "thread 0: exited"));
  }
}

// ---- after a failed launch ----------------------------------------------------------------------

__global__ void throwing_kernel(int* done) {
  struct Cleanup {
    int* done;
    ~Cleanup() { __atomic_fetch_add(done, 1, __ATOMIC_RELAXED); }
  } cleanup{done};
  __syncthreads();
  if (threadIdx.x == 5) throw std::runtime_error("from the kernel");
  __syncthreads();
}

TEST(an_error_unwinds_every_started_thread_and_the_next_launch_works) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    simt::settings().seed = seed;
    int done = 0;
    EXPECT_ERROR(std::runtime_error, "from the kernel",
                 simt::launch(throwing_kernel, {1, 64}, &done));
    CHECK(done == 64);
    CHECK(wrong_seeds(reverse_warp_kernel, kNothing).empty());
  }
}

}  // namespace

TEST_MAIN()
