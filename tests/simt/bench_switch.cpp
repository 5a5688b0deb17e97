// SPDX-License-Identifier: MIT
//
// Nanoseconds for a bare fiber switch, a warp operation and a barrier of one thread. Built twice:
// with the assembly switch and with swapcontext.
#include <chrono>
#include <cstdio>

#include "device/platform.cuh"
#include "fiber.h"

namespace {

constexpr int kRounds = 200000;

struct Pair {
  simt::Fiber main;
  simt::Fiber other{&Pair::entry, this, 64 * 1024};
  static void entry(void* self) {
    auto& pair = *static_cast<Pair*>(self);
    for (;;) simt::Fiber::switch_to(pair.other, pair.main);
  }
};

__global__ void shuffles(int rounds, int* out) {
  int v = static_cast<int>(threadIdx.x);
  for (int i = 0; i < rounds; ++i) v = __shfl_xor_sync(~0u, v, 1);
  out[threadIdx.x] = v;
}
__global__ void barriers(int rounds) {
  for (int i = 0; i < rounds; ++i) __syncthreads();
}

template <class Work>
double nanoseconds(Work work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

int main() {
  Pair pair;
  const double bare = nanoseconds([&] {
    for (int i = 0; i < kRounds; ++i) simt::Fiber::switch_to(pair.main, pair.other);
  });
  int out[256];
  const int rounds = kRounds / 256;
  simt::launch(shuffles, {1, 256}, 1, out);
  const double warp = nanoseconds([&] { simt::launch(shuffles, {1, 256}, rounds, out); });
  const double block = nanoseconds([&] { simt::launch(barriers, {1, 256}, rounds); });
#if defined(KIMI_SIMT_UCONTEXT)
  const char* kind = "swapcontext";
#else
  const char* kind = "assembly";
#endif
  std::printf("%-12s switch %6.1f ns   shuffle %6.1f ns a thread   barrier %6.1f ns a thread\n",
              kind, bare / (2.0 * kRounds), warp / (256.0 * rounds), block / (256.0 * rounds));
}
