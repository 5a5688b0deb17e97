// SPDX-License-Identifier: MIT
// all_to_all: for kimi_ops.parallel, which makes all the tensors. Every argument is a list with a
// tensor for each rank of the launch, or an empty list; sizes are read off the outputs.
#include "bindings/ops.h"
#include "kimi_ops_parallel.h"

namespace kimi::bindings {
namespace {

// One tensor a rank.
class PerRank {
 public:
  PerRank(Call& call, const char* name, size_t ranks, Types types = {})
      : call_(call), name_(name), tensors_(call.tensors(name)) {
    if (!tensors_.empty() && tensors_.size() != ranks)
      call.value_error(name, "expected none or one for each of ", ranks, " ranks, got ",
                       tensors_.size());
    for (const Tensor& tensor : tensors_)
      if (types.size() > 0) tensor.of(types).dense();
  }
  explicit operator bool() const { return !tensors_.empty(); }
  const Tensor& at(size_t i) const {
    if (tensors_.empty()) call_.value_error(name_, "expected tensors, got none");
    return tensors_[i];
  }
  // The address, of a tensor of this shape; NULL where there are none.
  template <class T>
  T* of(size_t i, Dims shape) const {
    return tensors_.empty() ? nullptr : address<T>(tensors_[i].shape(shape));
  }

 private:
  template <class T>
  T* address(const Tensor& tensor) const {
    if (!tensor.is_dense()) call_.value_error(tensor.name, "expected a contiguous tensor");
    return tensor.data<T>();
  }
  Call& call_;
  const char* name_;
  std::vector<Tensor> tensors_;
};

struct Peers {
  std::vector<Tensor> buffers, states;
  std::vector<int64_t> ranks, numbers;

  explicit Peers(Call& call)
      : buffers(call.tensors("buffers")),
        states(call.tensors("states")),
        ranks(call.integers("ranks")),
        numbers(call.integers("numbers")) {
    if (buffers.empty() || states.size() != buffers.size() || ranks.size() != buffers.size())
      call.value_error("buffers", "expected a table, a state and a rank for each rank, got ",
                       buffers.size(), ", ", states.size(), " and ", ranks.size());
  }
  size_t count() const { return buffers.size(); }
  int64_t world() const { return buffers[0].size(0); }
  kimi_peer_memory of(size_t i) const {
    buffers[i].of({kInt64}).shape({world()}).dense();
    states[i].of({kInt64}).shape({int64_t(sizeof(kimi_all_to_all_state) / 8)}).dense();
    return {buffers[i].data<void*>(), states[i].data(),  numbers[0],      numbers[1],
            int32_t(numbers[2]),      int32_t(ranks[i]), int32_t(world())};
  }
};

void expect_numbers(Call& call, const Peers& peers, size_t count) {
  if (peers.numbers.size() != count)
    call.value_error("numbers", "expected ", count, " ints, got ", peers.numbers.size());
}

PyObject* all_to_all_dispatch(Call& call) {
  const Peers peers(call);
  expect_numbers(call, peers, 11);
  const size_t n = peers.count();
  const PerRank x(call, "x", n), beside(call, "beside", n, {kFloat32});
  const PerRank indices(call, "indices", n, {kInt32}), row_map(call, "row_map", n, {kInt32});
  const PerRank offsets(call, "offsets", n, {kInt32}), counts(call, "counts", n, {kInt32});
  const PerRank weights(call, "weights", n, {kFloat32}), y(call, "y", n);
  const PerRank y_beside(call, "y_beside", n, {kFloat32});
  const PerRank y_weights(call, "y_weights", n, {kFloat32});
  const PerRank y_row_map(call, "y_row_map", n, {kInt32}), y_source(call, "y_source", n, {kInt32});
  const PerRank y_slots(call, "y_slots", n, {kInt32}), home(call, "home", n, {kInt32});
  const PerRank y_offsets(call, "y_offsets", n, {kInt32}), y_counts(call, "y_counts", n, {kInt32});
  const PerRank loads(call, "loads", n, {kInt32}), report(call, "report", n, {kInt64});
  std::vector<kimi_all_to_all_dispatch_params> ranks(n);
  for (size_t i = 0; i < n; ++i) {
    kimi_all_to_all_dispatch_params& p = ranks[i];
    p.peers = peers.of(i);
    p.max_tokens = peers.numbers[3];
    p.num_experts = int32_t(peers.numbers[4]);
    p.align = int32_t(peers.numbers[5]);
    p.direct = int32_t(peers.numbers[6]);
    p.again = int32_t(peers.numbers[7]);
    p.strict = int32_t(peers.numbers[8]);
    p.num_blocks = int32_t(peers.numbers[9]);
    p.phases = kimi_all_to_all_phase(peers.numbers[10]);
    p.num_local = int32_t(n);
    const Tensor& tokens = x.at(i).shape({"T", "H"});
    const Tensor& map = y_row_map.at(i).shape({peers.world() * p.max_tokens, "K"});
    const int64_t t = tokens.size(0), h = tokens.size(1), k = map.size(1);
    const int64_t owned = y_offsets.at(i).shape({"El"}).size(0);
    const int64_t scales = beside ? beside.at(i).shape({t, "B"}).size(1) : 0;
    if (t > 0 && tokens.stride(1) != 1 && h > 1)
      call.value_error(tokens.name, "expected contiguous columns");
    p.num_tokens = t;
    p.top_k = int32_t(k);
    p.row_bytes = h * tokens.bytes();
    p.x_stride_bytes = tokens.stride(0) * tokens.bytes();
    p.beside_bytes = scales * 4;
    p.x = tokens.data();
    p.beside = beside.of<void>(i, {t, scales});
    p.indices = indices.of<int32_t>(i, {t, k});
    p.row_map = row_map.of<int32_t>(i, {t, k});
    p.offsets = offsets.of<int32_t>(i, {p.num_experts});
    p.tokens_per_expert = counts.of<int32_t>(i, {p.num_experts});
    p.weights = weights.of<float>(i, {t, k});
    p.num_rows = y ? y.at(i).of({tokens.dtype}).shape({"R", h}).size(0) : INT32_MAX;
    p.y = y.of<void>(i, {"R", h});
    p.y_beside = y_beside.of<void>(i, {p.num_rows, scales});
    p.y_weights = y_weights.of<float>(i, {map.size(0), k});
    p.y_row_map = map.data<int32_t>();
    p.y_source = y_source.of<int32_t>(i, {p.num_rows});
    p.y_slots = y_slots.of<uint32_t>(i, {map.size(0)});
    p.home = home.of<uint32_t>(i, {t});
    p.y_offsets = y_offsets.of<int32_t>(i, {owned});
    p.y_tokens_per_expert = y_counts.of<int32_t>(i, {owned});
    p.loads = loads.of<int32_t>(i, {peers.world(), p.num_experts});
    p.report = report.of<int64_t>(i, {4 + peers.world()});
  }
  call.run(kimi_all_to_all_dispatch, ranks[0]);
  return call.none();
}

PyObject* all_to_all_combine(Call& call) {
  const Peers peers(call);
  expect_numbers(call, peers, 6);
  const kimi_dtype wire = native(call.type("wire_dtype"));
  const size_t n = peers.count();
  const PerRank out(call, "out", n, {}), row_map(call, "row_map", n, {kInt32});
  const PerRank slots(call, "slots", n, {kInt32}), home(call, "home", n, {kInt32});
  const PerRank report(call, "report", n, {kInt64}), weights(call, "weights", n, {kFloat32});
  const PerRank y(call, "y", n), epoch(call, "epoch", n, {kInt64});
  std::vector<kimi_all_to_all_combine_params> ranks(n);
  for (size_t i = 0; i < n; ++i) {
    kimi_all_to_all_combine_params& p = ranks[i];
    p.peers = peers.of(i);
    p.max_tokens = peers.numbers[3];
    p.direct = int32_t(peers.numbers[4]);
    p.phases = kimi_all_to_all_phase(peers.numbers[5]);
    p.num_local = int32_t(n);
    const Tensor& rows = out.at(i).of(kNatives).shape({"R", "H"});
    const Tensor& map = row_map.at(i).shape({peers.world() * p.max_tokens, "K"});
    const int64_t h = rows.size(1), k = map.size(1);
    if (rows.size(0) > 0 && rows.stride(1) != 1 && h > 1)
      call.value_error(rows.name, "expected contiguous columns");
    p.num_tokens = y.at(i).of({rows.dtype}).shape({"T", h}).size(0);
    p.hidden = h;
    p.out_stride = rows.stride(0);
    p.top_k = int32_t(k);
    p.dtype = native(rows.dtype);
    p.wire_dtype = wire;
    p.out = rows.data();
    p.row_map = map.data<int32_t>();
    p.slots = slots.of<uint32_t>(i, {map.size(0)});
    p.home = home.of<uint32_t>(i, {p.num_tokens});
    p.report = report.of<int64_t>(i, {4 + peers.world()});
    p.weights = weights.of<float>(i, {p.direct ? p.num_tokens : map.size(0), k});
    p.y = y.of<void>(i, {p.num_tokens, h});
    p.epoch = epoch.of<int64_t>(i, {1});
  }
  call.run(kimi_all_to_all_combine, ranks[0]);
  return call.none();
}

}  // namespace

void define_all_to_all(Methods& methods) {
  methods.add<all_to_all_dispatch, 22>("all_to_all_dispatch");
  methods.add<all_to_all_combine, 13>("all_to_all_combine");
}

}  // namespace kimi::bindings
