// SPDX-License-Identifier: MIT
// What the products over groups of rows take in the same way: group ends, and weights as they are
// stored.
#pragma once

#include "bindings/ops.h"
#include "common/integer.h"
#include "common/storage.h"
#include "grouped_gemm/check.h"

namespace kimi::bindings {

constexpr Types kFloats = {kBfloat16, kFloat16, kFloat32, kFloat64};
constexpr int64_t kInt4Word = 8;

inline bool is_quantised(Type type) { return type == kFloat8 || type == kInt32; }

inline void refuse_number(const Tensor& x) {
  if (x.ndim == 0)
    x.call->value_error(x.name, "expected rows, got a single number; pass the shape of the docs");
}

// Bounds of groups as int32: int64 ones on a CPU have been checked, elsewhere they stay too large
// where they do not fit.
inline const int32_t* narrowed(const Tensor& bounds) {
  Call& call = *bounds.call;
  if (bounds.dtype == kInt32) return bounds.dense().data<int32_t>();
  if (!bounds.is_cuda()) {
    const Tensor dense = bounds.dense();
    const int64_t* rows = dense.data<int64_t>();
    return call.keep(std::vector<int32_t>(rows, rows + bounds.size(0)));
  }
  const Object clamped = checked(PyObject_CallMethod(bounds.object, "clamp", "ii", -1, INT32_MAX));
  return call.keep(checked(PyObject_CallMethod(clamped.get(), "int", nullptr)), bounds.name)
      .dense()
      .data<int32_t>();
}

struct Groups {
  const int32_t *offsets, *starts;
};

// Inclusive end rows of the groups of `rows`, and their first rows where those are given;
// experts < 0: any number of them.
inline Groups groups_of(const Tensor& offsets, const Tensor& starts, int64_t experts,
                        const Tensor& rows) {
  Call& call = *offsets.call;
  refuse_number(offsets);
  offsets.of({kInt32, kInt64});
  if (offsets.ndim != 1 || (experts >= 0 && offsets.size(0) != experts)) {
    const std::string wanted = experts < 0 ? "E" : "E=" + std::to_string(experts);
    call.value_error("offsets", "expected shape [", wanted, "], got ", offsets.shape_text(),
                     "; pass one end row for each expert");
  }
  if (starts) starts.of({offsets.dtype}).shape({offsets.size(0)});
  const bool wide = offsets.dtype == kInt64,
             kernel_reads = !rows.is_cuda() && is_native(rows.dtype);
  if (call.reads(offsets) && (wide || !kernel_reads)) {
    const Tensor ends = call.on_host(offsets).dense(),
                 firsts = starts ? call.on_host(starts).dense() : starts;
    const std::string op(call.op);
    const auto check = [&]<class Int>(const Int* bounds) {
      call.check(check_offsets(op.c_str(), bounds, ends.size(0), rows.size(0),
                               starts ? firsts.template data<Int>() : nullptr));
    };
    wide ? check(ends.data<int64_t>()) : check(ends.data<int32_t>());
  }
  return {narrowed(offsets), starts ? narrowed(starts) : nullptr};
}
inline const int32_t* offsets_of(const Tensor& offsets, int64_t experts, const Tensor& rows) {
  return groups_of(offsets, {}, experts, rows).offsets;
}

// The dtype of a result beside operands of `type`: the same, or the sums in float32.
inline void check_result_type(Call& call, const char* name, Type type, Type operands) {
  if (type == operands || (type == kFloat32 && operands != kFloat64)) return;
  const std::string allowed = operands == kFloat64   ? "float64"
                              : operands == kFloat32 ? "float32"
                                                     : name_of(operands) + " or float32";
  call.type_error(name, "expected ", allowed, ", got ", name_of(type), "; choose one of these");
}

inline void check_out(const Tensor& out, std::initializer_list<int64_t> sizes, const Tensor& a) {
  const bool fits =
      out.ndim == int(sizes.size()) && std::equal(sizes.begin(), sizes.end(), out.sizes);
  if (fits) return;
  std::string wanted;
  for (int64_t size : sizes) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  out.call->value_error("out", "expected shape [", wanted, "] on ", a.device_text(), ", got ",
                        out.shape_text(), " on ", out.device_text(),
                        "; allocate it with that shape");
}

inline const void* bias_of(const Tensor& bias, Type type, int64_t experts, int64_t n) {
  if (!bias) return nullptr;
  return bias.of({type}).shape({experts, n}, "pass one row for each expert").dense().data();
}

// The scales of quantised matrices [E, rows, columns]; `name` is what messages call them.
inline const void* scale_of(const Tensor& scale, const Tensor& data, int64_t columns) {
  const bool packed = data.dtype == kInt32;
  const int64_t rows = data.size(1);
  scale.of({packed ? kBfloat16 : kFloat32});
  scale.shape({data.size(0), packed ? rows : ceil_div(rows, kFp8Block),
               ceil_div(columns, packed ? kInt4Group : kFp8Block)});
  return scale.data();
}

}  // namespace kimi::bindings
