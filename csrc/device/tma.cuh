// SPDX-License-Identifier: MIT
//
// TMA (sm_90): one thread moves a box of a tensor between global and shared memory.
//
//   tma_load        global -> shared; then the mbarrier is told all bytes of the box, also of those
//                   out of bounds, which are zeros
//   tma_store       shared -> global; nothing is written out of bounds
//   tma_reduce_add  the same, adding in the element type of the map
//   tma_prefetch_box  global -> L2, at some time: nobody is told
//
// Threads that filled the shared memory call fence_async_shared and meet at a barrier before one of
// them stores. Committing and waiting are the storing thread's own, and it waits before it ends.
// Coordinates count elements, x innermost; they may be negative or past the end. x lies on 16
// bytes: any other is an illegal instruction on an H100, whatever moves. 128 divides shared
// addresses, 1024 with Swizzle::k128, which is a function of the address.
#pragma once

#include "device/mbarrier.cuh"
#include "device/tensor_map.cuh"

#if defined(KIMI_HOST_SIMT)
#include <algorithm>
#endif

namespace kimi {

#if defined(KIMI_HOST_SIMT)

namespace detail {

struct Box {
  TensorMap map;
  int64_t at[3];
  size_t bytes() const {
    return static_cast<size_t>(map.strides_bytes[0] * map.box[0] * map.box[1] * map.box[2]);
  }
};
inline Box box_at(const TensorMap& map, const void* shared, const char* what, int rank, int32_t x,
                  int32_t y, int32_t z) {
  const uintptr_t alignment = map.swizzle == Swizzle::k128 ? 1024 : 128;
  if (map.rank != rank)
    simt::fail(std::string(what) + ": " + std::to_string(rank) +
               " coordinates for a tensor map of rank " + std::to_string(map.rank));
  if (reinterpret_cast<uintptr_t>(shared) % alignment != 0)
    simt::fail(std::string(what) + ": the shared address must be a multiple of " +
               std::to_string(alignment) + " bytes");
  const int64_t first_byte = x * map.strides_bytes[0];
  if (first_byte % 16 != 0)
    simt::fail(std::string(what) + ": x: expected a multiple of " +
               std::to_string(16 / map.strides_bytes[0]) + ", so that 16 divides its bytes, got " +
               std::to_string(x) + " elements of " + std::to_string(map.strides_bytes[0]) +
               " bytes, " + std::to_string(first_byte) + " bytes");
  const Box box{map, {x, y, z}};
  simt::detail::check_shared(shared, box.bytes(), what);
  return box;
}

/// Calls visit(place, first, bytes, global) for every 16 bytes of the box in shared memory: `bytes`
/// of them, from place + first on, are in bounds and belong to `global`.
template <class Visitor>
void for_each_piece(const Box& box, char* shared, Visitor visit) {
  const TensorMap& map = box.map;
  const int64_t element = map.strides_bytes[0], in_piece = 16 / element;
  int64_t offset = 0;
  for (int64_t z = box.at[2]; z < box.at[2] + map.box[2]; ++z)
    for (int64_t y = box.at[1]; y < box.at[1] + map.box[1]; ++y) {
      const bool inside = y >= 0 && y < map.sizes[1] && z >= 0 && z < map.sizes[2];
      const int64_t row = y * map.strides_bytes[1] + z * map.strides_bytes[2];
      for (int64_t x = box.at[0]; x < box.at[0] + map.box[0]; x += in_piece, offset += 16) {
        const int64_t first = std::clamp<int64_t>(-x, 0, in_piece);
        const int64_t end = inside ? std::clamp<int64_t>(map.sizes[0] - x, first, in_piece) : first;
        uintptr_t place = reinterpret_cast<uintptr_t>(shared + offset);
        if (map.swizzle == Swizzle::k128) place ^= (place >> 7 & 7) << 4;
        visit(reinterpret_cast<char*>(place), first * element,
              static_cast<size_t>((end - first) * element),
              const_cast<char*>(end > first ? map.base + row + (x + first) * element : map.base));
      }
    }
}

/// Runs on the stack of whatever thread is there, so ThreadSanitizer is told what it should see.
inline void load_box(char* shared, MBarrier& full, const Box& box, const char* what) {
  simt::sees_write(shared, box.bytes());
  {
    const simt::InsideModel inside;
    for_each_piece(box, shared, [](char* place, int64_t first, size_t bytes, const char* global) {
      std::memset(place, 0, 16);
      std::memcpy(place + first, global, bytes);
    });
  }
  simt::async_write(shared, box.bytes());
  check_fenced(full, what);
  complete_tx(full, static_cast<uint32_t>(box.bytes()));
}

/// To the same place in every block of the cluster that `blocks` names.
inline void load(void* shared, const TensorMap& map, MBarrier& full, const char* what, int rank,
                 int32_t x, int32_t y, int32_t z, unsigned blocks) {
  const Box box = box_at(map, shared, what, rank, x, y, z);
  if (blocks == 0 || blocks >> simt::cluster_blocks() != 0)
    simt::fail(std::string(what) + ": blocks: names none or more than the " +
               std::to_string(simt::cluster_blocks()) + " of the cluster");
  simt::count(&simt::Statistics::loads, 1);
  for (int b = 0; b < simt::cluster_blocks(); ++b)
    if (blocks >> b & 1) {
      simt::count(&simt::Statistics::loaded_bytes, box.bytes());
      char* const there = static_cast<char*>(simt::in_peer(shared, b));
      MBarrier* const barrier = static_cast<MBarrier*>(simt::in_peer(&full, b));
      simt::check_fenced(there, box.bytes(), what);
      simt::complete_later(b, [=] { load_box(there, *barrier, box, what); });
    }
}
/// Bytes of the tensor that lie in the box.
inline uint64_t bytes_inside(const TensorMap& map, const int64_t (&at)[3]) {
  int64_t bytes = map.strides_bytes[0];
  for (int d = 0; d < 3; ++d)
    bytes *= std::max<int64_t>(
        0, std::min(at[d] + map.box[d], map.sizes[d]) - std::max<int64_t>(at[d], 0));
  return static_cast<uint64_t>(bytes);
}
inline unsigned own_block() { return 1u << simt::cluster_rank(); }

template <class T>
void add_all(char* global, const char* values, size_t bytes) {
  for (size_t i = 0; i < bytes; i += sizeof(T)) {
    T a, b;
    std::memcpy(&a, global + i, sizeof a);
    std::memcpy(&b, values + i, sizeof b);
    a = from_float<T>(to_float(a) + to_float(b));
    std::memcpy(global + i, &a, sizeof a);
  }
}

/// Reads shared memory in the first step and writes global memory in the second.
inline void store(const TensorMap& map, const void* shared, const char* what, bool add, int rank,
                  int32_t x, int32_t y, int32_t z) {
  const Box box = box_at(map, shared, what, rank, x, y, z);
  simt::count(&simt::Statistics::stored_bytes, box.bytes());
  if (add && map.strides_bytes[0] == 1) simt::fail(std::string(what) + ": bytes cannot be added");
  char* const from = const_cast<char*>(static_cast<const char*>(shared));
  simt::check_fenced(from, box.bytes(), what);
  auto copy = std::make_shared<std::vector<char>>(box.bytes());
  simt::bulk_group().begin(
      [=] { std::memcpy(copy->data(), from, box.bytes()); },
      [=] {
        for_each_piece(box, from, [&](char* place, int64_t first, size_t bytes, char* global) {
          const char* values = copy->data() + (place - from) + first;
          if (!add)
            std::memcpy(global, values, bytes);
          else if (box.map.dtype == KIMI_FLOAT32)
            add_all<float>(global, values, bytes);
          else if (box.map.dtype == KIMI_BFLOAT16)
            add_all<bf16>(global, values, bytes);
          else
            add_all<fp16>(global, values, bytes);
        });
      });
}

}  // namespace detail

inline void tma_prefetch(const TensorMap&) {}
inline void tma_prefetch_box(const TensorMap& map, int32_t x, int32_t y, int32_t z) {
  if (map.rank != 3 || x * map.strides_bytes[0] % 16 != 0)
    simt::fail("tma_prefetch_box: expected a tensor map of rank 3 and x on 16 bytes");
  simt::count(&simt::Statistics::prefetched_bytes, detail::bytes_inside(map, {x, y, z}));
}
inline void tma_load(void* shared, const TensorMap& map, MBarrier& full, int32_t x, int32_t y) {
  detail::load(shared, map, full, "tma_load", 2, x, y, 0, detail::own_block());
}
inline void tma_load(void* shared, const TensorMap& map, MBarrier& full, int32_t x, int32_t y,
                     int32_t z) {
  detail::load(shared, map, full, "tma_load", 3, x, y, z, detail::own_block());
}
inline void tma_load_multicast(void* shared, const TensorMap& map, MBarrier& full, int32_t x,
                               int32_t y, uint16_t blocks) {
  detail::load(shared, map, full, "tma_load_multicast", 2, x, y, 0, blocks);
}
inline void tma_store(const TensorMap& map, const void* shared, int32_t x, int32_t y) {
  detail::store(map, shared, "tma_store", false, 2, x, y, 0);
}
inline void tma_store(const TensorMap& map, const void* shared, int32_t x, int32_t y, int32_t z) {
  detail::store(map, shared, "tma_store", false, 3, x, y, z);
}
inline void tma_reduce_add(const TensorMap& map, const void* shared, int32_t x, int32_t y) {
  detail::store(map, shared, "tma_reduce_add", true, 2, x, y, 0);
}
inline void tma_reduce_add(const TensorMap& map, const void* shared, int32_t x, int32_t y,
                           int32_t z) {
  detail::store(map, shared, "tma_reduce_add", true, 3, x, y, z);
}
inline void tma_store_commit() { simt::bulk_group().commit(); }
template <int kPending>
void tma_store_wait() {
  simt::bulk_group().wait(kPending);
}
template <int kPending>
void tma_store_wait_read() {
  simt::bulk_group().wait_first(kPending);
}

#else

/// prefetch.tensormap: of a kernel's parameter, before its first use.
__device__ __forceinline__ void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/// cp.async.bulk.tensor.2d from global memory: one thread, after it has announced the bytes at
/// `full`.
__device__ __forceinline__ void tma_load(void* shared, const TensorMap& map, MBarrier& full,
                                         int32_t x, int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], [%2];" ::"r"(detail::shared_u32(shared)),
      "l"(&map), "r"(detail::shared_u32(&full)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tma_load(void* shared, const TensorMap& map, MBarrier& full,
                                         int32_t x, int32_t y, int32_t z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4, %5}], "
      "[%2];" ::"r"(detail::shared_u32(shared)),
      "l"(&map), "r"(detail::shared_u32(&full)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

/// The same with .multicast::cluster: to this offset of every block whose bit is set, and each
/// block's own barrier.
__device__ __forceinline__ void tma_load_multicast(void* shared, const TensorMap& map,
                                                   MBarrier& full, int32_t x, int32_t y,
                                                   uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::"
      "cluster "
      "[%0], [%1, {%4, %5}], [%2], %3;" ::"r"(detail::shared_u32(shared)),
      "l"(&map), "r"(detail::shared_u32(&full)), "h"(blocks), "r"(x), "r"(y)
      : "memory");
}

/// cp.async.bulk.prefetch.tensor.3d.L2.global: a box whose size may exceed shared memory.
__device__ __forceinline__ void tma_prefetch_box(const TensorMap& map, int32_t x, int32_t y,
                                                 int32_t z) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global [%0, {%1, %2, %3}];" ::"l"(&map), "r"(x),
               "r"(y), "r"(z)
               : "memory");
}

/// cp.async.bulk.tensor to global memory, in the thread's open bulk group.
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* shared, int32_t x,
                                          int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
      "r"(detail::shared_u32(shared)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* shared, int32_t x,
                                          int32_t y, int32_t z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
      "r"(detail::shared_u32(shared)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

/// cp.reduce.async.bulk.tensor .add, in the element type of the map.
__device__ __forceinline__ void tma_reduce_add(const TensorMap& map, const void* shared, int32_t x,
                                               int32_t y) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%2, %3}], [%1];" ::
          "l"(&map),
      "r"(detail::shared_u32(shared)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tma_reduce_add(const TensorMap& map, const void* shared, int32_t x,
                                               int32_t y, int32_t z) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4}], "
      "[%1];" ::"l"(&map),
      "r"(detail::shared_u32(shared)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

/// cp.async.bulk.commit_group: closes the thread's group.
__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/// cp.async.bulk.wait_group: until all but the latest kPending groups have been written.
template <int kPending>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

/// cp.async.bulk.wait_group.read: until all but the latest kPending groups have read shared memory.
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

#endif

}  // namespace kimi
