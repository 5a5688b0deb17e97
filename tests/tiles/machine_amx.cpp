// SPDX-License-Identifier: MIT
// The instructions themselves, for test_tiles to compare the model with where the machine has AMX.
#include "gemm/cpu/tiles_amx.h"

void machine_dot(const float* c, const void* a, const void* b, float* sum) {
  namespace tile = kimi::cpu::tile;
  tile::configure();
  tile::load<0>(c, 64);
  tile::load<4>(a, 64);
  tile::load<6>(b, 64);
  tile::dot<0, 4, 6>();
  tile::store<0>(sum, 64);
  tile::release();
}
