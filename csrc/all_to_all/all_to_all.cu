// SPDX-License-Identifier: MIT
// Launches of dispatch and combine. Ranks that share a GPU and a launch are the rows of the grid.
//
// One launch of all phases waits inside of the grid, so all its blocks have to be resident: it is
// cooperative. Launches of single phases wait in MEET alone, which is one block a rank: whatever else
// runs on the GPU, that one finds room, and the ranks of one GPU may each have their own stream.
#include "all_to_all/combine.cuh"
#include "all_to_all/dispatch.cuh"
#include "device/launch.cuh"

namespace kimi {
namespace {

using namespace exchange;

// Blocks that keep a link of 450 GB/s busy over 2 us with 16 KB of loads in flight each, twice over:
// a model, not measured. Where all ranks share this GPU there is no link, and all blocks are used.
constexpr int kLinkBlocks = 2 * 450'000 * 2 / (kThreads * kInFlight * 16);

template <class Params, int kRanks>
struct Local {
  Params rank[kRanks];
};

template <int kRanks>
__global__ void __launch_bounds__(kThreads, kRanks == 1 ? 3 : 2)
    dispatch_kernel(const __grid_constant__ Local<DispatchParams, kRanks> local) {
  dispatch_rank<Flags>(local.rank[kRanks == 1 ? 0 : blockIdx.y]);
}
template <int kRanks>
__global__ void __launch_bounds__(kThreads, kRanks == 1 ? 3 : 2)
    combine_kernel(const __grid_constant__ Local<CombineParams, kRanks> local) {
  combine_rank<Flags>(local.rank[kRanks == 1 ? 0 : blockIdx.y]);
}

template <class Params, int kRanks>
Status run(const char* op, void (*kernel)(Local<Params, kRanks>), const Params* ranks, int count,
           int64_t jobs, size_t shared_bytes, void* stream) {
  Local<Params, kRanks> local{};
  std::copy_n(ranks, count, local.rank);
  const Params& p = ranks[0];
  const bool meets = p.phases & KIMI_ALL_TO_ALL_MEET;
  const bool waits = meets && p.phases != KIMI_ALL_TO_ALL_MEET;
  const int resident = resident_blocks(kernel, kThreads, shared_bytes);
  if ((meets && count > resident) || (waits && int64_t{p.num_blocks} * count > resident))
    return invalid(op, ": num_blocks: expected at most the ", resident / count,
                   " blocks of each of ", count, " ranks that are resident, got ", p.num_blocks,
                   "; ask for fewer, or for single phases");
  const int64_t wanted = p.num_blocks > 0         ? p.num_blocks
                         : p.peers.world == count ? resident / count
                                                  : std::min(resident / count, kLinkBlocks);
  const int64_t blocks =
      waits || !meets ? std::clamp<int64_t>(jobs, 1, std::max<int64_t>(1, wanted)) : 1;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(count));
  const bool together = meets && blocks * count > 1;  // its blocks wait for each other
  return launch(kernel, LaunchConfig{grid, dim3(kThreads), shared_bytes, stream, together}, local);
}

}  // namespace

Status all_to_all_dispatch_cuda(const DispatchParams* ranks, int num_ranks, void* stream) {
  const DispatchParams& p = ranks[0];
  const int64_t jobs = p.max_tokens * (p.phases & KIMI_ALL_TO_ALL_RECEIVE ? p.peers.world : 1);
  const size_t shared = table_bytes(p.peers.world, p.num_experts);
  if (num_ranks == 1)
    return run("all_to_all_dispatch", dispatch_kernel<1>, ranks, 1, jobs, shared, stream);
  return run("all_to_all_dispatch", dispatch_kernel<KIMI_ALL_TO_ALL_MAX_LOCAL>, ranks, num_ranks,
             jobs, shared, stream);
}

Status all_to_all_combine_cuda(const CombineParams* ranks, int num_ranks, void* stream) {
  const CombineParams& p = ranks[0];
  const int64_t jobs = p.max_tokens * (p.phases & KIMI_ALL_TO_ALL_SEND ? p.peers.world : 1);
  if (num_ranks == 1)
    return run("all_to_all_combine", combine_kernel<1>, ranks, 1, jobs, 0, stream);
  return run("all_to_all_combine", combine_kernel<KIMI_ALL_TO_ALL_MAX_LOCAL>, ranks, num_ranks,
             jobs, 0, stream);
}

}  // namespace kimi
