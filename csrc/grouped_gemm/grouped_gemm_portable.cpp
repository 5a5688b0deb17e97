// SPDX-License-Identifier: MIT
#include "common/dtype.h"
#include "grouped_gemm/grouped_gemm.h"

namespace kimi::grouped {
namespace {

template <class T, class B>
void store_rows(const StoreArguments& s) {
  for (int64_t i = 0; i < s.rows; ++i)
    for (int64_t j = 0; j < s.cols; ++j) {
      T& out = static_cast<T*>(s.out)[i * s.out_stride + j];
      float sum = s.c[i * s.c_stride + j];
      if (s.bias) sum += to_float(static_cast<const B*>(s.bias)[j]);
      if (s.accumulate) sum += to_float(out);
      out = from_float<T>(sum);
    }
}

void store(const StoreArguments& s) {
  dispatch(s.out_dtype,
           [&]<class T>() { dispatch(s.bias_dtype, [&]<class B>() { store_rows<T, B>(s); }); });
}

}  // namespace

const CpuEngine kPortableEngine = {store};

}  // namespace kimi::grouped
