// SPDX-License-Identifier: MIT
// The engines of an op by instruction set, chosen at run time.
#pragma once

#include "cpu/features.h"

// KIMI_X86(engine): the engine's address where its file is part of the build, else nullptr.
#if defined(KIMI_OPS_X86)
#define KIMI_X86(engine) (&(engine))
#else
#define KIMI_X86(engine) nullptr
#endif

// In an op's header: the engines that <op>_portable.cpp, _avx2.cpp and _avx512.cpp define, and the
// table of them, kEngines.
#define KIMI_CPU_ENGINES(Engine)                                   \
  extern const Engine kPortableEngine, kAvx2Engine, kAvx512Engine; \
  inline constexpr ::kimi::CpuEngines<Engine> kEngines = {         \
      {&kPortableEngine, KIMI_X86(kAvx2Engine), KIMI_X86(kAvx512Engine)}}

namespace kimi {

template <class Engine>
struct CpuEngines {
  // portable, avx2, avx512, avx512_bf16, amx; nullptr: the next weaker one serves
  const Engine* by_isa[5];

  kimi_isa isa() const {
    int isa = cpu::current_isa();
    while (isa > KIMI_ISA_PORTABLE && !by_isa[isa]) --isa;
    return kimi_isa(isa);
  }
  const Engine& best() const { return *by_isa[isa()]; }
};

}  // namespace kimi
