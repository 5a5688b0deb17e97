// SPDX-License-Identifier: MIT
// What large tensors ask of caches and pages.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kimi::cpu {

// Output beyond this is written around the cache: it would be evicted before it is read, and the
// processor need not fetch lines that are overwritten whole.
constexpr int64_t kStreamBytes = 32 << 20;

// A fresh tensor of 500 MB takes 115 000 page faults of 4 KiB, more time than a wgrad computes.
// Only whole pages of 2 MiB inside of the memory are asked for; a refusal changes nothing.
void advise_huge_pages(void* memory, size_t bytes);

}  // namespace kimi::cpu
