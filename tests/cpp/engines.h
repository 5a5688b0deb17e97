// SPDX-License-Identifier: MIT
// What tests of CPU ops share: every instruction set and number of threads, tensors of any dtype in
// buffers of exactly their bytes (AddressSanitizer watches), and the count of failures.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "common/dtype.h"
#include "kimi_ops.h"

namespace kimi::test {

inline int failures = 0;

template <class... Parts>
void check(bool ok, const char* format, Parts... parts) {
  if (ok) return;
  ++failures;
  std::fprintf(stderr, "%s, %d threads: ", kimi_isa_name(kimi_current_isa()), kimi_num_threads());
  std::fprintf(stderr, format, parts...);
  std::fprintf(stderr, " (%s)\n", kimi_last_error());
}

inline int report(const char* name) {
  if (failures == 0) std::printf("%s: all passed\n", name);
  return failures == 0 ? 0 : 1;
}

// body() for every instruction set of this machine and several numbers of threads.
template <class Body>
void each_engine(const Body& body) {
  for (int isa = KIMI_ISA_PORTABLE; isa <= kimi_detected_isa(); ++isa)
    for (int threads : {1, 2, 5}) {
      check(kimi_set_isa(kimi_isa(isa)) == KIMI_OK, "set_isa");
      check(kimi_set_num_threads(threads) == KIMI_OK, "set_num_threads");
      body();
    }
}

// 64-byte aligned, and not a byte longer than asked for.
struct Buffer {
  explicit Buffer(size_t bytes) : size(bytes) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, bytes ? bytes : 1)) std::abort();
    data.reset(static_cast<char*>(p));
    std::memset(p, 0x7f, bytes);
  }
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data;
  size_t size;
};

// What an op of the C API asks for, given to it.
struct Workspace : Buffer {
  template <class Params>
  Workspace(Params& p, size_t (*bytes)(const Params*, kimi_device))
      : Buffer(bytes(&p, KIMI_DEVICE_CPU)) {
    p.workspace = data.get();
    p.workspace_bytes = size;
  }
};

struct Tensor : Buffer {
  kimi_dtype dtype;

  Tensor(int64_t n, kimi_dtype type)
      : Buffer(size_t(n) * (type == KIMI_FLOAT32 ? 4 : 2)), dtype(type) {}
  void* at(int64_t i) const { return data.get() + i * (dtype == KIMI_FLOAT32 ? 4 : 2); }
  double get(int64_t i) const {
    return kimi::dispatch(
        dtype, [&]<class T>() { return double(kimi::to_float(*static_cast<const T*>(at(i)))); });
  }
  void set(int64_t i, double x) const {
    kimi::dispatch(dtype,
                   [&]<class T>() { *static_cast<T*>(at(i)) = kimi::from_float<T>(float(x)); });
  }
  bool same_bits(const Tensor& other) const {
    return size == other.size && std::memcmp(data.get(), other.data.get(), size) == 0;
  }
};

// A sequence without pattern; equal for equal seeds.
struct Random {
  uint32_t state;
  explicit Random(uint32_t seed) : state(seed * 2654435761u + 1) {}
  uint32_t next() {
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return state;
  }
  int small() { return int(next() % 7) - 3; }                      // -3 .. 3
  double unit() { return double(next()) / 4294967296.0 * 2 - 1; }  // -1 .. 1
};

}  // namespace kimi::test
