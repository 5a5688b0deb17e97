// SPDX-License-Identifier: MIT
#include "gemm/cpu/block.h"

#include "cpu/engines.h"
#include "gemm/cpu/block_element.h"

namespace kimi::cpu {
namespace {

constexpr CpuEngines<BlockEngine> kFloatEngines = {
    {&kPortableBlocks, KIMI_X86(kAvx2Blocks), KIMI_X86(kAvx512Blocks)}};
constexpr CpuEngines<BlockEngine> kBf16Engines = {
    {&kPortableBlocks, KIMI_X86(kAvx2Blocks), KIMI_X86(kAvx512Blocks), KIMI_X86(kAvx512Bf16Blocks),
     KIMI_X86(kAmxBlocks)}};

}  // namespace

float element(const Operand& x, int64_t row, int64_t depth) { return read_element(x, row, depth); }

const BlockEngine& block_engine(kimi_dtype dtype) {
  return dtype == KIMI_BFLOAT16 ? kBf16Engines.best() : kFloatEngines.best();
}
kimi_isa block_engine_isa() { return kBf16Engines.isa(); }

}  // namespace kimi::cpu
