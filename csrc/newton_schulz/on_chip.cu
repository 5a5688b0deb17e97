// SPDX-License-Identifier: MIT
// Matrices that one block of any GPU holds.
#include "newton_schulz/on_chip_launch.cuh"

namespace kimi::newton_schulz_cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(OnChip<T, false>::kThreads, 1)
    on_chip_kernel(const __grid_constant__ Job job, const __grid_constant__ Matrices matrices) {
  take_matrices<T, false>(job, matrices);
}

}  // namespace

size_t on_chip_bytes(const NewtonSchulzParams& p, const ChainShape& s) {
  return static_cast<size_t>(most_clusters(p, s) * bytes_of_x(p, s));
}

Status on_chip(const NewtonSchulzParams& p, const ChainShape& s, void* stream) {
  return dispatch(p.dtype, [&]<class T>() {
    static_assert(OnChip<T, false>::kMostSide == most_side_of_block(kDtype<T>));
    return launch_on_chip<T, false>(on_chip_kernel<T>, p, s, 1, stream);
  });
}

}  // namespace kimi::newton_schulz_cuda
