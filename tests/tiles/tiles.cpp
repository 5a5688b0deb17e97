// SPDX-License-Identifier: MIT
#include "tiles.h"

#include <cmath>
#include <cstring>
#include <sstream>
#include <stdexcept>

namespace tiles {
namespace {

// Bytes outside of the configured shape stay zeros: only load_config changes the shape, and clears.
struct Register {
  int rows = 0, row_bytes = 0;
  unsigned char bytes[kMaxRows][kMaxRowBytes] = {};
};
struct State {
  unsigned char config[64] = {};
  Register registers[kRegisters];
  int64_t dots = 0;
};
thread_local State state;

template <class... Parts>
[[noreturn]] void fault(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::logic_error(std::move(text).str());
}

Register& configured(const char* what, int tile) {
  if (tile < 0 || tile >= kRegisters) fault(what, ": tile ", tile, ": expected 0 to 7");
  Register& r = state.registers[tile];
  if (state.config[0] == 0)
    fault(what, ": tile ", tile, ": this thread has no tiles: configure them first");
  if (r.rows == 0) fault(what, ": tile ", tile, ": it has no rows in the configuration");
  return r;
}

constexpr double kSmallest = 0x1p-126;  // the smallest normal fp32

// To fp32, nearest even; what is subnormal after rounding (to 24 bits, whatever the exponent)
// becomes zero. The double holds a sum of two fp32, or of one and a product of two bf16: its own
// rounding does not show after the second one (53 >= 2 * 24 + 2 bits).
float round_and_flush(double x) {
  if (std::fabs(x) < kSmallest * (1 - 0x1p-25)) return std::copysign(0.0f, float(x));
  return float(x);
}
double flushed(float x) { return std::fabs(x) < float(kSmallest) ? std::copysign(0.0f, x) : x; }

float at(const Register& r, int row, int word) {
  float value;
  std::memcpy(&value, &r.bytes[row][4 * word], 4);
  return value;
}
// Half 0 or 1 of a 32-bit word, a bf16.
double bf16_at(const Register& r, int row, int word, int half) {
  uint32_t bits;
  std::memcpy(&bits, &r.bytes[row][4 * word], 4);
  bits = half ? bits & 0xffff0000u : bits << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return flushed(value);
}

}  // namespace

void load_config(const void* config) {
  unsigned char bytes[64];
  std::memcpy(bytes, config, 64);
  if (bytes[0] == 0) return release();
  if (bytes[0] != 1) fault("load_config: palette ", int(bytes[0]), ": expected 0 or 1");
  for (int i = 2; i < 64; ++i)
    if ((i < 16 || (i >= 32 && i < 48) || i >= 56) && bytes[i])
      fault("load_config: byte ", i, ": reserved, expected 0, got ", int(bytes[i]));
  for (int tile = 0; tile < kRegisters; ++tile) {
    const int row_bytes = bytes[16 + 2 * tile] | bytes[17 + 2 * tile] << 8, rows = bytes[48 + tile];
    if (row_bytes > kMaxRowBytes || rows > kMaxRows || (row_bytes == 0) != (rows == 0))
      fault("load_config: tile ", tile, ": expected up to 16 rows of 64 bytes or none, got ", rows,
            " of ", row_bytes);
    state.registers[tile] = {rows, row_bytes, {}};
  }
  std::memcpy(state.config, bytes, 64);
}

void store_config(void* config) { std::memcpy(config, state.config, 64); }

void release() {
  std::memset(state.config, 0, 64);
  for (Register& r : state.registers) r = {};
}

void zero(int tile) {
  Register& r = configured("zero", tile);
  std::memset(r.bytes, 0, sizeof r.bytes);
}

void load(int tile, const void* from, int64_t stride) {
  Register& r = configured("load", tile);
  for (int i = 0; i < r.rows; ++i)
    std::memcpy(r.bytes[i], static_cast<const char*>(from) + i * stride, size_t(r.row_bytes));
}

void store(int tile, void* to, int64_t stride) {
  const Register& r = configured("store", tile);
  for (int i = 0; i < r.rows; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, r.bytes[i], size_t(r.row_bytes));
}

// Even and odd depths are summed apart, from zero; the two sums are added, then the old value.
void dot_bf16(int sum, int a, int b) {
  if (sum == a || sum == b || a == b)
    fault("dot_bf16: tiles ", sum, ", ", a, ", ", b, ": expected three different ones");
  Register& c = configured("dot_bf16", sum);
  const Register &x = configured("dot_bf16", a), &y = configured("dot_bf16", b);
  if (x.row_bytes % 4 || c.row_bytes % 4 || x.rows != c.rows || y.row_bytes != c.row_bytes ||
      x.row_bytes / 4 != y.rows)
    fault("dot_bf16: expected [m][k] x [k][n] of 4-byte words into [m][n], got [", x.rows, "][",
          x.row_bytes, " bytes] x [", y.rows, "][", y.row_bytes, " bytes] into [", c.rows, "][",
          c.row_bytes, " bytes]");
  const int pairs = y.rows, columns = c.row_bytes / 4;
  double left[kMaxRows][2], right[kMaxRows][2][kMaxRowBytes / 4];
  for (int k = 0; k < pairs; ++k)
    for (int half = 0; half < 2; ++half)
      for (int n = 0; n < columns; ++n) right[k][half][n] = bf16_at(y, k, n, half);
  for (int m = 0; m < c.rows; ++m) {
    for (int k = 0; k < pairs; ++k)
      for (int half = 0; half < 2; ++half) left[k][half] = bf16_at(x, m, k, half);
    float sums[2][kMaxRowBytes / 4] = {};
    for (int k = 0; k < pairs; ++k)
      for (int half = 0; half < 2; ++half)
        for (int n = 0; n < columns; ++n)
          sums[half][n] = round_and_flush(left[k][half] * right[k][half][n] + sums[half][n]);
    for (int n = 0; n < columns; ++n) {
      const float both = round_and_flush(double(sums[0][n]) + sums[1][n]);
      const float value = round_and_flush(flushed(at(c, m, n)) + both);
      std::memcpy(&c.bytes[m][4 * n], &value, 4);
    }
  }
  ++state.dots;
}

int64_t dots() { return state.dots; }

}  // namespace tiles
