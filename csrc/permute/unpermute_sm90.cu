// SPDX-License-Identifier: MIT
#include "permute/unpermute.cuh"

namespace kimi::permutation {

Status unpermute_sm90(const UnpermuteParams& p, void* stream) {
  return launch_unpermute(p, true, stream);
}

}  // namespace kimi::permutation
