// SPDX-License-Identifier: MIT
// Matrices that clusters of Hopper's blocks share: of four, where all matrices find one at once, else
// of two. The three lower triangles take 126 KB of every block at m = 192 and 216 KB at 256.
//
// Predicted for an H100 at 1.75 GHz, not measured, as in on_chip.cuh; 12 bytes a clock from a block
// to the others are assumed. 14 polynomials, 2 R, 2 Q X, norm and X, in thousands of clocks:
//
//                            polynomials                  R   Q X  norm, X   in all
//   256 x 512,   2 blocks    4.6 + 3.0 sent + 0.7 each    18   30      21    185, 106 us
//                4 blocks    2.3 + 4.6 + 0.7               9   15      11    141,  80 us
//   192 x 1536,  2 blocks    2.1 + 1.9 + 0.7              34   65      47    212, 121 us
//                4 blocks    1.2 + 2.8 + 0.7              18   32      24    139,  80 us
//
// for 66 matrices by two blocks or 32 by four. A stack's 18 products and 2 passes take 130 us for one
// and 170 or 250 us for 64. One block alone would hold m = 256, too, and take 178 us at n = 512.
#include "newton_schulz/on_chip_launch.cuh"

namespace kimi::newton_schulz_cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(OnChip<T, true>::kThreads, 1)
    cluster_kernel(const __grid_constant__ Job job, const __grid_constant__ Matrices matrices) {
  take_matrices<T, true>(job, matrices);
}

}  // namespace

Status on_chips(const NewtonSchulzParams& p, const ChainShape& s, void* stream) {
  return dispatch(p.dtype, [&]<class T>() {
    static_assert(OnChip<T, true>::kMostSide == most_side_of_cluster(kDtype<T>));
    return launch_on_chip<T, true>(cluster_kernel<T>, p, s, 4, stream);
  });
}

}  // namespace kimi::newton_schulz_cuda
