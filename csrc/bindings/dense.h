// SPDX-License-Identifier: MIT
// Dense memory of a CPU as DLPack hands it over.
#pragma once

#include <vector>

#include "bindings/dlpack.h"
#include "common/volume.h"

namespace kimi::bindings {

inline std::vector<int64_t> dense_strides(int ndim, const int64_t* sizes) {
  std::vector<int64_t> strides(size_t(ndim), 1);
  for (int i = ndim - 2; i >= 0; --i)
    strides[size_t(i)] = volume(strides[size_t(i) + 1], sizes[i + 1]);
  return strides;
}

// What a tensor of `type` and `sizes` says of itself; who derives from it holds the memory.
struct Dense {
  dlpack::ManagedVersioned managed = {};
  std::vector<int64_t> sizes, strides;

  Dense(dlpack::DataType type, int ndim, const int64_t* of)
      : sizes(of, of + ndim), strides(dense_strides(ndim, of)) {
    managed.version = {dlpack::kMajor, 0};
    managed.context = this;
    managed.tensor = {nullptr, {dlpack::kCpu, 0}, ndim, type, sizes.data(), strides.data(), 0};
  }
  Dense(const Dense&) = delete;  // the tensor points into it
};

}  // namespace kimi::bindings
