// SPDX-License-Identifier: MIT
// The FP8 layer on Hopper: no pass of its own makes its rows, or its activation, FP8.
//
//   x [T, H] --fp8_rows, permuted--> rows [R, H] e4m3 --w_gate_up--> [g; u] --act--> h [R, F] e4m3
//   h --w_down--> rows [R, H] --unpermute--> y
#pragma once

#include "fused_experts/fused_experts.h"
#include "gemm/product.h"

namespace kimi::experts {

// h = a(g) u in e4m3, each 128 columns with a scale: the rows that fp8_rows would make of h in fp32.
struct ActivateFp8Params {
  Activation activation;
  void* data;    // [R, F]
  float* scale;  // [F / 128, R], row stride scale_stride
  int64_t scale_stride;
};

// cols is F, which 128 divides, and B has 2 F rows, gate first. Rows from offsets[E-1] on are not
// written. activate_fp8_sm90.cu
Status activate_fp8(const gemm::Product& p, const gemm::BlockScales& scales,
                    const ActivateFp8Params& params, void* stream);

// Whether a forward on a GPU is that of FP8 weights. fused_experts_fp8.cu
inline bool is_fp8(const FusedExpertsParams& p) {
  return p.w_gate_up.storage == KIMI_STORAGE_FP8_BLOCK;
}
size_t fp8_workspace_bytes(const FusedExpertsParams& p);
Status fp8_forward(const FusedExpertsParams& p, void* stream);

}  // namespace kimi::experts
