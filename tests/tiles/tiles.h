// SPDX-License-Identifier: MIT
// A functional model of the AMX tile registers, for machines without them: csrc/gemm/cpu/tiles_amx.h
// calls it where KIMI_HOST_TILES is defined. Every OS thread has its own registers, as in hardware.
//
// Semantics are those of Intel's manual (volume 2: LDTILECFG, TILELOADD, TDPBF16PS). What the
// processor answers with a fault (#UD, #GP) throws std::logic_error here and says why.
#pragma once

#include <cstdint>

namespace tiles {

constexpr int kRegisters = 8, kMaxRows = 16, kMaxRowBytes = 64;

void load_config(const void* config);  // 64 bytes; palette 0 releases
void store_config(void* config);       // zeros where nothing is configured
void release();

void zero(int tile);
void load(int tile, const void* from, int64_t stride);  // stride between rows, in bytes
void store(int tile, void* to, int64_t stride);
void dot_bf16(int sum, int a, int b);

// dot_bf16 calls of this thread so far: tests count the work that an engine does.
int64_t dots();

}  // namespace tiles
