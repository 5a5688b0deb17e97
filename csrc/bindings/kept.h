// SPDX-License-Identifier: MIT
// Memory of large CPU tensors, used again: a block of the framework's allocator is kept when the
// tensor on it is gone and given to the next one of about its size. The pages of new memory cost
// several times what writing them does, and more where the kernel has to find them first.
//
// In use and kept together are never more than was in use at one time, and the kernel may take the
// pages of a kept block whenever it is short of memory.
#pragma once

#include <cstdint>
#include <functional>

#include "bindings/dlpack.h"

namespace kimi::bindings {

constexpr int64_t kKeptFrom = 8 << 20;  // bytes; smaller tensors are reused by the allocator

// A dense tensor of `bytes` on a kept block, else on one of allocate(bytes), asked for huge pages.
dlpack::ManagedVersioned* take_kept(
    dlpack::DataType type, int ndim, const int64_t* sizes, int64_t bytes,
    const std::function<dlpack::ManagedVersioned*(int64_t bytes)>& allocate);
// Gives back to the allocators what nobody uses: so many bytes.
int64_t release_kept();

}  // namespace kimi::bindings
