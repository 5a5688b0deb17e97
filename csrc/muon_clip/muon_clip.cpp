// SPDX-License-Identifier: MIT
// muon_clip: argument checks, and who computes.
#include "muon_clip/muon_clip.h"

#include <algorithm>

#include "common/dtype.h"
#include "common/engine.h"
#include "common/integer.h"
#include "common/strides.h"

namespace kimi {
namespace {

using namespace muon_clip_math;

struct Lists {
  int64_t count;
  const int64_t* sizes;
  int64_t fields;  // of a tensor's size
  std::initializer_list<const void* const*> lists;
  const double* squares = nullptr;
  const int64_t* pieces = nullptr;
};

Status check_lists(const char* op, const Lists& l) {
  if (l.count < 0) return invalid(op, ": count: expected 0 or more tensors, got ", l.count);
  if (l.count == 0) return Status::ok();
  if (!l.sizes || std::find(l.lists.begin(), l.lists.end(), nullptr) != l.lists.end())
    return invalid(op, ": expected lists of pointers and sizes, got NULL");
  if (l.squares && !l.pieces)
    return invalid(op, ": pieces: expected [count, 2] numbers beside squares, got NULL");
  for (int64_t t = 0; t < l.count; ++t) {
    const int64_t* size = l.sizes + t * l.fields;
    if (*std::min_element(size, size + l.fields) < 0)
      return invalid(op, ": tensor ", t, ": expected sizes of 0 or more, got a negative one");
    const int64_t n = l.fields == 1 ? size[0] : size[0] * size[1];
    for (const void* const* list : l.lists)
      if (n > 0 && !list[t]) return invalid(op, ": tensor ", t, ": expected a pointer, got NULL");
  }
  return Status::ok();
}

Status check_dtypes(const char* op, kimi_dtype a, kimi_dtype b) {
  if (is_dtype(a) && is_dtype(b)) return Status::ok();
  return invalid(op, ": dtype: expected a kimi_dtype (0..2), got ", int(a), " and ", int(b));
}

Status check_fraction(const char* op, const char* name, double value) {
  if (value >= 0 && value <= 1) return Status::ok();
  return invalid(op, ": ", name, ": expected 0 to 1, got ", value);
}

Status check_workspace(const char* op, const void* workspace) {
  if (workspace) return Status::ok();
  return invalid(op, ": workspace: expected kimi_", op, "_workspace_bytes() of memory, got NULL");
}

template <class T>
const void* const* list_of(T* const* list) {
  return reinterpret_cast<const void* const*>(list);
}

// A sum for each block; never 0, which would mean that the arguments are refused.
size_t bytes_of_sums(int64_t count, const int64_t* sizes) {
  int64_t blocks = 1;
  for (int64_t t = 0; sizes && t < count; ++t)
    blocks += ceil_div(std::max<int64_t>(sizes[t], 0), kBlock);
  return size_t(blocks) * sizeof(double);
}

// run(params) where the tensors lie; nothing to do for none.
template <class Params>
Status run(const char* op, const Params& p, kimi_device device, void (*cpu)(const Params&),
           Status (*cuda)(const Params&, void*), void* stream) {
  if (p.count == 0) return Status::ok();
  if (device == KIMI_DEVICE_CUDA) return cuda ? cuda(p, stream) : no_cuda(op);
  cpu(p);
  return Status::ok();
}

}  // namespace

#if defined(KIMI_OPS_CUDA)
#define KIMI_RUN(op) run(#op, p, device, op##_cpu, op##_cuda, stream)
#else
#define KIMI_RUN(op) run(#op, p, device, op##_cpu, {}, stream)
#endif

Status muon_momentum(const MuonMomentumParams& p, kimi_device device, void* stream) {
  const char* op = "muon_momentum";
  KIMI_RETURN_IF_ERROR(check_lists(op, {p.count,
                                        p.sizes,
                                        1,
                                        {list_of(p.grads), list_of(p.buffers), list_of(p.updates)},
                                        p.squares,
                                        p.pieces}));
  KIMI_RETURN_IF_ERROR(check_dtypes(op, p.grad_dtype, p.buffer_dtype));
  KIMI_RETURN_IF_ERROR(check_fraction(op, "momentum", p.momentum));
  return KIMI_RUN(muon_momentum);
}

Status muon_update(const MuonUpdateParams& p, kimi_device device, void* stream) {
  const char* op = "muon_update";
  KIMI_RETURN_IF_ERROR(check_lists(
      op, {p.count, p.shapes, 4, {list_of(p.params), list_of(p.directions)}, p.squares, p.pieces}));
  KIMI_RETURN_IF_ERROR(check_dtypes(op, p.param_dtype, p.direction_dtype));
  if (p.count > 0 && !p.rates) return invalid(op, ": rates: expected [count] numbers, got NULL");
  for (int64_t t = 0; t < p.count; ++t)
    for (int side : {2, 3})  // parameter, direction
      if (const int64_t* shape = p.shapes + 4 * t; shape[1] > 0)
        KIMI_RETURN_IF_ERROR(check_strides(op, "shapes", {{shape[0], shape[side]}}));
  return KIMI_RUN(muon_update);
}

size_t adamw_workspace_bytes(const AdamwParams& p, kimi_device) {
  return p.measure ? bytes_of_sums(p.count, p.sizes) : 0;
}

Status adamw(const AdamwParams& p, kimi_device device, void* stream) {
  const char* op = "adamw";
  KIMI_RETURN_IF_ERROR(check_lists(
      op, {p.count,
           p.sizes,
           1,
           {list_of(p.params), list_of(p.grads), list_of(p.exp_avgs), list_of(p.exp_avg_sqs)},
           p.squares,
           p.pieces}));
  KIMI_RETURN_IF_ERROR(check_dtypes(op, p.param_dtype, p.grad_dtype));
  KIMI_RETURN_IF_ERROR(check_fraction(op, "beta1", p.beta1));
  KIMI_RETURN_IF_ERROR(check_fraction(op, "beta2", p.beta2));
  if (p.count > 0 && !p.steps) return invalid(op, ": steps: expected [count] pointers, got NULL");
  for (int64_t t = 0; t < p.count; ++t)
    if (!p.steps[t]) return invalid(op, ": steps[", t, "]: expected a pointer, got NULL");
  if (p.measure && !p.squares)
    return invalid(op, ": squares: expected a pointer to measure into, got NULL");
  if (p.measure) KIMI_RETURN_IF_ERROR(check_workspace(op, p.workspace));
  return KIMI_RUN(adamw);
}

size_t squares_workspace_bytes(const SquaresParams& p, kimi_device) {
  return bytes_of_sums(p.count, p.sizes);
}

Status squares(const SquaresParams& p, kimi_device device, void* stream) {
  const char* op = "squares";
  KIMI_RETURN_IF_ERROR(check_lists(op, {p.count, p.sizes, 1, {list_of(p.x)}}));
  KIMI_RETURN_IF_ERROR(check_dtypes(op, p.dtype, p.dtype));
  if (p.count > 0 && (!p.squares || !p.places))
    return invalid(op, ": squares, places: expected pointers, got NULL");
  if (p.count > 0) KIMI_RETURN_IF_ERROR(check_workspace(op, p.workspace));
  return KIMI_RUN(squares);
}

size_t clip_factor_workspace_bytes(const ClipFactorParams&, kimi_device) {
  return kTensorLanes * sizeof(double);
}

Status clip_factor(const ClipFactorParams& p, kimi_device device, void* stream) {
  const char* op = "clip_factor";
  if (p.count < 1) return invalid(op, ": count: expected 1 tensor or more, got ", p.count);
  if (!p.squares || !p.pieces || !p.factor)
    return invalid(op, ": squares, pieces, factor: expected pointers, got NULL");
  if (!(p.max_norm > 0)) return invalid(op, ": max_norm: expected more than 0, got ", p.max_norm);
  KIMI_RETURN_IF_ERROR(check_workspace(op, p.workspace));
  return KIMI_RUN(clip_factor);
}

}  // namespace kimi
