// SPDX-License-Identifier: MIT
#include "bindings/xla/frame.h"

#include <algorithm>
#include <exception>

#include "common/volume.h"

namespace kimi::xla {
namespace {

struct Known {
  DataType dtype;
  const char* name;
  int64_t bytes;
};
constexpr Known kKnown[] = {{kPred, "bool", 1},   {kU8, "uint8", 1},      {kU32, "uint32", 4},
                            {kS32, "int32", 4},   {kS64, "int64", 8},     {kF8, "float8_e4m3fn", 1},
                            {kF16, "float16", 2}, {kBF16, "bfloat16", 2}, {kF32, "float32", 4},
                            {kF64, "float64", 8}};

std::string name_of(DataType dtype) {
  for (const Known& known : kKnown)
    if (known.dtype == dtype) return known.name;
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
  for (int64_t size : dims) count = volume(count, size);
  return count;
}

kimi_dtype native(DataType dtype) {
  return dtype == kF32 ? KIMI_FLOAT32 : dtype == kBF16 ? KIMI_BFLOAT16 : KIMI_FLOAT16;
}

int64_t bytes_of(DataType dtype) {
  for (const Known& known : kKnown)
    if (known.dtype == dtype) return known.bytes;
  return 0;
}

DataType dtype_named(const std::string& name) {
  for (const Known& known : kKnown)
    if (name == known.name) return known.dtype;
  throw Refused{"dtype: expected one of XLA's that the ops know, got " + name};
}

void Frame::refuse(const std::string& text) const { throw Refused{op + ": " + text}; }

const Tensor& Frame::checked(const Tensor& tensor, const std::string& name, Types dtypes,
                             const Shape& shape) const {
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

const Tensor& Frame::take(const std::string& name) {
  if (next_argument_ == arguments.size()) refuse(name + ": expected, got no more");
  return arguments[next_argument_++];
}

DataType Frame::next_dtype() const {
  return next_argument_ < arguments.size() ? arguments[next_argument_].dtype : kPred;
}

Shape Frame::next_dims() const {
  return next_argument_ < arguments.size() ? arguments[next_argument_].dims : Shape{};
}

const Tensor& Frame::next(const std::string& name, Types dtypes, const Shape& shape) {
  return checked(take(name), name, dtypes, shape);
}

const void* Frame::optional(const std::string& name, DataType dtype, const Shape& shape) {
  if (next_argument_ < arguments.size() && arguments[next_argument_].dims == Shape{0})
    return ++next_argument_, nullptr;
  return next(name, {dtype}, shape).data;
}

std::vector<Tensor> Frame::several(const char* name, Types dtypes) {
  const int64_t count = integer("count");
  if (count < 1) refuse(std::string(name) + ": expected at least one array, got none");
  std::vector<Tensor> tensors;
  for (int64_t i = 0; i < count; ++i) {
    const std::string item = std::string(name) + "[" + std::to_string(i) + "]";
    const Tensor& tensor = take(item);
    checked(tensor, item, dtypes, tensor.dims);
    tensors.push_back(tensor);
    checked(tensor, item, {tensors[0].dtype}, tensor.dims);
  }
  return tensors;
}

Tensor& Frame::out(Types dtypes, const Shape& shape) {
  const std::string name = "result " + std::to_string(next_result_);
  if (next_result_ == results.size()) refuse(name + ": expected, got no more");
  checked(results[next_result_], name, dtypes, shape);
  return results[next_result_++];
}

Tensor& Frame::over(const char* name, const Tensor& argument) {
  Tensor& result = out({argument.dtype}, argument.dims);
  if (!traced && argument.count() > 0 && result.data != argument.data)
    refuse(std::string(name) + ": expected the memory of the result");
  return result;
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

std::vector<double> Frame::numbers(const char* name) const {
  if (attributes.find(name) == attributes.end()) return {};
  const auto* value = std::get_if<std::vector<double>>(&attribute(name));
  if (!value) refuse(std::string(name) + ": expected a list of numbers");
  return *value;
}

std::vector<int64_t> Frame::integers(const char* name) const {
  const std::vector<double> values = numbers(name);
  return {values.begin(), values.end()};
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

void Frame::check_all_taken() const {
  const auto check = [&](const char* what, size_t taken, size_t given) {
    if (taken < given)
      refuse(std::string(what) + ": expected " + std::to_string(taken) + ", got " +
             std::to_string(given));
  };
  check("arrays", next_argument_, arguments.size());
  check("results", next_result_, results.size());
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
  explicit Threads(int number) : number_(number), before_(kimi_num_threads()) { choose(number_); }
  ~Threads() { choose(before_); }

 private:
  // A thread that has the number already goes on asking OpenMP for its own.
  void choose(int number) const {
    if (number_ != before_) kimi_set_num_threads(number);
  }
  int number_, before_;
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
