// SPDX-License-Identifier: MIT
// Whether a token's result may depend on how many others are computed with it.
#pragma once

namespace kimi {

// true: products take the way whose order of sums is the same for any number of rows. At first
// KIMI_OPS_BATCH_INVARIANT, 0 without it.
bool batch_invariant();
void set_batch_invariant(bool wanted);

}  // namespace kimi
