// SPDX-License-Identifier: MIT
// Passes over lists of tensors, at least one each.
#include "bindings/ops.h"

namespace kimi::bindings {
namespace {

using Tensors = std::vector<Tensor>;

struct List {
  const char* name;
  const Tensors& tensors;
};

// Lists of the same length, tensors of the same shapes, one dtype a list.
void check_lists(Call& call, std::initializer_list<List> lists) {
  const List& first = *lists.begin();
  if (first.tensors.empty()) call.value_error(first.name, "expected at least one tensor, got none");
  for (const List& list : lists) {
    for (const Tensor& tensor : list.tensors)
      tensor.of(kNatives).of({list.tensors[0].dtype}, "call once a dtype");
    if (list.tensors.size() != first.tensors.size())
      call.value_error(list.name, "expected ", first.tensors.size(), " tensors as ", first.name,
                       ", got ", list.tensors.size());
    for (size_t i = 0; i < list.tensors.size(); ++i) list.tensors[i].shape_like(first.tensors[i]);
  }
}

template <class Number>
void check_numbers(Call& call, const char* name, const std::vector<Number>& numbers, size_t count) {
  if (numbers.size() != count)
    call.value_error(name, "expected ", count, " numbers, got ", numbers.size());
}

Tensors dense(const Tensors& tensors) {
  Tensors copies;
  copies.reserve(tensors.size());
  for (const Tensor& tensor : tensors) copies.push_back(tensor.dense());
  return copies;
}

void check_writable(std::initializer_list<const Tensors*> lists) {
  for (const Tensors* tensors : lists)
    for (const Tensor& tensor : *tensors) tensor.writable({});
}

template <class T>
std::vector<T*> addresses(const Tensors& tensors) {
  std::vector<T*> list;
  list.reserve(tensors.size());
  for (const Tensor& tensor : tensors) list.push_back(tensor.data<T>());
  return list;
}

std::vector<int64_t> sizes(const Tensors& tensors) {
  std::vector<int64_t> list;
  list.reserve(tensors.size());
  for (const Tensor& tensor : tensors) list.push_back(tensor.count());
  return list;
}

// Sums of squares, or None, and which of them are those of each tensor.
struct Flags {
  Tensor squares;
  std::vector<int64_t> pieces;

  void check(Call& call, const Tensors& tensors, bool written) const {
    if (!squares) return;
    squares.of({kFloat64}).shape({"N"});
    if (!squares.is_dense())
      call.value_error("squares", "expected contiguous memory, got strides ",
                       squares.strides_text(), "; pass a contiguous copy");
    if (written) squares.writable({});
    check_numbers(call, "pieces", pieces, 2 * tensors.size());
    for (size_t i = 0; i < pieces.size(); i += 2)
      if (pieces[i] < 0 || pieces[i] >= pieces[i + 1] || pieces[i + 1] > squares.size(0))
        call.value_error("pieces", "expected first < end within 0..", squares.size(0), ", got ",
                         pieces[i], ", ", pieces[i + 1]);
  }
};

Flags flags(Call& call) {
  const Tensor squares = call.optional("squares");
  return {squares, call.integers("pieces")};
}

// A number that lies where the tensors do, or None.
template <class T>
const T* scalar(const Tensor& given, Type type) {
  return given ? given.of({type}).shape({}).data<const T>() : nullptr;
}

PyObject* muon_momentum(Call& call) {
  const Tensors grads = call.tensors("grads"), buffers = call.tensors("buffers");
  kimi_muon_momentum_params p = {};
  p.momentum = call.number("momentum");
  p.nesterov = call.truth();
  p.maximize = call.truth();
  const Flags flags = bindings::flags(call);
  check_lists(call, {{"grads", grads}, {"buffers", buffers}});
  flags.check(call, grads, false);
  check_writable({&buffers});
  // One tensor without gaps: a list of results is more than torch functionalises.
  std::vector<int64_t> starts = {0};
  for (const Tensor& grad : grads) starts.push_back(starts.back() + grad.count());
  const Output updates = call.empty(kFloat32, {starts.back()});
  std::vector<float*> targets;
  for (size_t i = 0; i < grads.size(); ++i) targets.push_back(updates.data<float>() + starts[i]);
  const Tensors from = dense(grads), moved = dense(buffers);
  const auto sources = addresses<const void>(from);
  const auto states = addresses<void>(moved);
  const auto counts = sizes(grads);
  p.grads = sources.data();
  p.buffers = states.data();
  p.updates = targets.data();
  p.sizes = counts.data();
  p.squares = flags.squares.data<double>();
  p.pieces = flags.pieces.data();
  p.count = int64_t(grads.size());
  p.grad_dtype = native(grads[0].dtype);
  p.buffer_dtype = native(buffers[0].dtype);
  call.run(kimi_muon_momentum, p);
  call.write_back({{buffers, moved}});
  return call.result(updates);
}

PyObject* muon_update(Call& call) {
  const Tensors params = call.tensors("params"), directions = call.tensors("directions");
  const std::vector<double> rates = call.numbers("rates");
  kimi_muon_update_params p = {};
  p.decay = call.number("decay");
  p.cautious = call.truth();
  const Flags flags = bindings::flags(call);
  const Tensor lr = call.optional("lr"), weight_decay = call.optional("weight_decay");
  check_lists(call, {{"params", params}, {"directions", directions}});
  flags.check(call, params, false);
  check_writable({&params});
  check_numbers(call, "rates", rates, params.size());
  Tensors targets, sources;
  std::vector<int64_t> shapes;
  for (size_t i = 0; i < params.size(); ++i) {
    targets.push_back(params[i].shape({"m", "n"}).dense_rows());
    sources.push_back(directions[i].dense_rows());
    const int64_t shape[] = {targets[i].size(0), targets[i].size(1), targets[i].stride(0),
                             sources[i].stride(0)};
    shapes.insert(shapes.end(), std::begin(shape), std::end(shape));
  }
  const auto written = addresses<void>(targets);
  const auto read = addresses<const void>(sources);
  p.params = written.data();
  p.directions = read.data();
  p.shapes = shapes.data();
  p.rates = rates.data();
  p.lr = scalar<double>(lr, kFloat64);
  p.weight_decay = scalar<double>(weight_decay, kFloat64);
  p.squares = flags.squares.data<double>();
  p.pieces = flags.pieces.data();
  p.count = int64_t(params.size());
  p.param_dtype = native(params[0].dtype);
  p.direction_dtype = native(directions[0].dtype);
  call.run(kimi_muon_update, p);
  call.write_back({{params, targets}});
  return call.none();
}

// Counts that every tensor has of its own: numbers in float32, as torch keeps them.
void check_steps(Call& call, const Tensors& steps, const Tensors& params) {
  if (steps.size() != params.size())
    call.value_error("steps", "expected ", params.size(), " tensors as params, got ", steps.size());
  for (const Tensor& step : steps) step.of({kFloat32}).shape({}).writable({});
}

PyObject* adamw(Call& call) {
  const Tensors params = call.tensors("params"), grads = call.tensors("grads");
  const Tensors exp_avgs = call.tensors("exp_avgs"), exp_avg_sqs = call.tensors("exp_avg_sqs");
  const Tensors steps = call.tensors("steps");
  kimi_adamw_params p = {};
  p.lr = call.number("lr");
  p.beta1 = call.number("beta1");
  p.beta2 = call.number("beta2");
  p.eps = call.number("eps");
  p.weight_decay = call.number("weight_decay");
  p.maximize = call.truth();
  p.cautious = call.truth();
  const Flags flags = bindings::flags(call);
  p.measure = call.truth();
  const Tensor scale = call.optional("scale");
  const Tensor lr = call.optional("lr_factor"), decay = call.optional("weight_decay_factor");
  check_lists(
      call,
      {{"params", params}, {"grads", grads}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}});
  flags.check(call, params, p.measure != 0);
  check_writable({&params, &exp_avgs, &exp_avg_sqs});
  for (const Tensors* states : {&exp_avgs, &exp_avg_sqs})
    if (states->at(0).dtype != kFloat32)
      call.type_error("exp_avgs, exp_avg_sqs", "expected float32, got ",
                      name_of(states->at(0).dtype), "; keep them in float32");
  check_steps(call, steps, params);
  const Tensors moved[] = {dense(params), dense(exp_avgs), dense(exp_avg_sqs)}, from = dense(grads);
  const auto targets = addresses<void>(moved[0]);
  const auto sources = addresses<const void>(from);
  const auto first = addresses<float>(moved[1]), second = addresses<float>(moved[2]);
  const auto counters = addresses<float>(steps);
  const auto counts = sizes(params);
  p.params = targets.data();
  p.grads = sources.data();
  p.exp_avgs = first.data();
  p.exp_avg_sqs = second.data();
  p.steps = counters.data();
  p.sizes = counts.data();
  p.lr_factor = scalar<double>(lr, kFloat64);
  p.weight_decay_factor = scalar<double>(decay, kFloat64);
  p.scale = scalar<float>(scale, kFloat32);
  p.squares = flags.squares.data<double>();
  p.pieces = flags.pieces.data();
  p.count = int64_t(params.size());
  p.param_dtype = native(params[0].dtype);
  p.grad_dtype = native(grads[0].dtype);
  call.workspace(p, kimi_adamw_workspace_bytes);
  call.run(kimi_adamw, p);
  const std::span<const Tensor> measured(&flags.squares, p.measure ? 1 : 0);
  call.write_back({{params, moved[0]},
                   {exp_avgs, moved[1]},
                   {exp_avg_sqs, moved[2]},
                   {steps, steps},
                   {measured, measured}});
  return call.none();
}

PyObject* squares(Call& call) {
  const Tensor sums = call.tensor("squares").of({kFloat64}).shape({"N"}).writable({});
  const Tensors x = call.tensors("x");
  const std::vector<int64_t> pieces = call.integers("pieces"), lengths = call.integers("lengths");
  check_lists(call, {{"x", x}});
  Flags{sums, pieces}.check(call, x, true);
  const Tensors from = dense(x);
  std::vector<const void*> sources;
  std::vector<int64_t> places;
  for (size_t i = 0; i < x.size(); ++i) {
    int64_t begin = 0;
    for (int64_t piece = pieces[2 * i]; piece < pieces[2 * i + 1]; ++piece) {
      const size_t next = places.size();
      if (next >= lengths.size() || lengths[next] < 0)
        call.value_error("lengths", "expected a number of elements, 0 or more, for each piece");
      if (lengths[next] > x[i].count() - begin)
        call.value_error("lengths", "expected ", x[i].count(), " elements of ", x[i].name,
                         " altogether, got more");
      sources.push_back(from[i].data<char>() + begin * from[i].bytes());
      places.push_back(piece);
      begin += lengths[next];
    }
    if (begin != x[i].count())
      call.value_error("lengths", "expected ", x[i].count(), " elements of ", x[i].name,
                       " altogether, got ", begin);
  }
  check_numbers(call, "lengths", lengths, places.size());
  kimi_squares_params p = {};
  p.x = sources.data();
  p.sizes = lengths.data();
  p.places = places.data();
  p.squares = sums.data<double>();
  p.count = int64_t(places.size());
  p.dtype = native(x[0].dtype);
  call.workspace(p, kimi_squares_workspace_bytes);
  call.run(kimi_squares, p);
  call.write_back(sums, sums);
  return call.none();
}

PyObject* clip_factor(Call& call) {
  const Flags flags = bindings::flags(call);
  kimi_clip_factor_params p = {};
  p.max_norm = call.number("max_norm");
  if (!flags.squares) call.type_error("squares", "expected ", call.kind(), ", got None");
  if (flags.pieces.empty() || flags.pieces.size() % 2)
    call.value_error("pieces", "expected two numbers for each of 1 tensor or more, got ",
                     flags.pieces.size());
  const Tensors every(flags.pieces.size() / 2, flags.squares);
  flags.check(call, every, false);
  const Output factor = call.empty(kFloat32, {});
  p.squares = flags.squares.data<double>();
  p.pieces = flags.pieces.data();
  p.factor = factor.data<float>();
  p.count = int64_t(every.size());
  call.workspace(p, kimi_clip_factor_workspace_bytes);
  call.run(kimi_clip_factor, p);
  return call.result(factor);
}

}  // namespace

void define_muon_clip(Methods& methods) {
  methods.add<muon_momentum, 7>("muon_momentum_", "muon_momentum");
  methods.add<muon_update, 9>("muon_update_", "muon_update");
  methods.add<adamw, 18>("adamw_", "adamw");
  methods.add<squares, 4>("squares_", "squares");
  methods.add<clip_factor, 3>("clip_factor");
}

}  // namespace kimi::bindings
