// SPDX-License-Identifier: MIT
// fused_experts' M-grouped products on CUDA whose sums go through the activation, or its gradient,
// before they are written.
#pragma once

#include "fused_experts/fused_experts.h"
#include "gemm/product.h"
#include "gemm/sm80/product_sm80.h"

namespace kimi::experts {

enum class Pass { kForward, kBackward };

// Dense, in the product's dtype. Rows from offsets[E-1] on are not written.
struct ActivateParams {
  Activation activation;
  void* gate_up;                 // [R, 2F]; forward: out or nullptr; backward: in
  void* hidden;                  // [R, F] out; forward: or nullptr
  void* grad_gate_up = nullptr;  // backward: [R, 2F] out
  const int32_t* source;         // [R] pair of a row: weights[source[r]]
  const float* weights;          // forward: h is multiplied by them; or nullptr
  const void* bias = nullptr;    // forward: [E, 2F] or nullptr
  float* partial = nullptr;      // backward: [R, ceil(F / kPartial)] out
  bool wide = false;             // 16 bytes divide every address; activate_product says
};

// Forward: cols is F and B has 2 F rows, gate first. Groups, rows and columns may be 0.
Status activate_product(const gemm::Product& p, ActivateParams params, Pass pass, void* stream);

// The kernels behind it, by type in files of their own, which compile side by side.
template <class T>
Status activate_sm80(const gemm::sm80::Job& job, const ActivateParams& params, Pass pass,
                     void* stream);
template <class T>
Status activate_sm90(const gemm::Product& p, const ActivateParams& params, Pass pass, void* stream);
bool serves_sm90(const gemm::Product& p, Pass pass);

}  // namespace kimi::experts
