// SPDX-License-Identifier: MIT
// Launches of the kernels on chip: as many clusters as the device runs at once, and as the
// workspace has room for, take the matrices in turn.
#pragma once

#include <algorithm>

#include "newton_schulz/on_chip.cuh"

namespace kimi::newton_schulz_cuda {

// Of X of one cluster.
inline int64_t bytes_of_x(const NewtonSchulzParams& p, const ChainShape& s) {
  return s.m * round_up(s.n, 8) * size_of(p.dtype);
}

// Clusters that the workspace is for: a number that no device changes.
inline int64_t most_clusters(const NewtonSchulzParams& p, const ChainShape& s) {
  const int64_t fit = std::max<int64_t>(1, kWorkspace / bytes_of_x(p, s));
  return std::min<int64_t>({p.num_matrices, kMostMatrices, fit});
}

// `widest`: blocks of a cluster where all matrices find one at once; otherwise the fewest.
template <class T, bool kCluster>
Status launch_on_chip(void (*kernel)(Job, Matrices), const NewtonSchulzParams& p,
                      const ChainShape& s, int widest, void* stream) {
  using Chip = OnChip<T, kCluster>;
  Job job{};
  Chip::set_sizes(job, s);
  job.steps = p.steps;
  job.shift = s.shift;
  job.eps = p.eps;
  job.a_outside = keeps_a_out(p);
  job.workspace = p.workspace;
  const size_t shared = static_cast<size_t>(job.bytes);
  const auto at_once = [&](int cluster) {
    return int64_t{resident_blocks(kernel, Chip::kThreads, shared, cluster)} / cluster;
  };
  const int cluster = at_once(widest) >= most_clusters(p, s) ? widest : Chip::kLeastBlocks;
  const int64_t clusters = std::min(most_clusters(p, s), at_once(cluster));
  for (int32_t k = 0; k < p.steps; ++k) job.step[k] = step_of(p, k);
  for (int64_t first = 0; first < p.num_matrices; first += kMostMatrices) {
    job.count = static_cast<int32_t>(std::min<int64_t>(kMostMatrices, p.num_matrices - first));
    job.g = lines_of_g(p, s, first, job.count);
    job.x = lines_of_x(p, s, first, job.count);
    Matrices matrices;
    std::copy_n(p.g + first, job.count, matrices.g);
    std::copy_n(p.x + first, job.count, matrices.x);
    const int64_t blocks = std::min<int64_t>(job.count, clusters) * cluster;
    LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(Chip::kThreads), shared, stream};
    config.cluster = static_cast<unsigned>(cluster);
    KIMI_RETURN_IF_ERROR(launch(kernel, config, job, matrices));
  }
  return Status::ok();
}

}  // namespace kimi::newton_schulz_cuda
