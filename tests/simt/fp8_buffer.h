// SPDX-License-Identifier: MIT
//
// What the tests of FP8 kernels share: memory as TMA wants it, and checks that name the seed.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "common/status.h"
#include "simt.h"

namespace fp8_tests {

inline constexpr uint8_t kCanary = 0x5a;

// Memory that 16 divides, as TMA wants it; ASan holds its end.
template <class T>
struct Buffer {
  std::vector<uint4> memory;
  explicit Buffer(int64_t n) : memory((static_cast<size_t>(n) * sizeof(T) + 15) / 16) {
    if (n > 0) std::memset(memory.data(), kCanary, memory.size() * 16);
  }
  T* data() { return reinterpret_cast<T*>(memory.data()); }
};

inline void require(bool condition, const std::string& what) {
  if (!condition)
    check::fail(__FILE__, __LINE__, what + ", seed " + std::to_string(simt::settings().seed));
}
inline void require_ok(const kimi::Status& status) {
  if (!status.is_ok()) check::fail(__FILE__, __LINE__, status.message);
}

}  // namespace fp8_tests
