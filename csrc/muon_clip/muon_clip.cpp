// SPDX-License-Identifier: MIT
// muon_clip: argument checks, choice of the engine, threads over blocks of all tensors.
#include "muon_clip/muon_clip.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/dtype.h"
#include "common/engine.h"
#include "common/integer.h"
#include "cpu/parallel.h"

namespace kimi {
namespace {

using namespace muon_clip_cpu;

constexpr int64_t kBlock = 1 << 15;  // elements; sums of squares are cut here

const void* at(const void* x, kimi_dtype dtype, int64_t i) {
  return static_cast<const char*>(x) + i * size_of(dtype);
}
void* at(void* x, kimi_dtype dtype, int64_t i) {
  return static_cast<char*>(x) + i * size_of(dtype);
}

// The blocks of a list of tensors, `unit` items each, as one list of tasks.
class Blocks {
 public:
  template <class Items, class Unit>
  Blocks(int64_t count, const Items& items, const Unit& unit) {
    for (int64_t t = 0; t < count; ++t) {
      const int64_t n = items(t), u = std::max<int64_t>(1, unit(t));
      tensors_.push_back({n, u, first_});
      first_ += ceil_div(n, u);
    }
  }
  int64_t size() const { return first_; }
  int64_t first_of(int64_t tensor) const {
    return tensor < int64_t(tensors_.size()) ? tensors_[size_t(tensor)].first : first_;
  }
  // body(tensor, begin, end, block)
  template <class Body>
  void run(const Body& body) const {
    cpu::parallel_for(first_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const auto next = std::upper_bound(tensors_.begin(), tensors_.end(), block,
                                           [](int64_t b, const Tensor& t) { return b < t.first; });
        const Tensor& tensor = *(next - 1);
        const int64_t from = (block - tensor.first) * tensor.unit;
        body(next - 1 - tensors_.begin(), from, std::min(tensor.items, from + tensor.unit), block);
      }
    });
  }

 private:
  struct Tensor {
    int64_t items, unit, first;
  };
  std::vector<Tensor> tensors_;
  int64_t first_ = 0;
};

Blocks blocks_of(int64_t count, const int64_t* sizes) {
  return Blocks(count, [&](int64_t t) { return sizes[t]; }, [](int64_t) { return kBlock; });
}

Status check_list(const char* op, kimi_device device, int64_t count, const int64_t* sizes,
                  int64_t fields, std::initializer_list<const void* const*> lists) {
  KIMI_RETURN_IF_ERROR(cpu_only(op, device));
  if (count < 0) return invalid(op, ": count: expected 0 or more tensors, got ", count);
  if (count == 0) return Status::ok();
  if (!sizes || std::find(lists.begin(), lists.end(), nullptr) != lists.end())
    return invalid(op, ": expected lists of pointers and sizes, got NULL");
  for (int64_t t = 0; t < count; ++t) {
    const int64_t* size = sizes + t * fields;
    if (*std::min_element(size, size + fields) < 0)
      return invalid(op, ": tensor ", t, ": expected sizes of 0 or more, got a negative one");
    const int64_t n = fields == 1 ? size[0] : size[0] * size[1];
    for (const void* const* list : lists)
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

template <class T>
const void* const* list_of(T* const* list) {
  return reinterpret_cast<const void* const*>(list);
}

void sum_blocks(const Blocks& blocks, int64_t count, const std::vector<double>& partial,
                double* squares) {
  for (int64_t t = 0; t < count; ++t) {
    squares[t] = 0;
    for (int64_t b = blocks.first_of(t); b < blocks.first_of(t + 1); ++b)
      squares[t] += partial[size_t(b)];
  }
}

}  // namespace

Status muon_momentum(const MuonMomentumParams& p, kimi_device device, void*) {
  const char* op = "muon_momentum";
  KIMI_RETURN_IF_ERROR(check_list(op, device, p.count, p.sizes, 1,
                                  {list_of(p.grads), list_of(p.buffers), list_of(p.updates)}));
  KIMI_RETURN_IF_ERROR(check_dtypes(op, p.grad_dtype, p.buffer_dtype));
  KIMI_RETURN_IF_ERROR(check_fraction(op, "momentum", p.momentum));
  const Momentum m = {Lerp(1 - p.momentum), Lerp(p.momentum), p.nesterov != 0, p.maximize != 0};
  const CpuEngine& engine = kEngines.best();
  const Blocks blocks = blocks_of(p.count, p.sizes);
  std::vector<double> partial(p.squares ? size_t(blocks.size()) : 0);
  blocks.run([&](int64_t t, int64_t begin, int64_t end, int64_t block) {
    float* update = p.updates[t] + begin;
    engine.momentum(m, at(p.grads[t], p.grad_dtype, begin), p.grad_dtype,
                    at(p.buffers[t], p.buffer_dtype, begin), p.buffer_dtype, update, end - begin);
    if (p.squares) partial[size_t(block)] = engine.squares(update, KIMI_FLOAT32, end - begin);
  });
  if (p.squares) sum_blocks(blocks, p.count, partial, p.squares);
  return Status::ok();
}

Status muon_update(const MuonUpdateParams& p, kimi_device device, void*) {
  const char* op = "muon_update";
  KIMI_RETURN_IF_ERROR(
      check_list(op, device, p.count, p.shapes, 4, {list_of(p.params), list_of(p.directions)}));
  KIMI_RETURN_IF_ERROR(check_dtypes(op, p.param_dtype, p.direction_dtype));
  if (p.count > 0 && !p.rates) return invalid(op, ": rates: expected [count] numbers, got NULL");
  const Decay decay = {float(1 - p.decay), p.cautious != 0};
  const CpuEngine& engine = kEngines.best();
  const auto dense = [&](int64_t t) {
    const int64_t* s = p.shapes + 4 * t;
    return s[2] == s[1] && s[3] == s[1];
  };
  // Rows that follow each other are one long row.
  const Blocks blocks(
      p.count, [&](int64_t t) { return p.shapes[4 * t] * (dense(t) ? p.shapes[4 * t + 1] : 1); },
      [&](int64_t t) {
        return dense(t) ? kBlock : kBlock / std::max<int64_t>(1, p.shapes[4 * t + 1]);
      });
  blocks.run([&](int64_t t, int64_t begin, int64_t end, int64_t) {
    const int64_t *s = p.shapes + 4 * t, cols = dense(t) ? end - begin : s[1];
    const int64_t rows = dense(t) ? 1 : end - begin;
    const int64_t param_stride = dense(t) ? 1 : s[2], direction_stride = dense(t) ? 1 : s[3];
    for (int64_t i = begin; i < begin + rows; ++i)
      engine.update(decay, float(p.rates[t]), at(p.params[t], p.param_dtype, i * param_stride),
                    p.param_dtype, at(p.directions[t], p.direction_dtype, i * direction_stride),
                    p.direction_dtype,
                    p.copies ? at(p.copies[t], KIMI_BFLOAT16, i * param_stride) : nullptr, cols);
  });
  return Status::ok();
}

Status adamw(const AdamwParams& p, kimi_device device, void*) {
  const char* op = "adamw";
  KIMI_RETURN_IF_ERROR(check_list(
      op, device, p.count, p.sizes, 1,
      {list_of(p.params), list_of(p.grads), list_of(p.exp_avgs), list_of(p.exp_avg_sqs)}));
  KIMI_RETURN_IF_ERROR(check_dtypes(op, p.param_dtype, p.grad_dtype));
  KIMI_RETURN_IF_ERROR(check_fraction(op, "beta1", p.beta1));
  KIMI_RETURN_IF_ERROR(check_fraction(op, "beta2", p.beta2));
  if (p.count > 0 && !p.steps) return invalid(op, ": steps: expected [count] numbers, got NULL");
  for (int64_t t = 0; t < p.count; ++t)
    if (p.steps[t] < 1)
      return invalid(op, ": steps[", t, "]: expected 1 or more, got ", p.steps[t]);
  const CpuEngine& engine = kEngines.best();
  std::vector<Moments> moments;
  for (int64_t t = 0; t < p.count; ++t) {
    const double step = double(p.steps[t]);
    moments.push_back({Lerp(1 - p.beta1),
                       float(p.beta2),
                       float(1 - p.beta2),
                       float(std::sqrt(1 - std::pow(p.beta2, step))),
                       float(p.eps),
                       float(-p.lr / (1 - std::pow(p.beta1, step))),
                       {float(1 - p.lr * p.weight_decay), p.cautious != 0},
                       p.maximize != 0});
  }
  blocks_of(p.count, p.sizes).run([&](int64_t t, int64_t begin, int64_t end, int64_t) {
    engine.adamw(moments[size_t(t)], at(p.params[t], p.param_dtype, begin), p.param_dtype,
                 at(p.grads[t], p.grad_dtype, begin), p.grad_dtype, p.exp_avgs[t] + begin,
                 p.exp_avg_sqs[t] + begin, end - begin);
  });
  return Status::ok();
}

Status squares(const SquaresParams& p, kimi_device device, void*) {
  const char* op = "squares";
  KIMI_RETURN_IF_ERROR(check_list(op, device, p.count, p.sizes, 1, {list_of(p.x)}));
  KIMI_RETURN_IF_ERROR(check_dtypes(op, p.dtype, p.dtype));
  if (p.count > 0 && !p.squares) return invalid(op, ": squares: expected a pointer, got NULL");
  const CpuEngine& engine = kEngines.best();
  const Blocks blocks = blocks_of(p.count, p.sizes);
  std::vector<double> partial(size_t(blocks.size()));
  blocks.run([&](int64_t t, int64_t begin, int64_t end, int64_t block) {
    partial[size_t(block)] = engine.squares(at(p.x[t], p.dtype, begin), p.dtype, end - begin);
  });
  sum_blocks(blocks, p.count, partial, p.squares);
  return Status::ok();
}

}  // namespace kimi
