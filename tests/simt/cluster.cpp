// SPDX-License-Identifier: MIT
//
// Clusters: their barrier, and one block's way to another's shared memory.
#include "runner.h"

namespace simt {
namespace detail {
namespace {

int live_threads(const Cluster& cluster) {
  int live = 0;
  for (const Block* block : cluster.blocks) live += block == nullptr ? 0 : block->running;
  return live;
}

}  // namespace

// The barrier is for the threads that have not exited.
void advance_cluster(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived < live_threads(cluster)) return;
  cluster.arrived = 0;
  ++cluster.generation;
  Runner::instance().wake_spinners();
}

const SharedMemory* memory_of(const Block& block, const void* address) {
  const auto holds = [&](const SharedMemory& memory) {
    const ptrdiff_t offset = static_cast<const char*>(address) - memory.data();
    return offset >= 0 && static_cast<size_t>(offset) < memory.bytes();
  };
  if (holds(*block.dynamic)) return block.dynamic.get();
  for (const auto& [site, memory] : block.statics)
    if (holds(*memory)) return memory.get();
  return nullptr;
}

}  // namespace detail

int cluster_rank() { return detail::Runner::instance().self("cluster_rank").block->rank; }
int cluster_blocks() {
  const detail::Thread& self = detail::Runner::instance().self("cluster_blocks");
  return static_cast<int>(self.block->cluster->blocks.size());
}

void cluster_arrive(std::source_location where) {
  const InsideModel inside;
  detail::Thread& self = detail::Runner::instance().self("cluster_arrive");
  detail::Cluster& cluster = *self.block->cluster;
  if (self.cluster_arrival >= 0) fail("cluster_arrive: the thread has not waited since it arrived");
  detail::whole_warp("cluster_arrive", where);
  self.cluster_arrival = cluster.generation;
  ++cluster.arrived;
  detail::release_as(self, &cluster.meetings[cluster.generation % 2]);
  detail::advance_cluster(cluster);
}

void cluster_wait(std::source_location where) {
  detail::Thread& self = detail::Runner::instance().self("cluster_wait");
  const int64_t generation = self.cluster_arrival;
  if (generation < 0) fail("cluster_wait: the thread has not arrived");
  detail::whole_warp("cluster_wait", where);
  const detail::Cluster& cluster = *self.block->cluster;
  spin_until([&] { return cluster.generation > generation; },
             [&] {
               return "cluster_wait (" + std::to_string(cluster.arrived) + " of " +
                      std::to_string(detail::live_threads(cluster)) + " threads have arrived)";
             },
             where);
  self.cluster_arrival = -1;
  acquire(&cluster.meetings[generation % 2]);
}

void* in_peer(const void* address, int rank) {
  const InsideModel inside;
  const detail::Block& block = detail::Runner::instance().block();
  const auto& blocks = block.cluster->blocks;
  if (rank < 0 || static_cast<size_t>(rank) >= blocks.size())
    fail("block " + std::to_string(rank) + " of a cluster of " + std::to_string(blocks.size()));
  detail::Block* const peer = blocks[static_cast<size_t>(rank)];
  if (peer == nullptr)
    fail("block " + std::to_string(rank) + " of the cluster has ended: its shared memory is gone");
  if (peer != &block && block.cluster->generation == 0)
    fail("block " + std::to_string(rank) +
         " of the cluster may not have started: all must have met at its barrier before");
  const detail::SharedMemory* const own = detail::memory_of(block, address);
  if (own == nullptr) fail("the address is not in shared memory");
  const ptrdiff_t offset = static_cast<const char*>(address) - own->data();
  if (own == block.dynamic.get()) return peer->dynamic->data() + offset;
  for (const auto& [site, memory] : block.statics)
    if (memory.get() == own)
      return static_cast<char*>(detail::static_of(*peer, site, own->bytes(), own->alignment())) +
             offset;
  return nullptr;
}

}  // namespace simt
