// SPDX-License-Identifier: MIT
// Kept memory where there is no more: what is given back needs none, and what could not be had leaves
// no trace. tests/operators/test_kept_memory.py has the rest, through tensors.
#include <cstdlib>
#include <new>
#include <vector>

#include "bindings/kept.h"
#include "engines.h"

namespace {

bool none_left = false;  // whether operator new refuses

}  // namespace

void* operator new(size_t bytes) {
  if (void* memory = none_left ? nullptr : std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace kimi::bindings {
namespace {

using test::check;

constexpr int64_t kBlock = kKeptFrom;

dlpack::ManagedVersioned* allocate(int64_t bytes) {
  auto* memory = new dlpack::ManagedVersioned{};
  memory->tensor.data = std::malloc(size_t(bytes));
  memory->deleter = [](dlpack::ManagedVersioned* self) {
    std::free(self->tensor.data);
    delete self;
  };
  return memory;
}

dlpack::ManagedVersioned* take(int64_t bytes) {
  return take_kept({dlpack::kUInt, 8, 1}, 1, &bytes, bytes, allocate);
}

void test_giving_back_needs_no_memory() {
  std::vector<dlpack::ManagedVersioned*> lent;
  for (int i = 0; i < 9; ++i) lent.push_back(take(kBlock));
  none_left = true;
  for (dlpack::ManagedVersioned* memory : lent) memory->deleter(memory);
  none_left = false;
  check(release_kept() == 9 * kBlock, "expected every block back");
}

void test_what_was_not_had_was_never_in_use() {
  dlpack::ManagedVersioned* first = take(kBlock);
  const int64_t huge = 100 * kBlock;
  bool refused = false;
  try {
    take_kept({dlpack::kUInt, 8, 1}, 1, &huge, huge,
              [](int64_t) -> dlpack::ManagedVersioned* { throw std::bad_alloc(); });
  } catch (const std::bad_alloc&) {
    refused = true;
  }
  check(refused, "expected the allocator's exception");
  first->deleter(first);
  // At most one block was in use at a time, so that at most one is kept.
  dlpack::ManagedVersioned* other = take(3 * kBlock / 4);
  other->deleter(other);
  check(release_kept() <= kBlock, "expected no more kept than was in use");
}

}  // namespace
}  // namespace kimi::bindings

int main() {
  kimi::bindings::test_giving_back_needs_no_memory();
  kimi::bindings::test_what_was_not_had_was_never_in_use();
  return kimi::test::report("kept");
}
