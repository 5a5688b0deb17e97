// SPDX-License-Identifier: MIT
// The flags of comm/flags.h for one rank; permute and unpermute into memory that is there.
#include <poll.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "bindings/ops.h"
#include "comm/flags.h"
#include "permute/check.h"

namespace py = pybind11;

namespace kimi::bindings {
namespace {

using comm::RankSet;

// Waits let other Python threads run. A wait ends after `seconds` at the latest: the caller looks
// after signals and deadlines between two of them.
class RankFlags {
 public:
  // `memory`: zeros at first, of all ranks. `processes`: a pidfd a rank, negative for none.
  RankFlags(py::buffer memory, int rank, std::vector<int> processes, int buffers)
      : held_(memory.request(true)),
        processes_(std::move(processes)),
        all_(~RankSet{0} >> (comm::kMaxRanks - ranks_of(processes_))),
        flags_(static_cast<comm::RankFlags<>*>(held_.ptr), rank, buffers) {
    if (held_.size * held_.itemsize < int64_t(bytes(processes_.size())) || rank < 0 ||
        size_t(rank) >= processes_.size())
      throw py::value_error("RankFlags: memory, rank: expected lines for every rank");
  }
  static size_t bytes(size_t ranks) { return ranks * sizeof(comm::RankFlags<>); }

  void publish(uint64_t n) { flags_.publish(n); }
  void consume(uint64_t n) { flags_.consume(n); }
  // (silent, ended): the ranks that have not come.
  py::tuple enter(uint64_t n, double seconds) {
    return wait([&](int64_t end, const auto& ended) { return flags_.enter(all_, n, end, ended); },
                seconds);
  }
  py::tuple arrive(uint64_t n, double seconds) {
    return wait([&](int64_t end, const auto& ended) { return flags_.arrive(all_, n, end, ended); },
                seconds);
  }

 private:
  static int ranks_of(const std::vector<int>& processes) {
    if (processes.empty() || processes.size() > size_t(comm::kMaxRanks))
      throw py::value_error("RankFlags: processes: expected one for each of 1 .. 64 ranks");
    return int(processes.size());
  }

  template <class Wait>
  py::tuple wait(const Wait& wait, double seconds) {
    comm::Absent absent;
    {
      const py::gil_scoped_release released;
      absent = wait(comm::Machine::now() + int64_t(seconds * 1e9),
                    [this](RankSet ranks) { return ended(ranks); });
    }
    return py::make_tuple(ranks_in(absent.silent), ranks_in(absent.ended));
  }

  // Those of the ranks whose processes have ended: a pidfd can be read then.
  RankSet ended(RankSet ranks) const {
    std::vector<pollfd> asked(processes_.size());
    for (size_t r = 0; r < asked.size(); ++r)
      asked[r] = {ranks >> r & 1 ? processes_[r] : -1, POLLIN, 0};
    RankSet found = 0;
    if (poll(asked.data(), asked.size(), 0) > 0)
      for (size_t r = 0; r < asked.size(); ++r)
        if (asked[r].revents) found |= RankSet{1} << r;
    return found;
  }

  static std::vector<int> ranks_in(RankSet set) {
    std::vector<int> ranks;
    for (; set != 0; set &= set - 1) ranks.push_back(std::countr_zero(set));
    return ranks;
  }

  py::buffer_info held_;  // keeps the memory mapped
  std::vector<int> processes_;
  RankSet all_;
  comm::Flags<> flags_;
};

// Memory that is there, for rows [rows, H] like those of `like`.
void* written(const Tensor& out, int64_t rows, const Tensor& like, const Tensor& row_map) {
  out.of({like.dtype})
      .shape({rows, like.size(1)}, "pass a row for each")
      .writable({&like, &row_map});
  if (!out.is_dense())
    out.call->value_error("out", "expected dense rows, got ", out.strides_text());
  return out.data();
}

// permute into `out` [cap, H].
PyObject* permute_into(Call& call) {
  const Tensor x = call.tensor("x").shape({"T", "H"}).dense_rows();
  const Tensor row_map = call.tensor("row_map").of({kInt32}).shape({x.size(0), "K"}).dense();
  const Tensor source = call.tensor("source").of({kInt32}).shape({"cap"}).dense();
  const Tensor out = call.tensor("out");
  call.check(permutation::check_row_map("permute_into", row_map.data<int32_t>(), row_map.count(),
                                        source.size(0)));
  kimi_permute_params p = {};
  p.x = x.data();
  p.row_map = row_map.data<int32_t>();
  p.source = source.data<int32_t>();
  p.y = written(out, source.size(0), x, row_map);
  p.num_tokens = x.size(0);
  p.num_rows = source.size(0);
  p.row_bytes = x.size(1) * x.bytes();
  p.x_stride_bytes = x.stride(0) * x.bytes();
  p.top_k = int32_t(row_map.size(1));
  call.run(kimi_permute, p);
  return call.none();
}

// unpermute into `out` [T, H], which may be shared memory.
PyObject* unpermute_into(Call& call) {
  const Tensor y = call.tensor("y").of(kNatives).shape({"R", "H"}).dense_rows();
  const Tensor row_map = call.tensor("row_map").of({kInt32}).shape({"T", "K"}).dense();
  const Tensor weights = call.optional("weights"), out = call.tensor("out");
  call.check(permutation::check_row_map("unpermute_into", row_map.data<int32_t>(), row_map.count(),
                                        y.size(0)));
  kimi_unpermute_params p = {};
  p.y = y.data();
  p.row_map = row_map.data<int32_t>();
  p.weights = !weights ? nullptr
                       : weights.of({kFloat32})
                             .shape_like(row_map, "pass one for each pair")
                             .dense()
                             .data<float>();
  p.num_tokens = row_map.size(0);
  p.hidden = y.size(1);
  p.x = written(out, p.num_tokens, y, row_map);
  p.y_stride = y.stride(0);
  p.top_k = int32_t(row_map.size(1));
  p.dtype = native(y.dtype);
  call.run(kimi_unpermute, p);
  return call.none();
}

}  // namespace

void define_comm(py::module_& m, Methods& methods) {
  methods.add<permute_into, 4>("permute_into");
  methods.add<unpermute_into, 4>("unpermute_into");
  py::class_<RankFlags>(m, "RankFlags", py::module_local())
      .def(py::init<py::buffer, int, std::vector<int>, int>())
      .def_static("bytes", &RankFlags::bytes)
      .def("publish", &RankFlags::publish)
      .def("consume", &RankFlags::consume)
      .def("enter", &RankFlags::enter)
      .def("arrive", &RankFlags::arrive);
}

}  // namespace kimi::bindings
