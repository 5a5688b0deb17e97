// SPDX-License-Identifier: MIT
// What dispatch and combine share: a rank's view of the buffers, and the meeting of all ranks.
//
//   signal   all blocks of the rank: __syncthreads; thread 0 adds itself with acquire and release
//            (gpu); the last block has thereby acquired what all have written, and its thread r
//            releases (sys) the flag of rank r
//   wait     each block that needs what came: thread r acquires (sys) the flag from rank r;
//            __syncthreads, after which all its threads may read
//
// Between launches the stream does what the counter does between blocks. What is released are rows in
// this GPU's memory (dispatch) or in the peers' (combine), always written by generic stores: there is
// no other proxy to fence.
#pragma once

#include "all_to_all/all_to_all.h"
#include "device/peer.cuh"
#include "device/warp.cuh"

namespace kimi::exchange {

inline constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;

/// The flags as kernels use them; tests put broken ones in their place.
struct Flags {
  static __device__ void release(uint64_t* flag, uint64_t value) { store_release_sys(flag, value); }
  static __device__ uint64_t acquire(const uint64_t* flag) { return load_acquire_sys(flag); }
  static __device__ bool last_to_come(uint32_t* arrivals, uint32_t blocks) {
    return atomic_add_acq_rel(arrivals, 1) == blocks - 1;
  }
};

/// 16 bits that differ where ranks call with different shapes, most likely.
__device__ inline uint32_t tag_of(std::initializer_list<int64_t> shape) {
  uint32_t hash = 2166136261u;
  for (const int64_t value : shape) {
    hash = (hash ^ static_cast<uint32_t>(value)) * 16777619u;
    hash = (hash ^ static_cast<uint32_t>(value >> 32)) * 16777619u;
  }
  return (hash ^ hash >> 16) & 0xffffu;
}

/// The buffers in operation `epoch`, as one block of a rank sees them.
template <class Flags>
class Exchange {
 public:
  __device__ Exchange(const kimi_peer_memory& peers, uint64_t epoch)
      : peers_(peers),
        state_(static_cast<kimi_all_to_all_state*>(peers.state)),
        epoch_(epoch),
        masked_(state_->masked),
        half_(static_cast<int>(epoch % static_cast<uint64_t>(peers.halves))) {}

  /// The number of the operation that is in its first phases.
  static __device__ uint64_t next(const kimi_peer_memory& peers) {
    return static_cast<const kimi_all_to_all_state*>(peers.state)->epoch + 1;
  }

  __device__ uint64_t epoch() const { return epoch_; }
  __device__ bool masked(int rank) const { return masked_ >> rank & 1; }
  __device__ char* half_of(int rank) const {
    return buffer(rank) + peers_.halves * kFlagBytes + half_ * half_bytes(peers_);
  }

  /// Whether an earlier operation has failed: then nothing is right any more.
  __device__ bool broken() const {
    const bool mine = threadIdx.x == 0 && (load_acquire_sys(&state_->silent) != 0 ||
                                           load_acquire_sys(&state_->strange) != 0 ||
                                           load_acquire_sys(&state_->overfull) != 0);
    return __syncthreads_or(mine) != 0;
  }
  /// One thread: those ranks have too little room. All ranks find the same.
  __device__ void overflow(uint64_t ranks, int64_t most) const {
    state_->most = static_cast<uint32_t>(most);
    atomic_or_sys(&state_->overfull, ranks);
  }

  /// All blocks of the rank: what they have written may be read by all ranks.
  __device__ void signal(uint32_t tag) const {
    KIMI_STATIC_SHARED(int, last, 1);
    __syncthreads();
    if (threadIdx.x == 0) {
      last[0] = Flags::last_to_come(&state_->arrivals, gridDim.x);
      if (last[0]) {  // every block has read the old epoch
        state_->arrivals = 0;
        state_->epoch = epoch_;
      }
    }
    __syncthreads();
    const int rank = static_cast<int>(threadIdx.x);
    if (last[0] && rank < peers_.world && !masked(rank))
      Flags::release(flag(rank, peers_.rank), epoch_ << 16 | tag);
  }

  /// Until all ranks have signalled; false where one did not, or did something else.
  __device__ bool wait(uint32_t tag) const {
    const int rank = static_cast<int>(threadIdx.x);
    bool bad = false;
    if (rank < peers_.world && !masked(rank)) {
      const uint64_t* const from = flag(peers_.rank, rank);
      uint64_t seen = 0;
      const bool in_time =
          wait_until([&] { return (seen = Flags::acquire(from)) >> 16 >= epoch_; },
                     global_nanoseconds() + static_cast<uint64_t>(peers_.timeout_ns));
      bad = !in_time || (seen & 0xffffu) != tag;
      if (bad) atomic_or_sys(in_time ? &state_->strange : &state_->silent, uint64_t{1} << rank);
    }
    return __syncthreads_or(bad) == 0;
  }

 private:
  __device__ char* buffer(int rank) const { return static_cast<char*>(peers_.buffers[rank]); }
  __device__ uint64_t* flag(int owner, int from) const {
    return reinterpret_cast<uint64_t*>(buffer(owner) + half_ * kFlagBytes) + from;
  }

  const kimi_peer_memory& peers_;
  kimi_all_to_all_state* state_;
  uint64_t epoch_, masked_;
  int half_;
};

/// The job-th of world * most pairs (rank, token): neighbouring jobs read from different ranks, and
/// the ranks begin at different ones.
struct Job {
  int rank, token;
  __device__ Job(int job, const kimi_peer_memory& peers)
      : rank((peers.rank + job) % peers.world), token(job / peers.world) {}
};

}  // namespace kimi::exchange
