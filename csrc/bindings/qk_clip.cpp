// SPDX-License-Identifier: MIT
#include "bindings/ops.h"

namespace kimi::bindings {
namespace {

PyObject* attention_max_logits(Call& call) {
  const Tensor q = call.tensor("q").of(kNatives).shape({"B", "heads", "Sq", "D"});
  const Tensor k = call.tensor("k").of({q.dtype}).beside(q);
  k.shape({q.size(0), "kv_heads", "Sk", q.size(3)});
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
  p.workspace = call.workspace(kimi_attention_max_logits_workspace_bytes(&p, call.device()));
  call.run(kimi_attention_max_logits, p);
  return call.result(largest);
}

PyObject* scale_rows(Call& call) {
  const Tensor weight = call.tensor("weight").of(kNatives).shape({"rows", "in"});
  const Tensor factors = call.tensor("factors").of({kFloat32}).shape({"heads"}).beside(weight);
  kimi_scale_rows_params p = {};
  p.heads = factors.size(0);
  if (p.heads == 0 || weight.size(0) % p.heads)
    call.value_error("weight", "expected rows for ", p.heads, " heads, got ", weight.size(0),
                     "; check factors");
  weight.writable({&factors});
  const Tensor rows = weight.dense_rows();
  p.weight = rows.data();
  p.factors = factors.dense().data<float>();
  p.rows_of_head = rows.size(0) / p.heads;
  p.first = call.integer("first");
  p.last = call.integer("last");
  p.cols = rows.size(1);
  p.row_stride = rows.stride(0);
  p.dtype = native(rows.dtype);
  call.run(kimi_scale_rows, p);
  call.write_back(weight, rows);
  return call.none();
}

}  // namespace

void define_qk_clip(Methods& methods) {
  methods.add<attention_max_logits, 4>("attention_max_logits");
  methods.add<scale_rows, 4>("scale_rows_", "scale_rows");
}

}  // namespace kimi::bindings
