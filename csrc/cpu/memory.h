// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

namespace kimi::cpu {

// A fresh tensor of 500 MB takes 115 000 page faults of 4 KiB, more time than a wgrad computes.
// Only whole pages of 2 MiB inside of the memory are asked for; a refusal changes nothing.
void advise_huge_pages(void* memory, size_t bytes);

}  // namespace kimi::cpu
