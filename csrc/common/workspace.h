// SPDX-License-Identifier: MIT
// A workspace, handed out piece by piece.
#pragma once

#include "common/integer.h"

namespace kimi {

// The pieces follow each other, aligned as the workspace is. Without memory they are only counted:
// the constructor that takes an op's pieces also says how many bytes the op asks for.
class Pieces {
 public:
  explicit Pieces(void* memory, int64_t align = 64)
      : memory_(static_cast<char*>(memory)), align_(align) {}

  template <class T = char>
  T* take(int64_t count) {
    char* piece = memory_ ? memory_ + bytes_ : nullptr;
    bytes_ += round_up(count * int64_t(sizeof(T)), align_);
    return reinterpret_cast<T*>(piece);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t align_, bytes_ = 0;
};

}  // namespace kimi
