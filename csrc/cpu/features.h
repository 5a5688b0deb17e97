// SPDX-License-Identifier: MIT
// Which CPU instruction sets can run here, and which one the engines take.
#pragma once

#include "common/status.h"

namespace kimi::cpu {

// The best that both the processor and the operating system offer. AMX also needs the kernel's
// permission for the tile state, which is asked for once a process.
kimi_isa detected_isa();

// detected_isa(), unless KIMI_OPS_ISA or set_isa() chose another one.
kimi_isa current_isa();
Status set_isa(kimi_isa isa);
const char* isa_name(kimi_isa isa);

// features_x86.cpp: cpuid, XCR0 and arch_prctl; other processors are portable.
kimi_isa probe_x86();

}  // namespace kimi::cpu
