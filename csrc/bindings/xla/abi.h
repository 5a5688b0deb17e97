// SPDX-License-Identifier: MIT
// The structs of XLA's foreign function interface that a handler is called with. Their layout is an
// ABI of major version 0 (fields are only added at ends); tests/arrays holds it against the header that
// jaxlib carries. No header of XLA is needed to build, and no version of jax is bound.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kimi::xla {

constexpr int kMajor = 0;

struct Extension {
  size_t struct_size;
  int32_t type;
  Extension* next;
};
constexpr int32_t kMetadata = 1;

struct Version {
  size_t struct_size;
  Extension* extension;
  int major, minor;
};

struct Metadata {
  size_t struct_size;
  Version version;
  uint32_t traits;
};
constexpr uint32_t kCommandBufferCompatible = 1;

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

enum ErrorCode : int32_t { kInvalidArgument = 3, kUnimplemented = 12, kInternal = 13 };
struct Error;
struct CreateError {
  size_t struct_size;
  Extension* extension;
  const char* message;
  ErrorCode code;
};

struct Context;
struct GetStream {
  size_t struct_size;
  Extension* extension;
  Context* context;
  void* stream;  // out
};

struct Api {
  size_t struct_size;
  Extension* extension;
  Version version;
  const void* internal;
  Error* (*create_error)(CreateError*);
  void* others[3];  // of errors, and the registration of handlers
  Error* (*get_stream)(GetStream*);
};

enum DataType : int32_t {
  kPred = 1,
  kS32 = 4,
  kS64 = 5,
  kU8 = 6,
  kU32 = 8,
  kF16 = 10,
  kF32 = 11,
  kF64 = 12,
  kBF16 = 16,
  kF8 = 20,  // e4m3fn
};

struct Buffer {
  size_t struct_size;
  Extension* extension;
  DataType dtype;
  void* data;
  int64_t rank;
  int64_t* dims;
};

struct Span {
  const char* text;
  size_t length;
};
struct Scalar {
  DataType dtype;
  void* value;
};
struct Array {
  DataType dtype;
  size_t size;
  void* data;
};
enum AttributeType : int32_t { kArray = 1, kScalar = 3, kString = 4 };

struct Buffers {  // arguments or results
  size_t struct_size;
  Extension* extension;
  int64_t size;
  int32_t* types;  // 1: a buffer
  void** items;
};
struct Attributes {
  size_t struct_size;
  Extension* extension;
  int64_t size;
  AttributeType* types;
  Span** names;
  void** items;
};

struct CallFrame {
  size_t struct_size;
  Extension* extension;
  const Api* api;
  Context* context;
  int32_t stage;
  Buffers arguments, results;
  Attributes attributes;
};

}  // namespace kimi::xla
