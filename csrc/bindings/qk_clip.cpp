// SPDX-License-Identifier: MIT
#include "bindings/ops.h"

namespace kimi::bindings {
namespace {

std::vector<int32_t> narrow(Call& call, const char* name, const std::vector<int64_t>& numbers) {
  for (int64_t number : numbers)
    if (number != int32_t(number)) call.value_error(name, "expected sizes, got ", number);
  return {numbers.begin(), numbers.end()};
}

PyObject* attention_max_logits(Call& call) {
  const Tensor q = call.tensor("q").of(kNatives).shape({"B", "heads", "Sq", "D"}).apart();
  const Tensor any_k = call.tensor("k").of({q.dtype});
  const Tensor k = any_k.shape({q.size(0), "kv_heads", "Sk", q.size(3)}).apart();
  kimi_attention_max_logits_params p = {};
  p.q = q.data();
  p.k = k.data();
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.kv_heads = k.size(1);
  p.queries = q.size(2);
  p.keys = k.size(2);
  p.dim = q.size(3);
  p.q_batch_stride = q.stride(0);
  p.q_head_stride = q.stride(1);
  p.q_row_stride = q.stride(2);
  p.q_col_stride = q.stride(3);
  p.k_batch_stride = k.stride(0);
  p.k_head_stride = k.stride(1);
  p.k_row_stride = k.stride(2);
  p.k_col_stride = k.stride(3);
  p.scale = float(call.number("scale"));
  p.causal = call.truth();
  p.dtype = native(q.dtype);
  const Output largest = call.empty(kFloat32, {p.heads});
  p.max_logits = largest.data<float>();
  call.workspace(p, kimi_attention_max_logits_workspace_bytes);
  call.run(kimi_attention_max_logits, p);
  return call.result(largest);
}

// Numbers `layers` as (heads, members) of each layer, `geometry` as (layer, blocks, block_rows,
// first_row, shared, whole) of each weight: kimi_clip_layer and kimi_clip_weight.
PyObject* clip_rows(Call& call) {
  constexpr size_t kOfLayer = 2, kOfWeight = 6;
  const std::vector<Tensor> weights = call.tensors("weights");
  const Tensor max_logits = call.tensor("max_logits").of({kFloat32}).shape({"H"});
  const std::vector<int32_t> layers = narrow(call, "layers", call.integers("layers"));
  const std::vector<int64_t> geometry = call.integers("geometry");
  const std::vector<double> powers = call.numbers("powers");
  kimi_clip_rows_params p = {};
  p.tau = float(call.number("tau"));
  if (layers.size() % kOfLayer)
    call.value_error("layers", "expected ", kOfLayer, " a layer, got ", layers.size(), " numbers");
  if (geometry.size() != kOfWeight * weights.size() || powers.size() != weights.size())
    call.value_error("geometry, powers", "expected ", kOfWeight, " numbers and one a weight, got ",
                     geometry.size(), " and ", powers.size(), " for ", weights.size());
  std::vector<kimi_clip_layer> clipped;
  int64_t heads = 0;
  for (size_t i = 0; i < layers.size(); i += kOfLayer) {
    clipped.push_back({layers[i], layers[i + 1]});
    heads += layers[i];
  }
  max_logits.shape({heads}, "one value for each head of each layer");
  std::vector<Tensor> written;
  std::vector<kimi_clip_weight> table;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i].of(kNatives);
    if (weight.ndim != 1) weight.shape({"rows", "in"});
    weight.writable({&max_logits});
    written.push_back(weight.ndim == 1 ? weight : weight.dense_rows());
    const Tensor& rows = written.back();
    const std::vector<int32_t> of =
        narrow(call, "geometry",
               {geometry.begin() + kOfWeight * i, geometry.begin() + kOfWeight * (i + 1)});
    kimi_clip_weight& w = table.emplace_back();
    w.weight = rows.data();
    w.rows = rows.size(0);
    w.cols = rows.ndim == 1 ? 1 : rows.size(1);
    w.row_stride = rows.stride(0);
    w.layer = of[0];
    w.blocks = of[1];
    w.block_rows = of[2];
    w.first_row = of[3];
    w.shared = of[4];
    w.whole = of[5];
    w.power = float(powers[i]);
    w.dtype = native(rows.dtype);
  }
  const Tensor maxima = max_logits.dense();
  const Output gamma = call.empty(kFloat32, {heads});
  p.layers = clipped.data();
  p.weights = table.data();
  p.max_logits = maxima.data<float>();
  p.gamma = gamma.data<float>();
  p.num_layers = int64_t(clipped.size());
  p.num_weights = int64_t(table.size());
  call.run(kimi_clip_rows, p);
  for (size_t i = 0; i < weights.size(); ++i) call.write_back(weights[i], written[i]);
  return call.result(gamma);
}

}  // namespace

void define_qk_clip(Methods& methods) {
  methods.add<attention_max_logits, 4>("attention_max_logits");
  methods.add<clip_rows, 6>("clip_rows_", "clip_rows");
}

}  // namespace kimi::bindings
