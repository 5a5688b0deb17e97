// SPDX-License-Identifier: MIT
// The iteration on one matrix, whatever its orientation in memory.
#pragma once

#include "newton_schulz/shape.h"

namespace kimi::newton_schulz_cpu {

// Bytes that the chain of one matrix works in.
size_t chain_bytes(const NewtonSchulzParams& p, const ChainShape& shape, int threads);

// x = the image of g; workspace: chain_bytes(), 64-byte aligned.
void chain(const NewtonSchulzParams& p, const ChainShape& shape, const void* g, void* x,
           char* workspace, int threads);

}  // namespace kimi::newton_schulz_cpu
