// SPDX-License-Identifier: MIT
// Strides of params that were zero-initialised and then forgotten.
#pragma once

#include <initializer_list>

#include "common/status.h"

namespace kimi {

struct Extent {
  int64_t size, stride;
};

// Refuses a tensor of several elements all at one place: strides that nobody has set. One that is
// meant so (an expanded tensor) is copied before it comes here.
inline Status check_strides(const char* op, const char* name,
                            std::initializer_list<Extent> extents) {
  bool several = false, apart = false, empty = false;
  for (const auto& [size, stride] : extents) {
    empty = empty || size <= 0;
    several = several || size > 1;
    apart = apart || (size > 1 && stride != 0);
  }
  if (empty || !several || apart) return Status::ok();
  return invalid(op, ": ", name, ": expected the distance between its elements, got 0; ",
                 "set it (dense rows are as far apart as they are long)");
}

}  // namespace kimi
