// SPDX-License-Identifier: MIT
// A call: its arguments, and the one call of the C API.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <deque>
#include <map>

#include "bindings/tensors.h"

namespace kimi::bindings {

kimi_device device_of_cpu_tensors = KIMI_DEVICE_CPU;

// ---- arguments ---------------------------------------------------------------------------------

Call::Call(const char* op, PyObject* const* arguments, bool of_torch)
    : op(op), arguments_(arguments), of_torch_(of_torch) {}

Call::~Call() {
  for (PyObject* object : kept_) Py_DECREF(object);
  for (PyObject* object : outputs_) Py_DECREF(object);
  for (dlpack::ManagedVersioned* memory : managed_) memory->deleter(memory);
}

void Call::raise(PyObject* type, std::string_view name, const std::string& text) const {
  std::string message(op);
  if (!name.empty()) message.append(": ").append(name);
  message.append(": ").append(text);
  PyErr_SetString(type, message.c_str());
  throw Raised();
}

Tensor Call::keep(Object object, std::string_view name) {
  kept_.push_back(object.release());
  return view_of(kept_.back(), name);
}

std::string_view Call::keep(std::string name) { return names_.emplace_back(std::move(name)); }

Tensor Call::tensor(const char* name) { return argument(next(), name); }

Tensor Call::optional(const char* name) {
  PyObject* object = next();
  if (object != Py_None) return argument(object, name);
  Tensor none;
  none.call = this;
  none.name = name;
  return none;
}

std::vector<Tensor> Call::tensors(const char* name) {
  // What the items are called in messages, kept for ever (guarded by Python's lock): every call
  // needs names, and hardly one shows them.
  static std::map<const char*, std::deque<std::string>> known;
  std::deque<std::string>& names = known[name];
  const std::vector<PyObject*> objects = items(name, "tensors");
  std::vector<Tensor> tensors;
  tensors.reserve(objects.size());
  for (size_t i = 0; i < objects.size(); ++i) {
    if (i == names.size()) names.push_back(std::string(name) + "[" + std::to_string(i) + "]");
    tensors.push_back(argument(objects[i], names[i]));
  }
  return tensors;
}

int64_t Call::integer(const char* name) {
  PyObject* object = next();
  Object converted;
  if (!PyLong_CheckExact(object)) {
    if (PyBool_Check(object) || !PyIndex_Check(object))
      type_error(name, "expected an int, got ", Py_TYPE(object)->tp_name, "; pass int(", name, ")");
    converted = Object(PyNumber_Index(object));
    if (!converted.get()) type_error(name, "expected an int: ", caught());
    object = converted.get();
  }
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
  if (overflow) value_error(name, "expected an int of 64 bits, got a larger one");
  return value;
}

int32_t Call::int32(const char* name) {
  const int64_t value = integer(name);
  if (value != int32_t(value)) value_error(name, "expected an int of 32 bits, got ", value);
  return int32_t(value);
}

double Call::number(const char* name) {
  PyObject* object = next();
  if (PyFloat_Check(object)) {
    const double value = PyFloat_AS_DOUBLE(object);
    if (!std::isfinite(value))
      value_error(name, "expected a finite number, got ", shown(object),
                  "; check where it comes from");
    return value;
  }
  if (!PyLong_Check(object) || PyBool_Check(object))
    type_error(name, "expected a number, got ", Py_TYPE(object)->tp_name);
  const double value = PyLong_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    value_error(name, "expected a number of 64 bits, got a larger one");
  }
  return value;
}

bool Call::truth() {
  const int value = PyObject_IsTrue(next());
  if (value < 0) type_error("", "expected truth values of its switches: ", caught());
  return value != 0;
}

Type Call::type(const char* name) {
  PyObject* object = next();
  const bool named = PyTuple_Check(object);  // (code, bits), without torch
  PyObject* found = named          ? object
                    : torch.dtypes ? PyDict_GetItemWithError(torch.dtypes, object)
                                   : nullptr;
  int code, bits;
  if (!found || !PyArg_ParseTuple(found, "ii", &code, &bits)) {
    PyErr_Clear();
    type_error(name, "expected a dtype that the kernels know, got ", shown(object));
  }
  return {uint8_t(code), uint8_t(bits), 1};
}

// The items of the next argument, which it owns; a list of the call's own, for another may change.
std::vector<PyObject*> Call::items(const char* name, const char* what) {
  PyObject* object = next();
  PyObject* list = PySequence_Tuple(object);
  if (!list) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw Raised();
    PyErr_Clear();
    type_error(name, "expected a list of ", what, ", got ", Py_TYPE(object)->tp_name);
  }
  kept_.push_back(list);
  PyObject** first = PySequence_Fast_ITEMS(list);
  return {first, first + PyTuple_GET_SIZE(list)};
}

std::vector<int64_t> Call::integers(const char* name) {
  std::vector<int64_t> values;
  for (PyObject* item : items(name, "ints")) {
    values.push_back(PyLong_AsLongLong(item));
    if (values.back() == -1 && PyErr_Occurred())
      type_error(name, "expected a list of ints of 64 bits: ", caught());
  }
  return values;
}

std::vector<double> Call::numbers(const char* name) {
  std::vector<double> values;
  for (PyObject* item : items(name, "numbers")) {
    values.push_back(PyFloat_AsDouble(item));
    if (values.back() == -1.0 && PyErr_Occurred())
      type_error(name, "expected a list of numbers: ", caught());
  }
  return values;
}

int Call::choose(const char* name, std::initializer_list<const char*> expected) {
  PyObject* object = next();
  std::string names;
  for (size_t i = 0; i < expected.size(); ++i) {
    const char* choice = expected.begin()[i];
    if (PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, choice) == 0)
      return int(i);
    names += (i ? ", " : "") + std::string(choice);
  }
  const Object text = checked(PyObject_Repr(object));
  value_error(name, "expected one of ", names, ", got ", shown(text.get()));
}

// ---- the call ----------------------------------------------------------------------------------

kimi_device Call::device() {
  if (device_.type == dlpack::kCuda) return KIMI_DEVICE_CUDA;
  // OpenMP's own number is per thread and per runtime; torch's is the one that the user sets.
  if (torch.num_threads) check(kimi_set_num_threads(int(ask(torch.num_threads))));
  return device_of_cpu_tensors;
}

namespace {

// The CUDA device of a call is the current one while this lives.
class Current {
 public:
  explicit Current(dlpack::Device device) {
    if (device.type != dlpack::kCuda || !torch.exchange_device) return;
    if (ask(torch.current_device) == device.id) return;
    const Object before = checked(PyObject_CallFunction(torch.exchange_device, "i", device.id));
    before_ = PyLong_AsLong(before.get());
  }
  ~Current() {
    if (before_ < 0) return;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    const Object after(PyObject_CallFunction(torch.exchange_device, "l", before_));
    PyErr_Restore(type, value, trace);
  }

 private:
  long before_ = -1;
};

}  // namespace

void Call::run(kimi_status (*function)(const void*, kimi_device, void*), const void* arguments) {
  const kimi_device where = device();
  const Current current(device_);
  void* stream = nullptr;
  if (origin_allocates())
    stream = PyLong_AsVoidPtr(checked(PyObject_GetAttrString(origin_, "stream")).get());
  else if (device_.type == dlpack::kCuda)
    exchange_->current_stream(device_.type, device_.id, &stream);
  if (PyErr_Occurred()) throw Raised();
  kimi_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = function(arguments, where, stream);
  Py_END_ALLOW_THREADS;
  check(status);
}

bool Call::served(int32_t (*ask)(kimi_device)) {
  const Current current(device_);
  return ask(device()) != 0;
}

void Call::check(kimi_status status) const {
  if (status == KIMI_OK) return;
  PyErr_SetString(status == KIMI_INVALID_ARGUMENT ? PyExc_ValueError : PyExc_RuntimeError,
                  kimi_last_error());
  throw Raised();
}

void Call::check(const Status& status) const {
  if (status.is_ok()) return;
  PyErr_SetString(PyExc_ValueError, status.message.c_str());
  throw Raised();
}

bool Call::reads(const Tensor& tensor) const {
  if (!tensor.is_cuda()) return true;
  const char* asked = std::getenv("KIMI_OPS_CHECK");
  return asked && std::string_view(asked) == "1";
}

Tensor Call::on_host(const Tensor& tensor) {
  if (!tensor.is_cuda()) return tensor;
  return keep(checked(PyObject_CallMethod(tensor.object, "cpu", nullptr)), tensor.name);
}

void Call::write_back(std::initializer_list<Written> lists) {
  std::vector<PyObject*> in_place;  // one call of torch for all
  for (const auto& [targets, written] : lists)
    for (size_t i = 0; i < targets.size(); ++i) {
      const Tensor& target = targets[i];
      if (target.object == written[i].object) {
        if (torch.increment_version && torch.is(Py_TYPE(target.object)))
          in_place.push_back(target.object);
        continue;
      }
      if (!PyObject_HasAttrString(target.object, "copy_"))
        value_error(target.name, "expected contiguous memory, got strides ", target.strides_text(),
                    "; pass a contiguous array");
      checked(PyObject_CallMethod(target.object, "copy_", "O", written[i].object));
    }
  if (in_place.empty()) return;
  const Object list = checked(PyList_New(Py_ssize_t(in_place.size())));
  for (size_t i = 0; i < in_place.size(); ++i)
    PyList_SET_ITEM(list.get(), Py_ssize_t(i), Py_NewRef(in_place[i]));
  checked(PyObject_CallOneArg(torch.increment_version, list.get()));
}

PyObject* Call::handed_over(const Output& output) {
  PyObject*& owned = *std::find(outputs_.begin(), outputs_.end(), output.object);
  PyObject* object = owned;
  owned = outputs_.back();
  outputs_.pop_back();
  return object;
}

PyObject* Call::result(const Output& output, bool transposed) {
  if (transposed) return checked(PyObject_GetAttrString(output.object, "mT")).release();
  return handed_over(output);
}

PyObject* Call::result(std::initializer_list<Output> outputs) {
  Object tuple = checked(PyTuple_New(Py_ssize_t(outputs.size())));
  Py_ssize_t i = 0;
  for (const Output& output : outputs) PyTuple_SET_ITEM(tuple.get(), i++, handed_over(output));
  return tuple.release();
}

PyObject* Call::list(const std::vector<Output>& outputs) {
  Object list = checked(PyList_New(Py_ssize_t(outputs.size())));
  Py_ssize_t i = 0;
  for (const Output& output : outputs) PyList_SET_ITEM(list.get(), i++, handed_over(output));
  return list.release();
}

PyObject* Call::none() { Py_RETURN_NONE; }
PyObject* Call::not_implemented() { Py_RETURN_NOTIMPLEMENTED; }

}  // namespace kimi::bindings
