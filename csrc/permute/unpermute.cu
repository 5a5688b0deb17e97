// SPDX-License-Identifier: MIT
// unpermute for every GPU; on Hopper the same kernel overlaps the one before it.
#include "permute/unpermute.cuh"

namespace kimi {

Status unpermute_cuda(const UnpermuteParams& p, void* stream) {
  int sm = 0;
  KIMI_RETURN_IF_ERROR(device_sm(sm));
  if (sm / 10 == 9) return permutation::unpermute_sm90(p, stream);
  return permutation::launch_unpermute(p, false, stream);
}

}  // namespace kimi
