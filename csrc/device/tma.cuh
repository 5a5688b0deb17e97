// SPDX-License-Identifier: MIT
//
// TMA (sm_90): one thread moves a box of a tensor between global and shared memory.
//
//   load    global -> shared; the mbarrier is told all bytes of the box, those out of bounds
//   (zeros) included store   shared -> global, reduce_add adds there; out of bounds nothing is
//   written. fence_async_shared and a barrier
//           come between the threads' writes to shared memory and the store; commit and wait are
//           the storing thread's.
//
// Coordinates count elements, x innermost; they may be negative or past the end. Shared addresses:
// multiples of 128 bytes, of 1024 with Swizzle::k128 (the swizzle is a function of the address).
#pragma once

#include "device/mbarrier.cuh"
#include "device/tensor_map.cuh"

namespace kimi {

#if defined(KIMI_HOST_SIMT)

namespace detail {

struct Box {
  TensorMap map;
  int64_t at[3];
  int64_t bytes() const { return map.strides_bytes[0] * map.box[0] * map.box[1] * map.box[2]; }
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
  const Box box{map, {x, y, z}};
  simt::detail::check_shared(shared, static_cast<size_t>(box.bytes()), what);
  return box;
}

/// Calls visit(place in shared memory, address in global memory or nullptr if out of bounds) for
/// every element.
template <class Visitor>
void for_each_element(const Box& box, char* shared, Visitor visit) {
  const TensorMap& map = box.map;
  const int64_t element = map.strides_bytes[0];
  int64_t row_start = 0;
  for (int32_t z = 0; z < map.box[2]; ++z)
    for (int32_t y = 0; y < map.box[1]; ++y, row_start += map.box[0] * element)
      for (int32_t x = 0; x < map.box[0]; ++x) {
        const int64_t g[3] = {box.at[0] + x, box.at[1] + y, box.at[2] + z};
        bool inside = true;
        const char* global = map.base;
        for (int d = 0; d < 3; ++d) {
          inside &= g[d] >= 0 && g[d] < map.sizes[d];
          global += g[d] * map.strides_bytes[d];
        }
        uintptr_t place = reinterpret_cast<uintptr_t>(shared + row_start + x * element);
        if (map.swizzle == Swizzle::k128) place ^= (place >> 7 & 7) << 4;
        visit(reinterpret_cast<char*>(place), inside ? const_cast<char*>(global) : nullptr);
      }
}

inline void load_box(char* shared, const Box& box) {
  const size_t element = static_cast<size_t>(box.map.strides_bytes[0]);
  for_each_element(box, shared, [&](char* place, const char* global) {
    if (global != nullptr)
      std::memcpy(place, global, element);
    else
      std::memset(place, 0, element);
  });
}

inline void load(void* shared, const TensorMap& map, MBarrier& full, const char* what, int rank,
                 int32_t x, int32_t y, int32_t z) {
  const Box box = box_at(map, shared, what, rank, x, y, z);
  simt::complete_later([=, &full] {
    load_box(static_cast<char*>(shared), box);
    mbarrier_complete_tx(full, static_cast<uint32_t>(box.bytes()));
  });
}

/// The same place in every block of the cluster that `blocks` names.
inline void load_multicast(void* shared, const TensorMap& map, MBarrier& full, const char* what,
                           int rank, int32_t x, int32_t y, int32_t z, uint16_t blocks) {
  if (blocks == 0 || blocks >> simt::cluster_blocks() != 0)
    simt::fail(std::string(what) + ": blocks names none or more than the cluster's " +
               std::to_string(simt::cluster_blocks()));
  const Box box = box_at(map, shared, what, rank, x, y, z);
  for (int b = 0; b < simt::cluster_blocks(); ++b)
    if (blocks >> b & 1) {
      char* const there = static_cast<char*>(simt::in_peer(shared, b));
      MBarrier* const barrier = static_cast<MBarrier*>(simt::in_peer(&full, b));
      simt::complete_later([=] {
        load_box(there, box);
        mbarrier_complete_tx(*barrier, static_cast<uint32_t>(box.bytes()));
      });
    }
}

template <class T>
void add_at(char* global, const char* value) {
  T a, b;
  std::memcpy(&a, global, sizeof a);
  std::memcpy(&b, value, sizeof b);
  a = from_float<T>(to_float(a) + to_float(b));
  std::memcpy(global, &a, sizeof a);
}

/// Reads shared memory at the first step and writes global memory at the second.
inline void store(const TensorMap& map, const void* shared, const char* what, bool add, int rank,
                  int32_t x, int32_t y, int32_t z) {
  const Box box = box_at(map, shared, what, rank, x, y, z);
  const size_t element = static_cast<size_t>(map.strides_bytes[0]);
  if (add && element == 1) simt::fail(std::string(what) + ": bytes cannot be added");
  char* const from = const_cast<char*>(static_cast<const char*>(shared));
  simt::check_fenced(from, static_cast<size_t>(box.bytes()), what);
  auto values = std::make_shared<std::vector<char>>();
  simt::bulk_group().begin(
      [=] {
        values->reserve(static_cast<size_t>(box.bytes()));
        for_each_element(box, from, [&](const char* place, const char*) {
          values->insert(values->end(), place, place + element);
        });
      },
      [=] {
        const char* value = values->data();
        for_each_element(box, from, [&](const char*, char* global) {
          if (global != nullptr && !add) std::memcpy(global, value, element);
          if (global != nullptr && add) {
            if (box.map.dtype == KIMI_FLOAT32) add_at<float>(global, value);
            if (box.map.dtype == KIMI_BFLOAT16) add_at<bf16>(global, value);
            if (box.map.dtype == KIMI_FLOAT16) add_at<fp16>(global, value);
          }
          value += element;
        });
      });
}

}  // namespace detail

inline void tma_prefetch(const TensorMap&) {}
inline void tma_load(void* shared, const TensorMap& map, MBarrier& full, int32_t x, int32_t y) {
  detail::load(shared, map, full, "tma_load", 2, x, y, 0);
}
inline void tma_load(void* shared, const TensorMap& map, MBarrier& full, int32_t x, int32_t y,
                     int32_t z) {
  detail::load(shared, map, full, "tma_load", 3, x, y, z);
}
inline void tma_load_multicast(void* shared, const TensorMap& map, MBarrier& full, int32_t x,
                               int32_t y, uint16_t blocks) {
  detail::load_multicast(shared, map, full, "tma_load_multicast", 2, x, y, 0, blocks);
}
inline void tma_load_multicast(void* shared, const TensorMap& map, MBarrier& full, int32_t x,
                               int32_t y, int32_t z, uint16_t blocks) {
  detail::load_multicast(shared, map, full, "tma_load_multicast", 3, x, y, z, blocks);
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
__device__ __forceinline__ void tma_load_multicast(void* shared, const TensorMap& map,
                                                   MBarrier& full, int32_t x, int32_t y, int32_t z,
                                                   uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::"
      "cluster "
      "[%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(detail::shared_u32(shared)),
      "l"(&map), "r"(detail::shared_u32(&full)), "h"(blocks), "r"(x), "r"(y), "r"(z)
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
