// SPDX-License-Identifier: MIT
// One element of an operand, for strides and storages that have no faster way. Included by engine
// files: everything is inlined or in an anonymous namespace.
#pragma once

#include "gemm/cpu/block.h"

namespace kimi::cpu {
namespace {

KIMI_HOST_DEVICE int64_t gathered(const int32_t* index, int32_t divisor, int64_t i) {
  if (!index) return i;
  return index[i] < 0 ? -1 : index[i] / divisor;
}

KIMI_HOST_DEVICE float fp8_scale(const Operand& x, int64_t row, int64_t depth) {
  return static_cast<const float*>(x.scale)[row / kFp8Block * x.scale_stride + depth / kFp8Block];
}
KIMI_HOST_DEVICE float int4_scale(const Operand& x, int64_t row, int64_t depth) {
  return to_float(static_cast<const bf16*>(x.scale)[row * x.scale_stride + depth / kInt4Group]);
}

// visit.operator()<S>(): the storage as a constant, chosen once outside of a loop.
template <class Visitor>
void dispatch_storage(Storage storage, const Visitor& visit) {
  switch (storage) {
    case Storage::kBfloat16:
      return visit.template operator()<Storage::kBfloat16>();
    case Storage::kFloat16:
      return visit.template operator()<Storage::kFloat16>();
    case Storage::kFp8Block:
      return visit.template operator()<Storage::kFp8Block>();
    case Storage::kInt4Group:
      return visit.template operator()<Storage::kInt4Group>();
    default:
      return visit.template operator()<Storage::kFloat32>();
  }
}

KIMI_HOST_DEVICE float read_element(const Operand& x, int64_t row, int64_t depth) {
  const int64_t r = gathered(x.row_index, x.index_divisor, row);
  const int64_t d = gathered(x.depth_index, x.index_divisor, depth);
  if (r < 0 || d < 0) return 0.0f;
  const int64_t at = r * x.row_stride + d * x.depth_stride;
  switch (x.storage) {
    case Storage::kBfloat16:
      return to_float(static_cast<const bf16*>(x.data)[at]);
    case Storage::kFloat16:
      return to_float(static_cast<const fp16*>(x.data)[at]);
    case Storage::kFp8Block:
      return to_float(static_cast<const e4m3*>(x.data)[at]) * fp8_scale(x, row, depth);
    case Storage::kInt4Group: {
      const int32_t byte = static_cast<const uint8_t*>(x.data)[at >> 1];  // rows may run backwards
      return float((at & 1 ? byte >> 4 : byte & 15) - 8) * int4_scale(x, row, depth);
    }
    default:
      return static_cast<const float*>(x.data)[at];
  }
}

}  // namespace
}  // namespace kimi::cpu
