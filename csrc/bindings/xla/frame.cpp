// SPDX-License-Identifier: MIT
#include "bindings/xla/frame.h"

#include <algorithm>
#include <exception>

namespace kimi::xla {
namespace {

std::string name_of(DataType dtype) {
  switch (dtype) {
    case kPred:
      return "bool";
    case kS32:
      return "int32";
    case kS64:
      return "int64";
    case kU8:
      return "uint8";
    case kF16:
      return "float16";
    case kF32:
      return "float32";
    case kF64:
      return "float64";
    case kBF16:
      return "bfloat16";
  }
  return "XLA type " + std::to_string(int(dtype));
}

template <class List>
std::string text_of(const List& dims) {
  std::string text;
  for (int64_t size : dims)
    text += (text.empty() ? "" : ", ") + (size == kAny ? "any" : std::to_string(size));
  return "[" + text + "]";
}

}  // namespace

int64_t Tensor::count() const {
  int64_t count = 1;
  for (int64_t size : dims) count *= size;
  return count;
}

kimi_dtype native(DataType dtype) {
  return dtype == kF32 ? KIMI_FLOAT32 : dtype == kBF16 ? KIMI_BFLOAT16 : KIMI_FLOAT16;
}

void Frame::refuse(const std::string& text) const { throw Refused{op + ": " + text}; }

const Tensor& Frame::checked(const Tensor& tensor, const std::string& name,
                             std::initializer_list<DataType> dtypes,
                             std::initializer_list<int64_t> shape) const {
  if (std::find(dtypes.begin(), dtypes.end(), tensor.dtype) == dtypes.end()) {
    std::string names;
    for (DataType dtype : dtypes) names += (names.empty() ? "" : ", ") + name_of(dtype);
    refuse(name + ": expected " + names + ", got " + name_of(tensor.dtype) + "; convert it");
  }
  const auto agrees = [](int64_t want, int64_t got) { return want == kAny || want == got; };
  if (tensor.dims.size() != shape.size() ||
      !std::equal(shape.begin(), shape.end(), tensor.dims.begin(), agrees))
    refuse(name + ": expected shape " + text_of(shape) + ", got " + text_of(tensor.dims));
  return tensor;
}

const Tensor& Frame::next(const char* name, std::initializer_list<DataType> dtypes,
                          std::initializer_list<int64_t> shape) {
  if (next_argument_ == arguments.size()) refuse(std::string(name) + ": expected, got no more");
  return checked(arguments[next_argument_++], name, dtypes, shape);
}

const void* Frame::optional(const char* name, DataType dtype,
                            std::initializer_list<int64_t> shape) {
  if (next_argument_ < arguments.size() &&
      arguments[next_argument_].dims == std::vector<int64_t>{0})
    return ++next_argument_, nullptr;
  return next(name, {dtype}, shape).data;
}

Tensor& Frame::out(std::initializer_list<DataType> dtypes, std::initializer_list<int64_t> shape) {
  const std::string name = "result " + std::to_string(next_result_);
  if (next_result_ == results.size()) refuse(name + ": expected, got no more");
  checked(results[next_result_], name, dtypes, shape);
  return results[next_result_++];
}

const Attribute& Frame::attribute(const char* name) const {
  const auto found = attributes.find(name);
  if (found == attributes.end()) refuse(std::string(name) + ": expected, got none");
  return found->second;
}

int64_t Frame::integer(const char* name) const {
  const auto* value = std::get_if<int64_t>(&attribute(name));
  if (!value) refuse(std::string(name) + ": expected an int");
  return *value;
}

int32_t Frame::int32(const char* name) const {
  const int64_t value = integer(name);
  if (value != int32_t(value))
    refuse(std::string(name) + ": expected an int of 32 bits, got " + std::to_string(value));
  return int32_t(value);
}

double Frame::number(const char* name) const {
  const auto* value = std::get_if<double>(&attribute(name));
  if (!value) refuse(std::string(name) + ": expected a float");
  return *value;
}

const std::vector<double>& Frame::numbers(const char* name) const {
  const auto* value = std::get_if<std::vector<double>>(&attribute(name));
  if (!value) refuse(std::string(name) + ": expected a list of numbers");
  return *value;
}

int Frame::choice(const char* name, std::initializer_list<const char*> names) const {
  const auto* value = std::get_if<std::string>(&attribute(name));
  std::string all;
  for (size_t i = 0; i < names.size(); ++i) {
    if (value && *value == names.begin()[i]) return int(i);
    all += (i ? ", " : "") + std::string(names.begin()[i]);
  }
  refuse(std::string(name) + ": expected one of " + all + ", got " + (value ? *value : "no text"));
}

void Frame::take_workspace(void*& memory, size_t& bytes) {
  const Tensor& all = out({kU8}, {kAny});
  const size_t past = reinterpret_cast<uintptr_t>(all.data) % kAlignment;
  const size_t skipped = past ? kAlignment - past : 0;
  if (size_t(all.count()) < skipped) refuse("workspace: expected more bytes");
  memory = all.as<char>() + skipped;
  bytes = size_t(all.count()) - skipped;
}

Status Frame::status_of(kimi_status status) {
  return status == KIMI_OK ? Status::ok() : Status{status, kimi_last_error()};
}

namespace {

// XLA's threads have no number of their own; that of the program's was asked when it was traced.
class Threads {
 public:
  explicit Threads(int number) : before_(kimi_num_threads()) { kimi_set_num_threads(number); }
  ~Threads() { kimi_set_num_threads(before_); }

 private:
  int before_;
};

}  // namespace

Status call(Op op, Frame& frame) {
  try {
    const Threads threads(frame.int32("threads"));
    return op(frame);
  } catch (const Refused& refused) {
    return {KIMI_INVALID_ARGUMENT, refused.message};
  } catch (const std::exception& exception) {
    return {KIMI_INTERNAL_ERROR, frame.op + ": " + exception.what()};
  }
}

}  // namespace kimi::xla
