// SPDX-License-Identifier: MIT
#include "bindings/kept.h"

#include <algorithm>
#include <iterator>
#include <list>
#include <memory>
#include <mutex>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bindings/dense.h"
#include "kimi_ops.h"

namespace kimi::bindings {
namespace {

// A kept block may be larger than what is asked for by one part in so many.
constexpr int64_t kSpare = 8;

struct Block {
  dlpack::ManagedVersioned* memory;  // [bytes] uint8
  int64_t bytes;
};
// A block goes from list to list with its node: who gives one back needs no memory for it.
using Blocks = std::list<Block>;

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
  // The smallest block that fits, or none.
  Blocks take(int64_t bytes) {
    Blocks taken;
    const std::lock_guard lock(mutex_);
    auto best = idle_.end();
    for (auto b = idle_.begin(); b != idle_.end(); ++b)
      if (b->bytes >= bytes && b->bytes - bytes <= bytes / kSpare &&
          (best == idle_.end() || b->bytes < best->bytes))
        best = b;
    if (best == idle_.end()) return taken;
    used_ += best->bytes;
    taken.splice(taken.end(), idle_, best);
    return taken;
  }

  // Makes room for a new block: the ones that were idle longest go.
  void grow(int64_t bytes) {
    Blocks gone;
    {
      const std::lock_guard lock(mutex_);
      used_ += bytes;
      const int64_t most = std::max(most_, used_);
      int64_t kept = 0;
      auto first = idle_.end();
      while (first != idle_.begin() && used_ + kept + std::prev(first)->bytes <= most)
        kept += (--first)->bytes;
      gone.splice(gone.end(), idle_, idle_.begin(), first);
    }
    free(gone);
  }

  void give_back(Blocks& block) {
    lend_to_kernel(block.front());
    const std::lock_guard lock(mutex_);
    used_ -= block.front().bytes;
    idle_.splice(idle_.end(), block);
  }

  void grown() {
    const std::lock_guard lock(mutex_);
    most_ = std::max(most_, used_);
  }

  void shrink(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    used_ -= bytes;
  }

  int64_t release() {
    Blocks gone;
    {
      const std::lock_guard lock(mutex_);
      gone.swap(idle_);
      most_ = used_;
    }
    return free(gone);
  }

 private:
  static int64_t free(const Blocks& blocks) {
    int64_t bytes = 0;
    for (const Block& block : blocks) {
      block.memory->deleter(block.memory);
      bytes += block.bytes;
    }
    return bytes;
  }

  std::mutex mutex_;
  Blocks idle_;  // in the order in which they were given back
  int64_t used_ = 0, most_ = 0;
};

// Lives until the process ends: tensors may outlive what is destroyed before.
Kept& kept() {
  static Kept& all = *new Kept;
  return all;
}

struct Memory : Dense {
  using Dense::Dense;
  Blocks block;  // one
};

}  // namespace

dlpack::ManagedVersioned* take_kept(
    dlpack::DataType type, int ndim, const int64_t* sizes, int64_t bytes,
    const std::function<dlpack::ManagedVersioned*(int64_t bytes)>& allocate) {
  auto memory = std::make_unique<Memory>(type, ndim, sizes);
  Blocks& block = memory->block = kept().take(bytes);
  if (block.empty()) {
    block.push_back({nullptr, bytes});
    kept().grow(bytes);
    try {
      block.front().memory = allocate(bytes);
    } catch (...) {
      kept().shrink(bytes);
      throw;
    }
    kept().grown();
    kimi_advise_huge_pages(address(block.front()), size_t(bytes));
  }
  dlpack::ManagedVersioned& managed = memory->managed;
  managed.version = block.front().memory->version;
  managed.tensor.data = address(block.front());
  managed.deleter = [](dlpack::ManagedVersioned* self) {
    const std::unique_ptr<Memory> gone(static_cast<Memory*>(static_cast<Dense*>(self->context)));
    kept().give_back(gone->block);
  };
  return &memory.release()->managed;
}

int64_t release_kept() { return kept().release(); }

}  // namespace kimi::bindings
