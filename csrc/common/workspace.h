// SPDX-License-Identifier: MIT
// A workspace, handed out piece by piece.
#pragma once

#include "common/integer.h"
#include "common/volume.h"

namespace kimi {

// The pieces follow each other, aligned as the workspace is. Without memory they are only counted:
// the constructor that takes an op's pieces also says how many bytes the op asks for.
class Pieces {
 public:
  explicit Pieces(void* memory, int64_t align = 64)
      : memory_(static_cast<char*>(memory)), align_(align) {}

  // As many T as the product of the sizes; nobody has memory for kTooMany bytes of them.
  template <class T = char, class... Sizes>
  T* take(Sizes... sizes) {
    char* piece = memory_ ? memory_ + bytes_ : nullptr;
    const int64_t bytes = volume(sizes..., sizeof(T)), room = kTooMany - bytes_;
    bytes_ += bytes > room - align_ ? room : round_up(bytes, align_);
    return reinterpret_cast<T*>(piece);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t align_, bytes_ = 0;
};

}  // namespace kimi
