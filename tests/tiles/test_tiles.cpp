// SPDX-License-Identifier: MIT
// The model of the AMX tiles: shapes, order of sums, rounding, flushing, faults; and, on a machine
// that has AMX, the instruction beside it, bit for bit.
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "common/dtype.h"
#include "cpu/features.h"
#include "tiles.h"

void machine_dot(const float* c, const void* a, const void* b, float* sum);

namespace {

using kimi::bf16;
using kimi::bits_of;
using kimi::float_of;
using kimi::from_float;

// Sums in tile 0, [m][n]; A in tile 4, [m][k pairs]; B in tile 6, [k pairs][n].
std::vector<unsigned char> config(int m, int k, int n) {
  std::vector<unsigned char> bytes(64);
  const auto shape = [&](int tile, int rows, int words) {
    bytes[48 + tile] = static_cast<unsigned char>(rows);
    bytes[16 + 2 * tile] = static_cast<unsigned char>(4 * words);
  };
  bytes[0] = 1;
  shape(0, m, n);
  shape(4, m, k);
  shape(6, k, n);
  return bytes;
}

struct Random {
  uint64_t state;
  uint32_t operator()() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 32);
  }
};

// One sum of pairs (a[2k], a[2k+1]) by (b[2k], b[2k+1]) on c.
float dot_of(float c, const std::vector<float>& a, const std::vector<float>& b) {
  const int pairs = int(a.size()) / 2;
  std::vector<bf16> x(a.size()), y(b.size());
  for (size_t i = 0; i < a.size(); ++i)
    x[i] = from_float<bf16>(a[i]), y[i] = from_float<bf16>(b[i]);
  tiles::load_config(config(1, pairs, 1).data());
  tiles::load(0, &c, 64);
  tiles::load(4, x.data(), 64);
  tiles::load(6, y.data(), 4);
  tiles::dot_bf16(0, 4, 6);
  tiles::store(0, &c, 64);
  tiles::release();
  return c;
}

TEST(every_shape) {
  Random random{1};
  for (int i = 0; i < 200; ++i) {
    const int m = 1 + int(random() % 16), k = 1 + int(random() % 16), n = 1 + int(random() % 16);
    const int depth = 2 * k;
    // Small integers: every sum is exact. The buffers end with their last element.
    std::vector<bf16> a(m * depth), b(depth * n);
    for (bf16& x : a) x = from_float<bf16>(float(random() % 17) - 8);
    for (bf16& x : b) x = from_float<bf16>(float(random() % 17) - 8);
    std::vector<float> c(m * n, 3);
    tiles::load_config(config(m, k, n).data());
    tiles::load(0, c.data(), 4 * n);
    tiles::load(4, a.data(), 2 * depth);
    tiles::load(6, b.data(), 4 * n);
    for (int twice = 0; twice < 2; ++twice) tiles::dot_bf16(0, 4, 6);
    tiles::store(0, c.data(), 4 * n);
    tiles::release();
    for (int row = 0; row < m; ++row)
      for (int column = 0; column < n; ++column) {
        float want = 3;
        for (int d = 0; d < depth; ++d)
          want += 2 * to_float(a[row * depth + d]) * to_float(b[(d / 2 * n + column) * 2 + d % 2]);
        CHECK(c[row * n + column] == want);
      }
  }
}

TEST(even_and_odd_depths_are_summed_apart) {
  // 2^24 + 1 is no fp32: the even sum loses its ones; the odd sum 1 + 1 is kept.
  CHECK(dot_of(0, {0x1p12f, 1, 1, 1}, {0x1p12f, 1, 1, 1}) == 0x1p24f + 2);
  // In one chain the odd ones would be lost one by one.
  CHECK(dot_of(0, {0x1p12f, 1, 0, 1}, {0x1p12f, 1, 0, 1}) == 0x1p24f + 2);
  // Both are added before the old value is: 2^24 + (1 + 1).
  CHECK(dot_of(0x1p24f, {1, 1}, {1, 1}) == 0x1p24f + 2);
}

TEST(rounds_to_nearest_even) {
  CHECK(dot_of(0x1p24f, {1, 0}, {1, 0}) == 0x1p24f);
  CHECK(dot_of(0x1p24f + 2, {1, 0}, {1, 0}) == 0x1p24f + 4);
  CHECK(dot_of(0x1p24f, {1.0078125f, 0}, {1, 0}) == 0x1p24f + 2);
  CHECK(std::isinf(dot_of(0, {0x1p127f, 0x1p127f}, {1, 1})));
  CHECK(std::isnan(dot_of(0, {INFINITY, 0}, {0, 0})));
}

TEST(subnormal_numbers_are_zeros) {
  CHECK(dot_of(0, {0x1p-127f, 0}, {0x1p100f, 0}) == 0);      // an input
  CHECK(dot_of(0, {0x1p-100f, 0}, {0x1p-27f, 0}) == 0);      // a result
  CHECK(dot_of(0x1p-127f, {1, 0}, {0, 0}) == 0);             // the old value
  CHECK(dot_of(0, {0x1p-126f, 0}, {1, 0}) == 0x1p-126f);     // the smallest normal number
  CHECK(dot_of(-0x1p-126f, {0x1.8p-126f, 0}, {1, 0}) == 0);  // a difference
  CHECK(std::signbit(dot_of(0, {-0x1p-100f, 0}, {0x1p-27f, 0})) == false);  // 0 + -0
  // The old value is zero before the addition, not after it.
  CHECK(dot_of(0x1p-127f, {0x1p-126f, 0}, {1, 0}) == 0x1p-126f);
  // 2^-126 (1 - 2^-24) has 24 bits and is subnormal; 2^-126 (1 - 2^-25) rounds to 2^-126.
  CHECK(dot_of(0, {0x1p-126f, 0, -0x1p-100f, 0}, {1, 0, 0x1p-50f, 0}) == 0);
  CHECK(dot_of(0, {0x1p-126f, 0, -0x1p-100f, 0}, {1, 0, 0x1p-51f, 0}) == 0x1p-126f);
}

TEST(faults) {
  const auto error = [](const char* text, auto action) {
    tiles::load_config(config(16, 16, 16).data());
    EXPECT_ERROR(std::logic_error, text, action());
    tiles::release();
  };
  unsigned char memory[1024] = {};
  tiles::release();
  EXPECT_ERROR(std::logic_error, "this thread has no tiles", tiles::load(0, memory, 64));
  EXPECT_ERROR(std::logic_error, "this thread has no tiles", tiles::zero(0));
  error("tile 1: it has no rows", [&] { tiles::load(1, memory, 64); });
  error("tile 8: expected 0 to 7", [&] { tiles::store(8, memory, 64); });
  error("three different ones", [&] { tiles::dot_bf16(0, 4, 4); });
  const auto bad_config = [&](const char* text, int at, int value) {
    std::vector<unsigned char> bytes = config(16, 16, 16);
    bytes[size_t(at)] = static_cast<unsigned char>(value);
    error(text, [&] { tiles::load_config(bytes.data()); });
  };
  bad_config("palette 2", 0, 2);
  bad_config("reserved", 2, 1);
  bad_config("reserved", 56, 1);
  bad_config("got 17 of 64", 48, 17);
  bad_config("got 16 of 68", 16, 68);
  bad_config("got 0 of 64", 48, 0);
  for (int at : {48, 52, 54}) {  // one row less than the other two tiles need
    std::vector<unsigned char> bytes = config(16, 16, 16);
    --bytes[size_t(at)];
    error("expected [m][k] x [k][n]", [&] {
      tiles::load_config(bytes.data());
      tiles::dot_bf16(0, 4, 6);
    });
  }
}

TEST(configuration_is_stored_and_clears) {
  unsigned char stored[64], memory[1024];
  std::memset(memory, 7, sizeof memory);
  const std::vector<unsigned char> wanted = config(3, 2, 5);
  tiles::load_config(wanted.data());
  tiles::load(0, memory, 64);
  tiles::store_config(stored);
  CHECK(std::memcmp(stored, wanted.data(), 64) == 0);
  tiles::load_config(wanted.data());
  tiles::store(0, memory, 64);
  for (int i = 0; i < 1024; ++i) CHECK(memory[i] == (i < 3 * 64 && i % 64 < 20 ? 0 : 7));
  tiles::release();
  tiles::store_config(stored);
  for (unsigned char byte : stored) CHECK(byte == 0);
}

TEST(machine_agrees) {
  if (kimi::cpu::detected_isa() < KIMI_ISA_AMX) {
    std::puts("      skipped: this machine has no AMX");
    return;
  }
  Random random{2};
  for (int i = 0; i < 2000; ++i) {
    std::vector<uint16_t> a(512), b(512);
    std::vector<float> c(256), want(256), got(256);
    // Exponents close together, or anywhere but at infinity and NaN.
    const uint32_t spread = i % 2 ? 8 : 254, base = i % 2 ? 123 : 0;
    const auto number = [&] { return (random() & 0x807fffffu) | (base + random() % spread) << 23; };
    for (uint16_t& x : a) x = uint16_t(number() >> 16);
    for (uint16_t& x : b) x = uint16_t(number() >> 16);
    for (float& x : c) x = float_of(number());
    machine_dot(c.data(), a.data(), b.data(), got.data());
    tiles::load_config(config(16, 16, 16).data());
    tiles::load(0, c.data(), 64);
    tiles::load(4, a.data(), 64);
    tiles::load(6, b.data(), 64);
    tiles::dot_bf16(0, 4, 6);
    tiles::store(0, want.data(), 64);
    tiles::release();
    for (int j = 0; j < 256; ++j)
      CHECK(bits_of(got[j]) == bits_of(want[j]) || (std::isnan(got[j]) && std::isnan(want[j])));
  }
}

}  // namespace

TEST_MAIN()
