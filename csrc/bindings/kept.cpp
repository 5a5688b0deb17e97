// SPDX-License-Identifier: MIT
#include "bindings/kept.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kimi_ops.h"

namespace kimi::bindings {
namespace {

// A kept block may be larger than what is asked for by one part in so many.
constexpr int64_t kSpare = 8;

struct Block {
  dlpack::ManagedVersioned* memory;  // [bytes] uint8
  int64_t bytes;
};

void* address(const Block& block) {
  return static_cast<char*>(block.memory->tensor.data) + block.memory->tensor.byte_offset;
}

// What is written from now on is kept again. Whole pages of 2 MiB only: others would be split.
void lend_to_kernel([[maybe_unused]] const Block& block) {
#if defined(__linux__) && defined(MADV_FREE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t data = reinterpret_cast<uintptr_t>(address(block));
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage;
  const uintptr_t end = (data + uintptr_t(block.bytes)) / kPage * kPage;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_FREE);
#endif
}

class Kept {
 public:
  // The smallest block that fits, or one without memory.
  Block take(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    auto best = idle_.end();
    for (auto b = idle_.begin(); b != idle_.end(); ++b)
      if (b->bytes >= bytes && b->bytes <= bytes + bytes / kSpare &&
          (best == idle_.end() || b->bytes < best->bytes))
        best = b;
    if (best == idle_.end()) return {nullptr, bytes};
    const Block block = *best;
    idle_.erase(best);
    used_ += block.bytes;
    return block;
  }

  // Makes room for a new block: the ones that were idle longest go.
  void grow(int64_t bytes) {
    std::vector<Block> gone;
    {
      const std::lock_guard lock(mutex_);
      used_ += bytes;
      most_ = std::max(most_, used_);
      int64_t kept = 0;
      auto first = idle_.end();
      while (first != idle_.begin() && used_ + kept + (first - 1)->bytes <= most_)
        kept += (--first)->bytes;
      gone.assign(idle_.begin(), first);
      idle_.erase(idle_.begin(), first);
    }
    free(gone);
  }

  void give_back(const Block& block) {
    lend_to_kernel(block);
    const std::lock_guard lock(mutex_);
    used_ -= block.bytes;
    idle_.push_back(block);
  }

  void shrink(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    used_ -= bytes;
  }

  int64_t release() {
    std::vector<Block> gone;
    {
      const std::lock_guard lock(mutex_);
      gone.swap(idle_);
      most_ = used_;
    }
    return free(gone);
  }

 private:
  static int64_t free(const std::vector<Block>& blocks) {
    int64_t bytes = 0;
    for (const Block& block : blocks) {
      block.memory->deleter(block.memory);
      bytes += block.bytes;
    }
    return bytes;
  }

  std::mutex mutex_;
  std::vector<Block> idle_;  // in the order in which they were given back
  int64_t used_ = 0, most_ = 0;
};

// Lives until the process ends: tensors may outlive what is destroyed before.
Kept& kept() {
  static Kept& all = *new Kept;
  return all;
}

struct Memory {
  dlpack::ManagedVersioned managed = {};
  std::vector<int64_t> sizes, strides;
  Block block;
};

}  // namespace

dlpack::ManagedVersioned* take_kept(
    dlpack::DataType type, int ndim, const int64_t* sizes, int64_t bytes,
    const std::function<dlpack::ManagedVersioned*(int64_t bytes)>& allocate) {
  auto memory = std::make_unique<Memory>();
  memory->sizes.assign(sizes, sizes + ndim);
  memory->strides.assign(size_t(ndim), 1);
  for (int i = ndim - 2; i >= 0; --i)
    memory->strides[size_t(i)] = memory->strides[size_t(i) + 1] * sizes[i + 1];
  Block& block = memory->block = kept().take(bytes);
  if (!block.memory) {
    kept().grow(bytes);
    try {
      block.memory = allocate(bytes);
    } catch (...) {
      kept().shrink(bytes);
      throw;
    }
    kimi_advise_huge_pages(address(block), size_t(bytes));
  }
  dlpack::ManagedVersioned& managed = memory->managed;
  managed.version = block.memory->version;
  managed.context = memory.get();
  managed.deleter = [](dlpack::ManagedVersioned* self) {
    const std::unique_ptr<Memory> gone(static_cast<Memory*>(self->context));
    kept().give_back(gone->block);
  };
  managed.tensor = {address(block),       {dlpack::kCpu, 0},      ndim, type,
                    memory->sizes.data(), memory->strides.data(), 0};
  return &memory.release()->managed;
}

int64_t release_kept() { return kept().release(); }

}  // namespace kimi::bindings
