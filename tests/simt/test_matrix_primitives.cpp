// SPDX-License-Identifier: MIT
//
// cp.async, ldmatrix and mma.sync: the host models against plain loops, in every fiber order.
#include <random>
#include <vector>

#include "check.h"
#include "device/cp_async.cuh"
#include "device/launch.cuh"
#include "device/mma.cuh"
#include "device/vec.cuh"

namespace {

using namespace kimi;

constexpr uint64_t kSeeds = 16;

template <class Body>
void for_each_seed(Body body) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    simt::settings().seed = seed;
    body();
  }
}

// ---- cp.async -----------------------------------------------------------------------------------

enum Omission { kNothing, kWait, kBarrier, kReuse };

// Reverses chunks of 16 bytes through a ring of two tiles. Every third chunk is filled with zero.
__global__ void ring_kernel(const uint4* in, uint4* out, int tiles, Omission omission) {
  KIMI_SHARED(uint4, ring);
  const int n = static_cast<int>(blockDim.x), t = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int i) {
    if (i < tiles)
      cp_async16(ring + i % 2 * n + t, t % 3 == 0 ? nullptr : in + i * n + t, t % 3 != 0);
    cp_async_commit();
  };
  fetch(0);
  for (int i = 0; i < tiles; ++i) {
    fetch(i + 1);
    if (omission != kWait) cp_async_wait<1>();
    if (omission != kBarrier) __syncthreads();
    out[i * n + t] = ring[i % 2 * n + n - 1 - t];
    if (omission != kReuse) __syncthreads();
  }
  cp_async_wait<0>();
}

bool ring_is_right(Omission omission) {
  constexpr int kThreads = 64, kTiles = 5;
  std::vector<uint4> in(kThreads * kTiles), out(in.size());
  for (uint32_t i = 0; i < in.size(); ++i) in[i] = {i + 1, i + 2, i + 3, i + 4};
  CHECK(launch(ring_kernel, LaunchConfig{1, kThreads, 2 * kThreads * sizeof(uint4)}, in.data(),
               out.data(), kTiles, omission)
            .is_ok());
  for (uint32_t i = 0; i < in.size(); ++i) {
    const uint32_t t = kThreads - 1 - i % kThreads, from = i / kThreads * kThreads + t;
    const uint4 want = t % 3 == 0 ? uint4{} : in[from];
    if (out[i].x != want.x || out[i].y != want.y || out[i].z != want.z || out[i].w != want.w)
      return false;
  }
  return true;
}

TEST(asynchronous_copies) {
  for_each_seed([] { CHECK(ring_is_right(kNothing)); });
}

// Under ThreadSanitizer these kernels are races, and reported as such.
#if !defined(__SANITIZE_THREAD__)
TEST(what_asynchronous_copies_catch) {
  int wrong[4] = {};
  for_each_seed([&] {
    for (Omission omission : {kWait, kBarrier, kReuse}) wrong[omission] += !ring_is_right(omission);
  });
  CHECK(wrong[kWait] >= static_cast<int>(kSeeds) / 2);
  CHECK(wrong[kBarrier] > 0);
  CHECK(wrong[kReuse] > 0);
}
#endif

__global__ void misaligned_copy_kernel(const char* in) {
  KIMI_SHARED(char, tile);
  cp_async16(tile + 16 * threadIdx.x, in + 1, true);
  cp_async_wait<0>();
}

TEST(misaligned_copies) {
  std::vector<uint4> in(2);
  EXPECT_ERROR(
      simt::Error, "cp_async16: both addresses must be multiples of 16 bytes",
      simt::launch(misaligned_copy_kernel, {1, 32, 512}, reinterpret_cast<const char*>(in.data())));
}

// ---- ldmatrix, mma ------------------------------------------------------------------------------

// d[16][8] = c + a[16][16] b[16][8] with a [row][depth] and b [col][depth], or both transposed.
template <class T>
__global__ void product_kernel(const T* a, const T* b, const float* c, float* d, bool transposed) {
  KIMI_SHARED(T, tile);  // a, then b twice as large as is read
  const int l = lane_id(), g = l / 4, t = l % 4;
  for (int i = l; i < 256; i += 32) {
    tile[i] = a[i];
    tile[256 + i] = i < 128 ? b[i] : from_float<T>(NAN);
  }
  warp_barrier();
  uint32_t fa[4], fb[4];
  if (transposed) {  // a [depth][row], b [depth][col]
    ldmatrix_x4_transposed(fa, tile + (l % 8 + l / 16 * 8) * 16 + l / 8 % 2 * 8);
    ldmatrix_x4_transposed(fb, tile + 256 + (l % 8 + l / 8 * 8) * 8);
  } else {
    ldmatrix_x4(fa, tile + (l % 8 + l / 8 % 2 * 8) * 16 + l / 16 * 8);
    ldmatrix_x4(fb, tile + 256 + (l % 8 + l / 16 * 8) * 16 + l / 8 % 2 * 8);
  }
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  const uint32_t low[2] = {fb[0], fb[1]};
  mma_m16n8k16<T>(sum, fa, low);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

template <class T>
void compare_product(bool transposed) {
  std::mt19937 random(static_cast<unsigned>(simt::settings().seed));
  const auto value = [&] { return static_cast<float>(static_cast<int>(random() % 65) - 32) / 8; };
  std::vector<T> a(256), b(128);
  std::vector<float> c(128), d(128, -7.0f);
  for (T& v : a) v = from_float<T>(value());
  for (T& v : b) v = from_float<T>(value());
  for (float& v : c) v = value();
  CHECK(launch(product_kernel<T>, LaunchConfig{1, 32, 512 * sizeof(T)}, a.data(), b.data(),
               c.data(), d.data(), transposed)
            .is_ok());
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float want = c[i * 8 + j];
      for (int k = 0; k < 16; ++k)
        want += to_float(a[transposed ? k * 16 + i : i * 16 + k]) *
                to_float(b[transposed ? k * 8 + j : j * 16 + k]);
      CHECK(d[i * 8 + j] == want);
    }
}

TEST(products_of_matrices) {
  for_each_seed([] {
    for (bool transposed : {false, true}) {
      compare_product<bf16>(transposed);
      compare_product<fp16>(transposed);
    }
  });
}

__global__ void misaligned_matrix_kernel() {
  KIMI_SHARED(char, tile);
  uint32_t r[4];
  ldmatrix_x4(r, tile + 16 * threadIdx.x + (threadIdx.x == 5 ? 2 : 0));
}

TEST(misaligned_matrices) {
  EXPECT_ERROR(simt::Error, "multiple of 16 bytes",
               simt::launch(misaligned_matrix_kernel, {1, 32, 1024}));
}

}  // namespace

TEST_MAIN()
