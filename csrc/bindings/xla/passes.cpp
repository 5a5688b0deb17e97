// SPDX-License-Identifier: MIT
// The elementwise passes of MuonClip over lists of arrays: arguments are the lists one after the
// other, each of `count` arrays, and results lie where the arguments that they change do. JAX has
// no float64 unless asked: squares [N, 2] and factors [2] are its bits as uint32.
#include "bindings/xla/ops.h"

namespace kimi::xla {
namespace {

using Tensors = std::vector<Tensor>;

template <class T>
std::vector<T*> addresses(const Tensors& tensors) {
  std::vector<T*> list;
  for (const Tensor& tensor : tensors) list.push_back(tensor.as<T>());
  return list;
}

std::vector<int64_t> sizes(const Tensors& tensors) {
  std::vector<int64_t> list;
  for (const Tensor& tensor : tensors) list.push_back(tensor.count());
  return list;
}

// A list beside another one: the same shapes.
Tensors beside(Frame& f, const char* name, Types dtypes, const Tensors& first) {
  Tensors tensors = f.several(name, dtypes);
  for (size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].dims != first[i].dims)
      f.refuse(std::string(name) + "[" + std::to_string(i) + "]: expected the shape beside it");
  return tensors;
}

void write_over(Frame& f, const char* name, const Tensors& tensors) {
  for (const Tensor& tensor : tensors) f.over(name, tensor);
}

const double* factor(Frame& f, const char* name) {
  return static_cast<const double*>(f.optional(name, kU32, {2}));
}

// Sums of squares, and which of them are those of each of `count` arrays.
struct Flags {
  const Tensor* squares = nullptr;
  std::vector<int64_t> pieces;

  Flags(Frame& f, size_t count) : pieces(f.integers("pieces")) {
    if (pieces.empty()) {
      f.optional("squares", kU32, {0});
      return;
    }
    squares = &f.next("squares", {kU32}, {kAny, 2});
    bool good = pieces.size() == 2 * count;
    for (size_t i = 0; good && i < pieces.size(); i += 2)
      good = 0 <= pieces[i] && pieces[i] < pieces[i + 1] && pieces[i + 1] <= squares->size(0);
    if (!good)
      f.refuse("pieces: expected first < end within 0.." + std::to_string(squares->size(0)) +
               " for each array");
  }
  double* data() const { return squares ? squares->as<double>() : nullptr; }
};

}  // namespace

Status muon_momentum(Frame& f) {
  kimi_muon_momentum_params p = {};
  const Tensors grads = f.several("grads", kFloats);
  const Tensors buffers = beside(f, "buffers", kFloats, grads);
  const Flags flags(f, grads.size());
  Tensors updates;
  for (const Tensor& grad : grads) updates.push_back(f.out({kF32}, grad.dims));
  write_over(f, "buffers", buffers);
  const auto sources = addresses<const void>(grads);
  const auto states = addresses<void>(buffers);
  const auto targets = addresses<float>(updates);
  const auto counts = sizes(grads);
  p.grads = sources.data();
  p.buffers = states.data();
  p.updates = targets.data();
  p.sizes = counts.data();
  p.squares = flags.data();
  p.pieces = flags.pieces.data();
  p.count = int64_t(grads.size());
  p.momentum = f.number("momentum");
  p.nesterov = f.int32("nesterov");
  p.maximize = f.int32("maximize");
  p.grad_dtype = native(grads[0].dtype);
  p.buffer_dtype = native(buffers[0].dtype);
  return f.run(kimi_muon_momentum, p);
}

Status muon_update(Frame& f) {
  kimi_muon_update_params p = {};
  const Tensors params = f.several("params", kFloats);
  const Tensors directions = beside(f, "directions", kFloats, params);
  const Flags flags(f, params.size());
  p.lr = factor(f, "lr");
  p.weight_decay = factor(f, "weight_decay");
  write_over(f, "params", params);
  std::vector<int64_t> shapes;
  for (const Tensor& param : params) {
    if (param.dims.size() != 2) f.refuse("params: expected matrices");
    const int64_t columns = param.size(1);
    shapes.insert(shapes.end(), {param.size(0), columns, columns, columns});
  }
  const std::vector<double> rates = f.numbers("rates");
  if (rates.size() != params.size()) f.refuse("rates: expected a number for each array");
  const auto written = addresses<void>(params);
  const auto read = addresses<const void>(directions);
  p.params = written.data();
  p.directions = read.data();
  p.shapes = shapes.data();
  p.rates = rates.data();
  p.squares = flags.data();
  p.pieces = flags.pieces.data();
  p.count = int64_t(params.size());
  p.decay = f.number("decay");
  p.cautious = f.int32("cautious");
  p.param_dtype = native(params[0].dtype);
  p.direction_dtype = native(directions[0].dtype);
  return f.run(kimi_muon_update, p);
}

Status adamw(Frame& f) {
  kimi_adamw_params p = {};
  const Tensors params = f.several("params", kFloats);
  const Tensors grads = beside(f, "grads", kFloats, params);
  const Tensors first = beside(f, "exp_avgs", {kF32}, params);
  const Tensors second = beside(f, "exp_avg_sqs", {kF32}, params);
  const Tensors steps = f.several("steps", {kF32});
  for (const Tensor& step : steps)
    if (!step.dims.empty()) f.refuse("steps: expected a number for each array");
  const Flags flags(f, params.size());
  p.scale = static_cast<const float*>(f.optional("scale", kF32, {}));
  p.lr_factor = factor(f, "lr_factor");
  p.weight_decay_factor = factor(f, "weight_decay_factor");
  p.measure = f.int32("measure");
  write_over(f, "params", params);
  write_over(f, "exp_avgs", first);
  write_over(f, "exp_avg_sqs", second);
  write_over(f, "steps", steps);
  if (p.measure && flags.squares) f.over("squares", *flags.squares);
  const auto targets = addresses<void>(params);
  const auto sources = addresses<const void>(grads);
  const auto means = addresses<float>(first), spreads = addresses<float>(second);
  const auto counters = addresses<float>(steps);
  const auto counts = sizes(params);
  p.params = targets.data();
  p.grads = sources.data();
  p.exp_avgs = means.data();
  p.exp_avg_sqs = spreads.data();
  p.steps = counters.data();
  p.sizes = counts.data();
  p.squares = flags.data();
  p.pieces = flags.pieces.data();
  p.count = int64_t(params.size());
  p.lr = f.number("lr");
  p.beta1 = f.number("beta1");
  p.beta2 = f.number("beta2");
  p.eps = f.number("eps");
  p.weight_decay = f.number("weight_decay");
  p.maximize = f.int32("maximize");
  p.cautious = f.int32("cautious");
  p.param_dtype = native(params[0].dtype);
  p.grad_dtype = native(grads[0].dtype);
  return f.run(kimi_adamw, p, kimi_adamw_workspace_bytes);
}

Status squares(Frame& f) {
  kimi_squares_params p = {};
  const Tensor& sums = f.next("squares", {kU32}, {kAny, 2});
  const Tensors x = f.several("x", kFloats);
  const std::vector<int64_t> pieces = f.integers("pieces"), lengths = f.integers("lengths");
  std::vector<const void*> sources;
  std::vector<int64_t> places;
  bool good = pieces.size() == 2 * x.size();
  for (size_t i = 0; good && i < x.size(); ++i) {
    int64_t begin = 0;
    good = 0 <= pieces[2 * i] && pieces[2 * i + 1] <= sums.size(0);
    for (int64_t piece = pieces[2 * i]; good && piece < pieces[2 * i + 1]; ++piece) {
      good = places.size() < lengths.size() && lengths[places.size()] >= 0;
      if (!good) break;
      sources.push_back(x[i].as<const char>() + begin * bytes_of(x[i].dtype));
      begin += lengths[places.size()];
      places.push_back(piece);
    }
    good = good && begin == x[i].count();
  }
  if (!good || places.size() != lengths.size())
    f.refuse("pieces, lengths: expected first, end for each array, and the elements of its pieces");
  p.x = sources.data();
  p.sizes = lengths.data();
  p.places = places.data();
  p.squares = f.over("squares", sums).as<double>();
  p.count = int64_t(places.size());
  p.dtype = native(x[0].dtype);
  return f.run(kimi_squares, p, kimi_squares_workspace_bytes);
}

Status clip_factor(Frame& f) {
  kimi_clip_factor_params p = {};
  const Flags flags(f, size_t(f.integer("count")));
  if (!flags.squares) f.refuse("pieces: expected two numbers for each array, got none");
  p.squares = flags.data();
  p.pieces = flags.pieces.data();
  p.count = f.integer("count");
  p.max_norm = f.number("max_norm");
  p.factor = f.out({kF32}, {}).as<float>();
  return f.run(kimi_clip_factor, p, kimi_clip_factor_workspace_bytes);
}

// `layers` are (heads, members), `geometry` (layer, blocks, block_rows, first_row, shared, whole).
Status clip_rows(Frame& f) {
  constexpr size_t kOfLayer = 2, kOfWeight = 6;
  kimi_clip_rows_params p = {};
  const std::vector<int64_t> layers = f.integers("layers"), geometry = f.integers("geometry");
  const std::vector<double> powers = f.numbers("powers");
  std::vector<kimi_clip_layer> clipped;
  int64_t heads = 0;
  for (size_t i = 0; i + 1 < layers.size(); i += kOfLayer) {
    clipped.push_back({int32_t(layers[i]), int32_t(layers[i + 1])});
    heads += layers[i];
  }
  p.max_logits = f.next("max_logits", {kF32}, {heads}).as<float>();
  const size_t count = size_t(f.integer("count"));
  if (layers.size() % kOfLayer || geometry.size() != kOfWeight * count || powers.size() != count)
    f.refuse("layers, geometry, powers: expected two numbers a layer, six and one a weight");
  std::vector<kimi_clip_weight> table;
  Tensors weights;
  for (size_t i = 0; i < count; ++i) {  // of any dtypes beside each other
    const std::string name = "weights[" + std::to_string(i) + "]";
    const Tensor& weight = f.next(name, kFloats, f.next_dims());
    if (weight.dims.empty() || weight.dims.size() > 2) f.refuse(name + ": expected [rows, in]");
    const int64_t* of = geometry.data() + kOfWeight * i;
    weights.push_back(weight);
    kimi_clip_weight& w = table.emplace_back();
    w.weight = weight.data;
    w.rows = weight.size(0);
    w.cols = w.row_stride = weight.dims.size() == 1 ? 1 : weight.size(1);
    w.layer = int32_t(of[0]);
    w.blocks = int32_t(of[1]);
    w.block_rows = int32_t(of[2]);
    w.first_row = of[3];
    w.shared = int32_t(of[4]);
    w.whole = int32_t(of[5]);
    w.power = float(powers[i]);
    w.dtype = native(weight.dtype);
  }
  p.gamma = f.out({kF32}, {heads}).as<float>();
  write_over(f, "weights", weights);
  p.layers = clipped.data();
  p.weights = table.data();
  p.num_layers = int64_t(clipped.size());
  p.num_weights = int64_t(table.size());
  p.tau = float(f.number("tau"));
  return f.run(kimi_clip_rows, p);
}

}  // namespace kimi::xla
