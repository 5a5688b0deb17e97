// SPDX-License-Identifier: MIT
// Handlers of XLA: the frame of a call becomes that of an op (frame.h), its status an error of XLA.
// Each op has one for CPUs and one for CUDA, handed to jax as capsules; CUDA's queue their work and
// read nothing back, so XLA may capture them in its command buffers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/xla/ops.h"

namespace py = pybind11;

namespace kimi::xla {
namespace {

Tensor tensor_of(void* item) {
  const auto& buffer = *static_cast<const Buffer*>(item);
  return {buffer.data, {buffer.dims, buffer.dims + buffer.rank}, buffer.dtype};
}

double number_at(DataType dtype, const void* data, size_t i) {
  switch (dtype) {
    case kS32:
      return static_cast<const int32_t*>(data)[i];
    case kS64:
      return double(static_cast<const int64_t*>(data)[i]);
    case kF32:
      return static_cast<const float*>(data)[i];
    default:
      return static_cast<const double*>(data)[i];
  }
}

Attribute attribute_of(AttributeType type, const void* item) {
  if (type == kString) {
    const auto& span = *static_cast<const Span*>(item);
    return std::string(span.text, span.length);
  }
  if (type == kArray) {
    const auto& array = *static_cast<const Array*>(item);
    std::vector<double> numbers;
    for (size_t i = 0; i < array.size; ++i)
      numbers.push_back(number_at(array.dtype, array.data, i));
    return numbers;
  }
  const auto& scalar = *static_cast<const Scalar*>(item);
  if (scalar.dtype == kS32) return int64_t{*static_cast<const int32_t*>(scalar.value)};
  if (scalar.dtype == kS64) return *static_cast<const int64_t*>(scalar.value);
  return number_at(scalar.dtype, scalar.value, 0);
}

Error* error_of(const CallFrame& call, const Status& status) {
  CreateError arguments = {sizeof(CreateError), nullptr, status.message.c_str(), kInternal};
  if (status.code == KIMI_INVALID_ARGUMENT) arguments.code = kInvalidArgument;
  if (status.code == KIMI_UNSUPPORTED) arguments.code = kUnimplemented;
  return call.api->create_error(&arguments);
}

// XLA asks once what a handler is. It speaks the version of whoever asks: the fields that it uses
// are in every minor version of the major one.
Error* describe(CallFrame& call, kimi_device device) {
  Metadata& metadata = *reinterpret_cast<MetadataExtension*>(call.extension)->metadata;
  metadata.version.major = kMajor;
  metadata.version.minor = call.api->version.minor;
  metadata.traits = device == KIMI_DEVICE_CUDA ? kCommandBufferCompatible : 0;
  return nullptr;
}

Error* run(CallFrame* frame, const char* name, Op op, kimi_device device) {
  if (frame->extension && frame->extension->type == kMetadata) return describe(*frame, device);
  Frame f;
  f.op = name;
  f.device = device;
  for (int64_t i = 0; i < frame->arguments.size; ++i)
    f.arguments.push_back(tensor_of(frame->arguments.items[i]));
  for (int64_t i = 0; i < frame->results.size; ++i)
    f.results.push_back(tensor_of(frame->results.items[i]));
  const Attributes& attributes = frame->attributes;
  for (int64_t i = 0; i < attributes.size; ++i) {
    const Span& name = *attributes.names[i];
    f.attributes.emplace(std::string(name.text, name.length),
                         attribute_of(attributes.types[i], attributes.items[i]));
  }
  if (device == KIMI_DEVICE_CUDA) {
    GetStream get = {sizeof(GetStream), nullptr, frame->context, nullptr};
    if (Error* error = frame->api->get_stream(&get)) return error;
    f.stream = get.stream;
  }
  const Status status = call(op, f);
  return status.is_ok() ? nullptr : error_of(*frame, status);
}

struct Entry {
  const char* name;
  Op op;
  Error* (*cpu)(CallFrame*);
  Error* (*cuda)(CallFrame*);
};
#define KIMI_XLA(op)                                                               \
  {#op, op, [](CallFrame* frame) { return run(frame, #op, op, KIMI_DEVICE_CPU); }, \
   [](CallFrame* frame) { return run(frame, #op, op, KIMI_DEVICE_CUDA); }}
constexpr Entry kEntries[] = {
    KIMI_XLA(topk_gate),
    KIMI_XLA(topk_gate_given),
    KIMI_XLA(topk_gate_backward),
    KIMI_XLA(gate_plan),
    KIMI_XLA(update_expert_bias),
    KIMI_XLA(sequence_counts),
    KIMI_XLA(sequence_balance_loss),
    KIMI_XLA(sequence_balance_loss_backward),
    KIMI_XLA(quantile_histogram),
    KIMI_XLA(z_loss),
    KIMI_XLA(z_loss_backward),
    KIMI_XLA(permute_plan),
    KIMI_XLA(permute),
    KIMI_XLA(unpermute),
    KIMI_XLA(unpermute_backward),
    KIMI_XLA(sort_chunks),
    KIMI_XLA(grouped_gemm),
    KIMI_XLA(grouped_gemm_wgrad),
    KIMI_XLA(grouped_gemm_fp8),
    KIMI_XLA(fused_experts),
    KIMI_XLA(fused_experts_backward),
    KIMI_XLA(matrix_product),
    KIMI_XLA(newton_schulz),
    KIMI_XLA(attention_max_logits),
    KIMI_XLA(clip_rows),
    KIMI_XLA(muon_momentum),
    KIMI_XLA(muon_update),
    KIMI_XLA(adamw),
    KIMI_XLA(squares),
    KIMI_XLA(clip_factor),
};

py::dict handlers(bool cuda) {
  py::dict found;
  for (const Entry& entry : kEntries)
    found[entry.name] = py::capsule(reinterpret_cast<void*>(cuda ? entry.cuda : entry.cpu),
                                    "xla._CUSTOM_CALL_TARGET");
  return found;
}

std::vector<Tensor> tensors_of(const py::list& shapes) {
  std::vector<Tensor> tensors;
  for (const py::handle& item : shapes) {
    const auto [dims, type] = item.cast<std::pair<std::vector<int64_t>, std::string>>();
    // Pointers that are not NULL, for what depends on whether there is one; nobody follows them.
    tensors.push_back({reinterpret_cast<void*>(uintptr_t{64}), dims, dtype_named(type)});
  }
  return tensors;
}

// What a call of these shapes needs: checked as the call will be. Lists hold (dims, dtype name).
size_t traced(const std::string& name, bool cuda, const py::list& arguments,
              const py::list& results, const py::dict& attributes) {
  for (const Entry& entry : kEntries) {
    if (name != entry.name) continue;
    Frame f;
    f.op = name;
    f.device = cuda ? KIMI_DEVICE_CUDA : KIMI_DEVICE_CPU;
    f.traced = true;
    try {
      f.arguments = tensors_of(arguments);
      f.results = tensors_of(results);
    } catch (const Refused& refused) {
      throw py::type_error(name + ": " + refused.message);
    }
    for (const auto& [key, value] : attributes) {
      Attribute& attribute = f.attributes[key.cast<std::string>()];
      if (py::isinstance<py::str>(value))
        attribute = value.cast<std::string>();
      else if (py::isinstance<py::int_>(value))
        attribute = value.cast<int64_t>();
      else if (py::isinstance<py::float_>(value))
        attribute = value.cast<double>();
      else
        attribute = value.cast<std::vector<double>>();
    }
    const Status status = call(entry.op, f);
    if (!status.is_ok()) throw py::value_error(status.message);
    return f.workspace_bytes;
  }
  throw py::key_error(name);
}

}  // namespace

void define(py::module_& m) {
  m.def("xla_handlers", &handlers, "The handlers of XLA for CPUs or CUDA, by op.");
  m.def("xla_traced", &traced, "Bytes of workspace that a call of these shapes needs.");
}

}  // namespace kimi::xla
