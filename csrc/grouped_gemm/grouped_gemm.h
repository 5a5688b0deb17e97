// SPDX-License-Identifier: MIT
// grouped_gemm: one matrix product for each expert's rows, and the gradient in the matrices.
//
//   forward  out[r] (+)= a[r] b[e] + bias[e]   offsets[e-1] <= r < offsets[e], zero rows after the
//            last group. dgrad is the same with b's strides of K and N exchanged.
//   wgrad    out[e] (+)= a[rows of e]^T dc[rows of e]
//
// With starts group e begins at starts[e], and rows between groups are as those after the last one.
//
// Sums are fp32: products of bf16 pairs where the processor has them, else of operands converted to
// fp32; rounded once to the dtype of out. The sum over depth is taken in blocks (gemm/cpu/block.h), in
// the same order whatever the number of threads; a group of very few rows has an order of its own.
// A wgrad added to fp32 adds one block of depth after the other.
//
// Cost: 2 R K N operations. Forward reads each used expert's matrix once from memory for every 280
// of its rows, wgrad writes it once.
//
//   experts, most work first      blocks of up to 280 rows x 256 columns    tasks, taken in turn
//   [ e5 ............ ]   ->      [b00][b01][b02]                     ->    thread 0: b00 b02 ...
//   [ e2 ....... ]                [b10][b11][b12]                           thread 1: b01 b10 ...
//
// Superset of torch.nn.functional.grouped_mm.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "cpu/engines.h"

namespace kimi {

using GroupedGemmParams = kimi_grouped_gemm_params;
using GroupedGemmWgradParams = kimi_grouped_gemm_wgrad_params;

size_t grouped_gemm_workspace_bytes(const GroupedGemmParams& p, kimi_device device);
Status grouped_gemm(const GroupedGemmParams& p, kimi_device device, void* stream);
size_t grouped_gemm_wgrad_workspace_bytes(const GroupedGemmWgradParams& p, kimi_device device);
Status grouped_gemm_wgrad(const GroupedGemmWgradParams& p, kimi_device device, void* stream);

// grouped_gemm.cu. Arguments have been checked, offsets have not.
Status grouped_gemm_cuda(const GroupedGemmParams& p, void* stream);
Status grouped_gemm_wgrad_cuda(const GroupedGemmWgradParams& p, void* stream);

namespace grouped {

// Finished sums become output: out[i, j] = round(c[i, j] (+ bias[j]) (+ out[i, j])).
struct StoreArguments {
  const float* c;  // [rows, cols], row stride c_stride
  int64_t c_stride;
  int64_t rows, cols;
  const void* bias;  // [cols] bias_dtype, or nullptr
  kimi_dtype bias_dtype;
  void* out;  // [rows, cols] out_dtype, row stride out_stride
  int64_t out_stride;
  kimi_dtype out_dtype;
  bool accumulate;
  bool stream;  // write around the cache
};
struct CpuEngine {
  void (*store)(const StoreArguments& arguments);
};
KIMI_CPU_ENGINES(CpuEngine);

}  // namespace grouped
}  // namespace kimi
