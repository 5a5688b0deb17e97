// SPDX-License-Identifier: MIT
// cpuid says what the processor can do, XCR0 which register state the operating system saves, and
// Linux must grant the 8 KiB tile state of AMX before its first use.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/features.h"

namespace kimi::cpu {
namespace {

struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Leaf(unsigned leaf, unsigned subleaf) {
    __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx);
  }
};

constexpr bool has(unsigned word, unsigned bits) { return (word & bits) == bits; }

bool kernel_grants_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

kimi_isa probe_x86() {
  const Leaf one(1, 0), seven(7, 0), seven_one(7, 1);
  if (!has(one.ecx, bit_OSXSAVE)) return KIMI_ISA_PORTABLE;
  const unsigned long long state = _xgetbv(0);
  const bool ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6;
  const bool tiles = (state & 0x60000) == 0x60000;
  if (!ymm || !has(one.ecx, bit_FMA | bit_F16C) || !has(seven.ebx, bit_AVX2 | bit_BMI2))
    return KIMI_ISA_PORTABLE;
  constexpr unsigned kAvx512 =
      bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ | bit_AVX512CD;
  if (!zmm || !has(seven.ebx, kAvx512)) return KIMI_ISA_AVX2;
  constexpr unsigned kAmx = (1u << 24) | (1u << 22);  // edx: AMX-TILE, AMX-BF16
  constexpr unsigned kAvx512Bf16 = 1u << 5;           // leaf 7.1 eax
  // Every processor with products of bf16 pairs but Cooper Lake has look-ups of 128 bytes too.
  if (!has(seven_one.eax, kAvx512Bf16) || !has(seven.ecx, bit_AVX512VBMI)) return KIMI_ISA_AVX512;
#if defined(KIMI_HOST_TILES)
  return KIMI_ISA_AMX;  // the model of the tiles (tests/tiles) needs no more than this
#endif
  if (!tiles || !has(seven.edx, kAmx)) return KIMI_ISA_AVX512_BF16;
  return kernel_grants_tiles() ? KIMI_ISA_AMX : KIMI_ISA_AVX512_BF16;
}

}  // namespace kimi::cpu
