// SPDX-License-Identifier: MIT
//
// Launches that overlap: what a kernel meets before and after it has waited for the one before, and
// what the rules of device/overlap.cuh forbid.
#include <cstdlib>
#include <vector>

#include "check.h"
#include "device/launch.cuh"
#include "device/overlap.cuh"
#include "races.h"

namespace {

using namespace kimi;

constexpr int kBlocks = 5, kThreads = 64, kValues = kBlocks * kThreads;

struct Launch {
  const int32_t* in;   // of the kernel before
  int32_t* out;        // [kValues]: in + 1
  const int32_t* old;  // older than the kernel before, added
  int32_t* early;      // [kValues]: what `in` holds before the wait; NULL: not looked at
};

// Value i goes to a place of another block: no thread reads what it wrote itself.
__device__ int place() {
  return (static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) + kThreads) % kValues;
}

__global__ void link_kernel(Launch p) {
  const int i = place();
  const int32_t old = p.old == nullptr ? 0 : load_older(p.old + i);
  if (p.early != nullptr) p.early[i] = p.in[kValues - 1 - i];
  wait_for_previous();
  let_next_start();
  p.out[i] = p.in[kValues - 1 - i] + 1 + old;
}
__global__ void does_not_wait_kernel(int32_t* out) { out[place()] = 0; }
__global__ void lets_start_first_kernel(int32_t* out) {
  let_next_start();
  wait_for_previous();
  out[place()] = 0;
}
__global__ void overwrites_early_kernel(int32_t* out) {
  out[place()] = -100;
  wait_for_previous();
}

LaunchConfig config_of(bool overlaps) {
  LaunchConfig config{kBlocks, kThreads};
  config.overlaps = overlaps;
  return config;
}

// All blocks are live at once: the last of one kernel meet all of the next.
template <class Body>
void for_each_seed(Body body) {
  simt::settings().resident_blocks = kBlocks;
  for (uint64_t seed = 0; seed < 12; ++seed) {
    simt::settings().seed = seed;
    body();
  }
}

struct Chain {
  std::vector<int32_t> a = std::vector<int32_t>(kValues, 0), b = std::vector<int32_t>(kValues, -1),
                       c = b, d = b, early = b;

  void run(bool overlaps, bool looks_early) {
    simt::overlapped([&] {
      const auto link = [&](const Launch& p) {
        CHECK(launch(link_kernel, config_of(overlaps), p).is_ok());
      };
      link({a.data(), b.data(), nullptr, nullptr});
      link({b.data(), c.data(), a.data(), nullptr});
      link({c.data(), d.data(), b.data(), looks_early ? early.data() : nullptr});
    });
  }

  // The second kernel writes what the first one reads.
  void overwrite() {
    simt::overlapped([&] {
      const Launch p{a.data(), b.data(), nullptr, nullptr};
      CHECK(launch(link_kernel, config_of(true), p).is_ok());
      CHECK(launch(overwrites_early_kernel, config_of(true), a.data()).is_ok());
    });
  }
};

TEST(a_chain_gives_what_it_gives_without_overlap) {
  for_each_seed([] {
    for (bool overlaps : {false, true}) {
      Chain chain;
      chain.run(overlaps, false);
      for (int i = 0; i < kValues; ++i) CHECK(chain.d[i] == 4);
    }
  });
}

#if !defined(__SANITIZE_THREAD__)

// The model would be blind otherwise.
TEST(before_its_wait_a_kernel_meets_what_is_not_written_yet) {
  for_each_seed([] {
    Chain chain;
    chain.run(true, true);
    int unwritten = 0;
    for (int32_t value : chain.early) unwritten += value == -1;
    CHECK(unwritten > 0);
    Chain serial;
    serial.run(false, true);
    for (int32_t value : serial.early) CHECK(value == 2);
  });
}

TEST(before_its_wait_a_kernel_overwrites_what_is_not_read_yet) {
  bool damaged = false;
  for_each_seed([&] {
    Chain chain;
    chain.overwrite();
    for (int32_t value : chain.b) damaged |= value != 1;
  });
  CHECK(damaged);
}

#else

TEST(the_sanitizer_reports_what_comes_before_the_wait) {
  CHECK(!races([] { Chain().run(true, false); }));
  CHECK(races([] { Chain().run(true, true); }));
  CHECK(races([] { Chain().overwrite(); }));
}

#endif

TEST(the_host_waits_before_it_goes_to_memory_itself) {
  Chain chain;
  simt::overlapped([&] {
    const Launch p{chain.a.data(), chain.b.data(), nullptr, nullptr};
    CHECK(launch(link_kernel, config_of(true), p).is_ok());
    CHECK(memset_async(chain.a.data(), 1, 4, nullptr).is_ok());
  });
  for (int32_t value : chain.b) CHECK(value == 1);
}

TEST(rules) {
  std::vector<int32_t> out(kValues);
  for_each_seed([&] {
    EXPECT_ERROR(simt::Error, "ended without waiting",
                 (void)launch(does_not_wait_kernel, config_of(true), out.data()));
    EXPECT_ERROR(simt::Error, "expected wait_for_previous first",
                 (void)launch(lets_start_first_kernel, config_of(true), out.data()));
    CHECK(launch(does_not_wait_kernel, config_of(false), out.data()).is_ok());
    CHECK(launch(lets_start_first_kernel, config_of(false), out.data()).is_ok());
  });
}

// Runs the tests of that name in another process.
bool passes(const char* test, const char* overlap) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    setenv("KIMI_OPS_OVERLAP", overlap, 1);
    if (!freopen("/dev/null", "w", stdout)) _exit(2);
    execl("/proc/self/exe", "simt_test_overlap", test, nullptr);
    _exit(2);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST(environment_switches_the_overlap_off) {
  if (std::getenv("KIMI_OPS_OVERLAP") != nullptr) return;
  CHECK(passes("rules", "1"));
  CHECK(passes("rules", "yes"));
  CHECK(!passes("rules", "0"));  // no kernel is launched to overlap, so none breaks a rule
}

}  // namespace

TEST_MAIN()
