// SPDX-License-Identifier: MIT
// One call of an op from XLA: its buffers and attributes, their checks, its workspace. The same
// function of an op also runs without memory, when a program is traced: it then checks shapes and
// says how much workspace the program has to set aside.
#pragma once

#include <map>
#include <string>
#include <variant>
#include <vector>

#include "bindings/xla/abi.h"
#include "common/status.h"

namespace kimi::xla {

// What a function of an op throws where a call is not for it; its text is for the user.
struct Refused {
  std::string message;
};

struct Tensor {
  void* data;
  std::vector<int64_t> dims;
  DataType dtype;

  int64_t size(size_t i) const { return dims[i]; }
  int64_t count() const;
  template <class T = void>
  T* as() const {
    return static_cast<T*>(data);
  }
};

using Attribute = std::variant<int64_t, double, std::string, std::vector<double>>;
using Types = std::initializer_list<DataType>;
using Shape = std::vector<int64_t>;
constexpr int64_t kAny = -1;  // a size that is not given

class Frame {
 public:
  std::string op;
  kimi_device device = KIMI_DEVICE_CPU;
  void* stream = nullptr;
  bool traced = false;  // there is no memory
  std::vector<Tensor> arguments, results;
  std::map<std::string, Attribute, std::less<>> attributes;
  size_t workspace_bytes = 0;  // of a traced call

  // Whether the host may look at values.
  bool reads() const { return !traced && device == KIMI_DEVICE_CPU; }

  // The next argument, of one of the dtypes and this shape.
  const Tensor& next(const std::string& name, Types dtypes, const Shape& shape);
  DataType next_dtype() const;
  Shape next_dims() const;
  // NULL for an argument of shape [0], which stands for None.
  const void* optional(const std::string& name, DataType dtype, const Shape& shape);
  // The next `count` (an attribute) arguments, of one dtype and any shapes.
  std::vector<Tensor> several(const char* name, Types dtypes);
  Tensor& out(Types dtypes, const Shape& shape);
  // The next result, in the memory of an argument: the op changes it.
  Tensor& over(const char* name, const Tensor& argument);

  int64_t integer(const char* name) const;
  int32_t int32(const char* name) const;
  double number(const char* name) const;
  std::vector<double> numbers(const char* name) const;  // empty where there are none
  std::vector<int64_t> integers(const char* name) const;
  int choice(const char* name, std::initializer_list<const char*> names) const;

  template <class Params>
  Status run(kimi_status (*call)(const Params*, kimi_device, void*), const Params& p) {
    check_all_taken();
    return traced ? Status::ok() : status_of(call(&p, device, stream));
  }
  // The workspace is the last result.
  template <class Params>
  Status run(kimi_status (*call)(const Params*, kimi_device, void*), Params& p,
             size_t (*bytes)(const Params*, kimi_device)) {
    if (!traced) take_workspace(p.workspace, p.workspace_bytes);
    check_all_taken();
    if (traced) {
      workspace_bytes = bytes(&p, device) + kAlignment;
      return Status::ok();
    }
    return status_of(call(&p, device, stream));
  }
  [[noreturn]] void refuse(const std::string& text) const;

 private:
  static constexpr size_t kAlignment = 64;
  void check_all_taken() const;
  void take_workspace(void*& memory, size_t& bytes);
  const Tensor& take(const std::string& name);
  const Tensor& checked(const Tensor& tensor, const std::string& name, Types dtypes,
                        const Shape& shape) const;
  const Attribute& attribute(const char* name) const;
  static Status status_of(kimi_status status);
  size_t next_argument_ = 0, next_result_ = 0;
};

kimi_dtype native(DataType dtype);
int64_t bytes_of(DataType dtype);               // of an element
DataType dtype_named(const std::string& name);  // as NumPy names it; Refused where no op knows it

// Fills an op's params from a frame and calls it.
using Op = Status (*)(Frame&);

// op(frame) with the number of threads that the frame asks for; nothing is thrown.
Status call(Op op, Frame& frame);

}  // namespace kimi::xla
