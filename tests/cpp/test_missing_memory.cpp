// SPDX-License-Identifier: MIT
// What the C API refuses: memory that is missing and strides that were forgotten.
#include <cstring>

#include "engines.h"
#include "kimi_ops.h"

namespace {

using kimi::test::Workspace;

template <class Params>
void expect(kimi_status (*op)(const Params*, kimi_device, void*), const Params& p,
            const char* text) {
  const kimi_status status = op(&p, KIMI_DEVICE_CPU, nullptr);
  const bool good = text ? status == KIMI_INVALID_ARGUMENT && std::strstr(kimi_last_error(), text)
                         : status == KIMI_OK;
  kimi::test::check(good, "expected %s, got status %d", text ? text : "success", int(status));
}

alignas(64) float x[64], y[64], z[64];
int32_t row_map[] = {0, 1, 2, 3}, dropped[] = {-1, -1, -1, -1}, source[] = {0, 1, 2, 3},
        offsets[] = {2, 4};
float weights[] = {1, 1, 1, 1};
constexpr int64_t kRows = 4, kColumns = 4;

void test_permute() {
  kimi_unpermute_params p = {};
  p.y = y, p.row_map = row_map, p.x = x;
  p.num_tokens = kRows, p.hidden = p.y_stride = kColumns, p.top_k = 1;
  expect(kimi_unpermute, p, nullptr);
  p.y = nullptr;
  expect(kimi_unpermute, p, "unpermute: expected pointers");
  p.row_map = dropped;
  expect(kimi_unpermute, p, nullptr);

  kimi_unpermute_backward_params b = {};
  b.grad_x = x, b.y = y, b.row_map = row_map, b.source = source, b.weights = weights;
  b.grad_y = z, b.grad_weights = z + 32;
  b.num_tokens = b.num_rows = kRows, b.top_k = 1;
  b.hidden = b.grad_x_stride = b.y_stride = kColumns;
  expect(kimi_unpermute_backward, b, nullptr);
  for (auto pointer :
       {&kimi_unpermute_backward_params::grad_x, &kimi_unpermute_backward_params::y}) {
    kimi_unpermute_backward_params without = b;
    without.*pointer = nullptr;
    expect(kimi_unpermute_backward, without, "unpermute_backward: expected pointers");
  }
}

void test_fused_experts() {
  kimi_fused_experts_params p = {};
  p.x = x, p.y = y, p.weights = weights, p.row_map = row_map, p.source = source;
  p.offsets = offsets;
  p.w_gate_up = {z, nullptr, 16, 4, 1, KIMI_STORAGE_FLOAT32};  // [2, 2 x 2, 4]
  p.w_down = {z, nullptr, 8, 2, 1, KIMI_STORAGE_FLOAT32};      // [2, 4, 2]
  p.num_tokens = kRows, p.hidden = p.x_stride = kColumns, p.width = 2;
  p.num_experts = 2, p.top_k = 1;
  const Workspace forward(p, kimi_fused_experts_workspace_bytes);
  kimi_fused_experts_backward_params b = {};
  b.dy = b.x = x, b.weights = weights, b.row_map = row_map, b.source = source;
  b.offsets = offsets;
  b.w_gate_up = p.w_gate_up, b.w_down = p.w_down, b.dx = y;
  b.num_tokens = kRows, b.hidden = b.x_stride = b.dy_stride = kColumns, b.width = 2;
  b.num_experts = 2, b.top_k = 1;
  const Workspace backward(b, kimi_fused_experts_backward_workspace_bytes);
  expect(kimi_fused_experts, p, nullptr);
  expect(kimi_fused_experts_backward, b, nullptr);
  p.w_gate_up.data = b.w_down.data = nullptr;
  expect(kimi_fused_experts, p, "fused_experts: w_gate_up: expected a pointer");
  expect(kimi_fused_experts_backward, b, "fused_experts_backward: w_down: expected a pointer");
  p.width = b.width = 0;
  p.w_down.data = b.w_gate_up.data = nullptr;
  expect(kimi_fused_experts, p, nullptr);
  expect(kimi_fused_experts_backward, b, nullptr);
}

void test_fp8_rows() {
  kimi_fp8_rows_params p = {};
  p.x = x, p.data = y, p.scale = z;
  p.num_rows = p.scale_stride = kRows, p.k = p.x_row_stride = kColumns;
  expect(kimi_fp8_rows, p, nullptr);
  p.x_row_stride = 0;
  expect(kimi_fp8_rows, p, "fp8_rows: x_row_stride: expected the distance");
  p.num_rows = 1;
  expect(kimi_fp8_rows, p, nullptr);
}

void test_wgrad() {
  kimi_grouped_gemm_wgrad_params p = {};
  p.a = x, p.dc = y, p.offsets = offsets, p.out = z;  // [2, 4, 4]
  p.num_rows = kRows, p.k = p.n = kColumns, p.num_experts = 2;
  p.a_row_stride = p.dc_row_stride = p.out_k_stride = kColumns;
  p.a_k_stride = p.dc_n_stride = p.out_n_stride = 1;
  p.out_expert_stride = 16;
  const Workspace workspace(p, kimi_grouped_gemm_wgrad_workspace_bytes);
  expect(kimi_grouped_gemm_wgrad, p, nullptr);
  kimi_grouped_gemm_wgrad_params forgotten = p;
  forgotten.out_expert_stride = 0;
  expect(kimi_grouped_gemm_wgrad, forgotten, "wgrad: out_expert_stride: expected the distance");
  forgotten = p;
  forgotten.out_k_stride = 0;
  expect(kimi_grouped_gemm_wgrad, forgotten, "wgrad: out_k_stride: expected the distance");
  forgotten.out_k_stride = 1;
  forgotten.out_n_stride = 0;
  expect(kimi_grouped_gemm_wgrad, forgotten, "wgrad: out_n_stride: expected the distance");
  p.num_experts = 1;
  p.out_expert_stride = 0;
  expect(kimi_grouped_gemm_wgrad, p, nullptr);
}

void test_newton_schulz() {
  for (float& value : x) value = float(&value - x) - 31;
  const void* g[] = {x};
  void* into[] = {y};
  const float coefficients[] = {3.4445f, -4.775f, 2.0315f};
  kimi_newton_schulz_params p = {};
  p.g = g, p.x = into, p.coefficients = coefficients;
  p.num_matrices = p.steps = 1, p.rows = kRows, p.cols = kColumns;
  p.g_row_stride = p.x_row_stride = kColumns;
  p.g_col_stride = p.x_col_stride = 1;
  const Workspace workspace(p, kimi_newton_schulz_workspace_bytes);
  expect(kimi_newton_schulz, p, nullptr);
  kimi_newton_schulz_params forgotten = p;
  forgotten.g_row_stride = 0;
  expect(kimi_newton_schulz, forgotten, "g_row_stride, g_col_stride: expected the distance");
  for (int64_t stride : {0, 3}) {
    forgotten = p;
    forgotten.x_row_stride = stride;
    expect(kimi_newton_schulz, forgotten, "newton_schulz: x: expected lines of 4 elements");
  }
  into[0] = x;
  expect(kimi_newton_schulz, p, nullptr);
  const char* shared = "newton_schulz: x: expected memory of its own";
  forgotten = p;
  forgotten.x_row_stride = 8;
  expect(kimi_newton_schulz, forgotten, shared);
  forgotten.rows = 1;
  expect(kimi_newton_schulz, forgotten, nullptr);
  forgotten = p;
  forgotten.x_dtype = KIMI_BFLOAT16;
  expect(kimi_newton_schulz, forgotten, shared);
  into[0] = x + 4;
  expect(kimi_newton_schulz, p, shared);
  into[0] = x + 16;
  expect(kimi_newton_schulz, p, nullptr);
}

}  // namespace

int main() {
  test_permute();
  test_fused_experts();
  test_fp8_rows();
  test_wgrad();
  test_newton_schulz();
  return kimi::test::report("refusals");
}
