// SPDX-License-Identifier: MIT
// Launches of the kernel on chip: as many blocks as the device runs at once, and as the workspace
// has room for, take the matrices in turn.
#include <algorithm>

#include "newton_schulz/on_chip.cuh"

namespace kimi::newton_schulz_cuda {
namespace {

template <class T>
int64_t blocks_of(const NewtonSchulzParams& p, const Job& job) {
  const int64_t bytes = job.m * job.stride * int64_t{sizeof(T)};
  const int64_t resident =
      resident_blocks(on_chip_kernel<T>, OnChip<T>::kThreads, OnChip<T>::shared_bytes(job));
  return std::min({p.num_matrices, resident, std::max<int64_t>(1, kWorkspace / bytes)});
}

template <class T>
Status launch_all(const NewtonSchulzParams& p, const ChainShape& s, void* stream) {
  Job job{};
  OnChip<T>::set_sizes(job, s);
  job.steps = p.steps;
  job.shift = s.shift;
  job.eps = p.eps;
  job.a_outside = keeps_a_out(p);
  job.workspace = p.workspace;
  const size_t shared = OnChip<T>::shared_bytes(job);
  const int64_t blocks = blocks_of<T>(p, job);
  for (int32_t k = 0; k < p.steps; ++k) job.step[k] = step_of(p, k);
  for (int64_t first = 0; first < p.num_matrices; first += kMostMatrices) {
    job.count = static_cast<int32_t>(std::min<int64_t>(kMostMatrices, p.num_matrices - first));
    job.g = lines_of_g(p, s, first, job.count);
    job.x = lines_of_x(p, s, first, job.count);
    Matrices matrices;
    std::copy_n(p.g + first, job.count, matrices.g);
    std::copy_n(p.x + first, job.count, matrices.x);
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(job.count, blocks)));
    KIMI_RETURN_IF_ERROR(launch(on_chip_kernel<T>,
                                LaunchConfig{grid, dim3(OnChip<T>::kThreads), shared, stream}, job,
                                matrices));
  }
  return Status::ok();
}

}  // namespace

bool on_chip_serves(const NewtonSchulzParams& p, const ChainShape& s) {
  const int most = p.dtype == KIMI_FLOAT32 ? OnChip<float>::kMostSide : OnChip<fp16>::kMostSide;
  return s.m <= most && p.steps <= kMostSteps;
}

size_t on_chip_bytes(const NewtonSchulzParams& p, const ChainShape& s) {
  return dispatch(p.dtype, [&]<class T>() {
    Job job{};
    OnChip<T>::set_sizes(job, s);
    return size_t(blocks_of<T>(p, job) * job.m * job.stride) * sizeof(T);
  });
}

Status on_chip(const NewtonSchulzParams& p, const ChainShape& s, void* stream) {
  return dispatch(p.dtype, [&]<class T>() { return launch_all<T>(p, s, stream); });
}

}  // namespace kimi::newton_schulz_cuda
