// SPDX-License-Identifier: MIT
// The structs of DLPack 1.x that a tensor crosses the border in, and the table of functions behind a
// type's __dlpack_c_exchange_api__. Their layout is an ABI: tests/operators/test_dlpack.py holds it
// against the header that torch carries.
#pragma once

#include <cstdint>

namespace kimi::dlpack {

constexpr uint32_t kMajor = 1;

struct Version {
  uint32_t major, minor;
};

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };

struct Device {
  DeviceType type;
  int32_t id;
  bool operator==(const Device&) const = default;
};

enum Code : uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kBfloat = 4,
  kComplex = 5,
  kBool = 6,
  kFloat8_e4m3fn = 10,
  kFloat8_e4m3fnuz = 11,
  kFloat8_e5m2 = 12,
  kFloat8_e5m2fnuz = 13,
  kFloat8_e8m0fnu = 14,
  kFloat4_e2m1fn = 17,
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
  bool operator==(const DataType&) const = default;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; NULL before 1.2: dense
  uint64_t byte_offset;
};

struct Managed {  // what a capsule named "dltensor" holds, before 1.0
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

constexpr uint64_t kReadOnly = 1;

struct ManagedVersioned {  // "dltensor_versioned"
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;  // the table of an older major version
};

using SetError = void (*)(void* context, const char* kind, const char* message);

struct Exchange {
  ExchangeHeader header;
  int (*allocate)(Tensor* prototype, ManagedVersioned** out, void* error_context, SetError);
  int (*to_managed)(void* object, ManagedVersioned** out);
  int (*to_object)(ManagedVersioned* tensor, void** out);
  int (*view)(void* object, Tensor* out);  // borrowed: shape and strides live with the object
  int (*current_stream)(DeviceType, int32_t device_id, void** out);
};

}  // namespace kimi::dlpack
