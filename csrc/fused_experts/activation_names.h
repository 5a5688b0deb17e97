// SPDX-License-Identifier: MIT
// What activations are called, and the numbers that one has.
#pragma once

#include <initializer_list>
#include <vector>

#include "kimi_ops.h"

namespace kimi {

// In the order of kimi_activation.
constexpr std::initializer_list<const char*> kActivations = {"silu",      "gelu",  "situ",
                                                             "gelu_tanh", "relu2", "swiglu"};

// In the order of kimi_activation_numbers, which is that of kimi_ops.activations.
inline std::vector<float*> numbers_of(kimi_activation activation, kimi_activation_numbers& n) {
  if (activation == KIMI_ACTIVATION_SITU) return {&n.gate_bound, &n.up_bound};
  if (activation == KIMI_ACTIVATION_SWIGLU)
    return {&n.alpha, &n.shift, &n.gate_limit, &n.silu_limit, &n.up_limit};
  return {};
}

}  // namespace kimi
