// SPDX-License-Identifier: MIT
// What the bytes of quantised weights are, for tables. Included by engine files only.
#pragma once

#include <stdint.h>

namespace kimi::cpu {
namespace {

// What the magnitude of an e4m3 is in bf16. Below 8 there is no exponent: m * 2^-9.
constexpr uint16_t bf16_of_e4m3(int m) {
  if (m == 0x7f) return 0x7fc0;
  if (m >= 8) return uint16_t(m * 16 + 120 * 128);
  const int log2 = m >= 4 ? 2 : m >= 2 ? 1 : 0;
  return m == 0 ? 0 : uint16_t((118 + log2) * 128 + (m - (1 << log2)) * (128 >> log2));
}

constexpr uint16_t bf16_of_nibble(int nibble) {
  const int value = nibble - 8, m = value < 0 ? -value : value;
  const int log2 = m >= 8 ? 3 : m >= 4 ? 2 : m >= 2 ? 1 : 0;
  if (m == 0) return 0;
  return uint16_t((value < 0) * 0x8000 + (127 + log2) * 128 + (m - (1 << log2)) * (128 >> log2));
}

}  // namespace
}  // namespace kimi::cpu
