// SPDX-License-Identifier: MIT
#include "bindings/framework.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

namespace kimi::bindings {

Torch torch;

namespace {

PyObject* name_of_requires_grad = nullptr;
PyObject* is_neg = nullptr;  // torch.Tensor's method
PyObject* name_of_level = nullptr;

struct Seen {
  bool any = false, gradient = false, watched = false;
};

bool is_true(Object value) {
  const int truth = PyObject_IsTrue(value.get());
  if (truth < 0) throw Raised();
  return truth != 0;
}

bool lies_on_a_cpu_or_cuda(PyObject* tensor) {
  const Object device = checked(PyObject_GetAttrString(tensor, "device"));
  const Object type = checked(PyObject_GetAttrString(device.get(), "type"));
  return PyUnicode_CompareWithASCIIString(type.get(), "cpu") == 0 ||
         PyUnicode_CompareWithASCIIString(type.get(), "cuda") == 0;
}

// The first tensor decides on the device: what others are is for the checks to say.
void look(PyObject* tensor, Seen& seen) {
  dlpack::Tensor view;
  const bool first = !seen.any;
  seen.any = true;
  if (torch.exchange->view(tensor, &view) != 0) {
    PyErr_Clear();
    if (first && !lies_on_a_cpu_or_cuda(tensor)) seen.watched = true;
    return;
  }
  if (first && view.device.type != dlpack::kCpu && view.device.type != dlpack::kCuda)
    seen.watched = true;
  const uint8_t code = view.dtype.code;
  const bool whole = code == dlpack::kInt || code == dlpack::kUInt || code == dlpack::kBool;
  if (code == dlpack::kComplex) seen.watched = true;  // may be lazily conjugated
  if (!whole && !seen.gradient && is_true(checked(PyObject_GetAttr(tensor, name_of_requires_grad))))
    seen.gradient = true;
  if (is_true(checked(PyObject_CallOneArg(is_neg, tensor)))) seen.watched = true;
  // Elements without memory: zeros that torch computes with by rule.
  if (!view.data && std::find(view.shape, view.shape + view.ndim, 0) == view.shape + view.ndim)
    seen.watched = true;
}

void look_at_all(PyObject* const* items, Py_ssize_t count, Seen& seen) {
  for (Py_ssize_t i = 0; i < count && !seen.watched; ++i) {
    PyTypeObject* type = Py_TYPE(items[i]);
    if (torch.is(type))
      look(items[i], seen);
    else if (type == &PyList_Type || type == &PyTuple_Type)
      look_at_all(PySequence_Fast_ITEMS(items[i]), PySequence_Fast_GET_SIZE(items[i]), seen);
    else if (PyType_IsSubtype(type, torch.tensor))
      seen.watched = true;
  }
}

// Modes that see every function; `with torch.device(...)` is one that looks at new tensors alone.
bool function_modes_watch() {
  const long count = ask(torch.function_modes);
  for (long i = 0; i < count; ++i) {
    const Object index = checked(PyLong_FromLong(i));
    const Object mode = checked(PyObject_CallOneArg(torch.function_mode_at, index.get()));
    if (reinterpret_cast<PyObject*>(Py_TYPE(mode.get())) != torch.device_mode) return true;
  }
  return false;
}

bool somebody_watches() {
  return ask(torch.dispatch_modes) != 0 || ask(torch.functorch) != 0 || function_modes_watch() ||
         ask(torch.tracing) != 0;
}

bool inside_of_a_dual_level() {
  PyObject* level = PyDict_GetItemWithError(torch.dual_levels, name_of_level);
  return level && PyLong_AsLong(level) >= 0;
}

}  // namespace

std::string shown(PyObject* object) {
  const Object text = checked(PyObject_Str(object));
  const char* characters = PyUnicode_AsUTF8(text.get());
  if (!characters) throw Raised();
  return characters;
}

std::string caught() {
  // That the user stops the program is nobody's bad argument.
  if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) throw Raised();
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  const Object held[] = {Object(type), Object(value), Object(trace)};
  if (!value) return "no reason";
  const std::string text = shown(value);
  return text.substr(0, text.find('\n'));  // what follows are frames of the framework
}

long ask(PyObject* function) {
  if (!function) return 0;
  const Object answer = checked(PyObject_CallNoArgs(function));
  if (answer.get() == Py_None || answer.get() == Py_False) return 0;
  return PyLong_Check(answer.get()) ? PyLong_AsLong(answer.get()) : 1;
}

Way way(PyObject* const* arguments, Py_ssize_t count) {
  if (!torch.tensor) return kDirect;
  Seen seen;
  look_at_all(arguments, count, seen);
  if (seen.watched || (seen.any && (somebody_watches() || inside_of_a_dual_level())))
    return kWatched;
  return seen.gradient && ask(torch.grad_enabled) ? kGradient : kDirect;
}

const dlpack::Exchange* exchange_of(PyTypeObject* type) {
  if (torch.tensor && PyType_IsSubtype(type, torch.tensor)) return torch.exchange;
  const Object capsule(
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__"));
  if (!capsule.get()) {
    PyErr_Clear();
    return nullptr;
  }
  auto* header = static_cast<dlpack::ExchangeHeader*>(
      PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
  if (!header) throw Raised();
  const uint32_t newest = header->version.major;
  while (header && header->version.major != dlpack::kMajor) header = header->previous;
  if (!header) {
    PyErr_Format(PyExc_ImportError,
                 "kimi_ops: %s.__dlpack_c_exchange_api__: expected version 1 of DLPack, got %u; "
                 "update kimi_ops",
                 type->tp_name, newest);
    throw Raised();
  }
  return reinterpret_cast<const dlpack::Exchange*>(header);
}

void bind_torch(PyObject* tensor, PyObject* parameter, PyObject* functions) {
  const auto name = [](const char* text) { return checked(PyUnicode_InternFromString(text)); };
  name_of_requires_grad = name("requires_grad").release();
  is_neg = checked(PyObject_GetAttrString(tensor, "is_neg")).release();
  name_of_level = name("_current_level").release();
  Torch bound;
  const std::initializer_list<std::pair<const char*, PyObject**>> fields = {
      {"dispatch_modes", &bound.dispatch_modes},
      {"function_modes", &bound.function_modes},
      {"functorch", &bound.functorch},
      {"tracing", &bound.tracing},
      {"grad_enabled", &bound.grad_enabled},
      {"num_threads", &bound.num_threads},
      {"current_device", &bound.current_device},
      {"function_mode_at", &bound.function_mode_at},
      {"device_mode", &bound.device_mode},
      {"exchange_device", &bound.exchange_device},
      {"increment_version", &bound.increment_version},
      {"out_of_memory", &bound.out_of_memory},
      {"dual_levels", &bound.dual_levels},
      {"dtypes", &bound.dtypes},
  };
  for (const auto& [key, field] : fields) {
    *field = PyDict_GetItemString(functions, key);
    Py_XINCREF(*field);  // for ever: the module is never unloaded
  }
  auto* type = reinterpret_cast<PyTypeObject*>(tensor);
  bound.exchange = exchange_of(type);
  if (!bound.exchange || !bound.exchange->view) {
    PyErr_SetString(
        PyExc_ImportError,
        "kimi_ops: torch.Tensor.__dlpack_c_exchange_api__: expected DLPack's C exchange "
        "API, got none; install torch 2.11 or later");
    throw Raised();
  }
  Py_INCREF(tensor);
  Py_INCREF(parameter);
  bound.tensor = type;
  bound.parameter = reinterpret_cast<PyTypeObject*>(parameter);
  torch = bound;
}

}  // namespace kimi::bindings
