// SPDX-License-Identifier: MIT
// muon_clip on a CPU: threads over blocks of all tensors.
#include <algorithm>
#include <vector>

#include "common/dtype.h"
#include "common/integer.h"
#include "cpu/parallel.h"
#include "muon_clip/numbers.h"

namespace kimi {
namespace {

using namespace muon_clip_cpu;

constexpr int64_t kGrain = 4;         // blocks that are worth a thread
constexpr int64_t kCached = 1 << 17;  // elements of a gradient that a thread finds again in its L2

const void* at(const void* x, kimi_dtype dtype, int64_t i) {
  return static_cast<const char*>(x) + i * size_of(dtype);
}
void* at(void* x, kimi_dtype dtype, int64_t i) {
  return static_cast<char*>(x) + i * size_of(dtype);
}

// The blocks of a list of tensors, `unit` items each, as one list.
class Blocks {
 public:
  template <class Items, class Unit>
  Blocks(int64_t count, const Items& items, const Unit& unit) : tensors_(size_t(count)) {
    for (int64_t t = 0, first = 0; t < count; ++t) {
      const int64_t n = items(t), u = std::max<int64_t>(1, unit(t));
      const int64_t end = first + ceil_div(n, u);
      tensors_[size_t(t)] = {n, u, first, end};
      first = end;
    }
  }
  Blocks(int64_t count, const int64_t* sizes)
      : Blocks(count, [&](int64_t t) { return sizes[t]; }, [](int64_t) { return kBlock; }) {}

  int64_t first(int64_t tensor) const { return tensors_[size_t(tensor)].first; }
  int64_t end(int64_t tensor) const { return tensors_[size_t(tensor)].end; }

  // body(tensor, begin, end, block) for the blocks of tensors [from, to); each thread takes those
  // that it takes in every call with these numbers, backwards if asked to.
  template <class Body>
  void run(int64_t from, int64_t to, bool backwards, const Body& body) const {
    const int64_t base = first(from);
    cpu::parallel_for(end(to - 1) - base, kGrain, [&](int64_t begin, int64_t end) {
      int64_t t = from;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = base + (backwards ? begin + end - 1 - i : i);
        if (i == begin) t = tensor_of(block);
        while (block >= tensors_[size_t(t)].end) ++t;
        while (block < tensors_[size_t(t)].first) --t;
        const Tensor& tensor = tensors_[size_t(t)];
        const int64_t item = (block - tensor.first) * tensor.unit;
        body(t, item, std::min(tensor.items, item + tensor.unit), block);
      }
    });
  }
  template <class Body>
  void run(const Body& body) const {
    run(0, int64_t(tensors_.size()), false, body);
  }

 private:
  struct Tensor {
    int64_t items, unit, first, end;
  };
  int64_t tensor_of(int64_t block) const {
    const auto next = std::upper_bound(tensors_.begin(), tensors_.end(), block,
                                       [](int64_t b, const Tensor& t) { return b < t.first; });
    return next - tensors_.begin() - 1;
  }
  std::vector<Tensor> tensors_;
};

bool moves(const double* squares, const int64_t* pieces, int64_t t) {
  return !squares || muon_clip_math::moves(squares, pieces[2 * t], pieces[2 * t + 1]);
}

double sum_of_blocks(const double* sums, int64_t begin, int64_t end) {
  double lanes[kBlockLanes] = {};
  for (int64_t b = begin; b < end; ++b) lanes[(b - begin) % kBlockLanes] += sums[b];
  return tree(lanes, kBlockLanes);
}

}  // namespace

void muon_momentum_cpu(const MuonMomentumParams& p) {
  const Momentum m = muon_clip_math::momentum_of(p);
  const CpuEngine& engine = kEngines.best();
  Blocks(p.count, p.sizes).run([&](int64_t t, int64_t begin, int64_t end, int64_t) {
    float* update = p.updates[t] + begin;
    if (!moves(p.squares, p.pieces, t)) {
      std::fill_n(update, end - begin, 0.0f);
      return;
    }
    engine.momentum(m, at(p.grads[t], p.grad_dtype, begin), p.grad_dtype,
                    at(p.buffers[t], p.buffer_dtype, begin), p.buffer_dtype, update, end - begin);
  });
}

void muon_update_cpu(const MuonUpdateParams& p) {
  const Decay decay = decay_of(p.decay, p.lr, p.weight_decay, p.cautious != 0);
  const CpuEngine& engine = kEngines.best();
  // Rows that follow each other are one long row.
  const auto dense = [&](int64_t t) {
    const int64_t* s = p.shapes + 4 * t;
    return s[2] == s[1] && s[3] == s[1];
  };
  const Blocks blocks(
      p.count, [&](int64_t t) { return p.shapes[4 * t] * (dense(t) ? p.shapes[4 * t + 1] : 1); },
      [&](int64_t t) {
        return dense(t) ? kBlock : kBlock / std::max<int64_t>(1, p.shapes[4 * t + 1]);
      });
  blocks.run([&](int64_t t, int64_t begin, int64_t end, int64_t) {
    if (!moves(p.squares, p.pieces, t)) return;
    const int64_t *s = p.shapes + 4 * t, cols = dense(t) ? end - begin : s[1];
    const int64_t rows = dense(t) ? 1 : end - begin;
    const int64_t param_stride = dense(t) ? 1 : s[2], direction_stride = dense(t) ? 1 : s[3];
    for (int64_t i = begin; i < begin + rows; ++i)
      engine.update(decay, rate_of(p.rates[t], p.lr),
                    at(p.params[t], p.param_dtype, i * param_stride), p.param_dtype,
                    at(p.directions[t], p.direction_dtype, i * direction_stride), p.direction_dtype,
                    p.copies ? at(p.copies[t], KIMI_BFLOAT16, i * param_stride) : nullptr, cols);
  });
}

void adamw_cpu(const AdamwParams& p) {
  const CpuEngine& engine = kEngines.best();
  const Blocks blocks(p.count, p.sizes);
  double* sums = static_cast<double*>(p.workspace);
  std::vector<Moments> moments(size_t(p.count));
  std::vector<char> alive(size_t(p.count));
  const int64_t cached = p.measure ? kCached * cpu::num_threads() : INT64_MAX;
  for (int64_t from = 0, to; from < p.count; from = to) {
    to = from;
    for (int64_t elements = 0; to < p.count && elements < cached; ++to) elements += p.sizes[to];
    if (p.measure)
      blocks.run(from, to, false, [&](int64_t t, int64_t begin, int64_t end, int64_t block) {
        sums[block] =
            engine.squares(at(p.grads[t], p.grad_dtype, begin), p.grad_dtype, end - begin);
      });
    for (int64_t t = from; t < to; ++t) {
      if (p.measure)
        p.squares[p.pieces[2 * t]] = sum_of_blocks(sums, blocks.first(t), blocks.end(t));
      alive[size_t(t)] = moves(p.squares, p.pieces, t);
      if (alive[size_t(t)]) moments[size_t(t)] = moments_of(p, *p.steps[t] += 1);
    }
    blocks.run(from, to, p.measure != 0, [&](int64_t t, int64_t begin, int64_t end, int64_t) {
      if (alive[size_t(t)])
        engine.adamw(moments[size_t(t)], at(p.params[t], p.param_dtype, begin), p.param_dtype,
                     at(p.grads[t], p.grad_dtype, begin), p.grad_dtype, p.exp_avgs[t] + begin,
                     p.exp_avg_sqs[t] + begin, end - begin);
    });
  }
}

void squares_cpu(const SquaresParams& p) {
  const CpuEngine& engine = kEngines.best();
  const Blocks blocks(p.count, p.sizes);
  double* sums = static_cast<double*>(p.workspace);
  blocks.run([&](int64_t t, int64_t begin, int64_t end, int64_t block) {
    sums[block] = engine.squares(at(p.x[t], p.dtype, begin), p.dtype, end - begin);
  });
  for (int64_t t = 0; t < p.count; ++t)
    p.squares[p.places[t]] = sum_of_blocks(sums, blocks.first(t), blocks.end(t));
}

void clip_factor_cpu(const ClipFactorParams& p) {
  double lanes[kTensorLanes] = {};
  for (int64_t t = 0; t < p.count; ++t)
    if (moves(p.squares, p.pieces, t))
      for (int64_t i = p.pieces[2 * t]; i < p.pieces[2 * t + 1]; ++i)
        lanes[t % kTensorLanes] += p.squares[i];
  *p.factor = clip_factor_of(tree(lanes, kTensorLanes), p.max_norm);
}

}  // namespace kimi
