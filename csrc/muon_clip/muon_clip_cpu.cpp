// SPDX-License-Identifier: MIT
// muon_clip on a CPU: threads over blocks of all tensors.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/dtype.h"
#include "common/integer.h"
#include "cpu/parallel.h"
#include "muon_clip/numbers.h"

namespace kimi {
namespace {

using namespace muon_clip_cpu;

constexpr int64_t kGrain = 4;         // blocks that are worth a thread
constexpr int64_t kCached = 1 << 17;  // elements of gradients that a thread finds again in its L2

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
  Blocks(int64_t count, const Items& items, const Unit& unit) : tensors_(size_t(count + 1)) {
    int64_t before = 0;
    for (int64_t t = 0; t < count; ++t) {
      tensors_[size_t(t)] = {items(t), std::max<int64_t>(1, unit(t)), before};
      before += ceil_div(tensors_[size_t(t)].items, tensors_[size_t(t)].unit);
    }
    tensors_[size_t(count)] = {0, 1, before};
  }
  Blocks(int64_t count, const int64_t* sizes)
      : Blocks(count, [&](int64_t t) { return sizes[t]; }, [](int64_t) { return kBlock; }) {}

  int64_t before(int64_t tensor) const { return tensors_[size_t(tensor)].before; }

  struct Block {
    int64_t tensor, begin, end;  // items of it
  };
  Block at(int64_t block) const {
    const auto after = std::upper_bound(tensors_.begin(), tensors_.end(), block,
                                        [](int64_t b, const Tensor& t) { return b < t.before; });
    const Tensor& tensor = *(after - 1);
    const int64_t begin = (block - tensor.before) * tensor.unit;
    return {after - 1 - tensors_.begin(), begin, std::min(tensor.items, begin + tensor.unit)};
  }

  // body(tensor, begin, end, block) for all blocks.
  template <class Body>
  void run(const Body& body) const {
    cpu::parallel_for(tensors_.back().before, kGrain, [&](int64_t block, int64_t end) {
      for (; block < end; ++block) {
        const Block b = at(block);
        body(b.tensor, b.begin, b.end, block);
      }
    });
  }

 private:
  struct Tensor {
    int64_t items, unit, before;  // blocks of the tensors before it
  };
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

// One run of tensors is updated while the gradients of the next are looked at: an element of the one,
// an element of the other, so that memory is waited for once and the gradients are in a cache still
// when their turn comes.
void adamw_cpu(const AdamwParams& p) {
  const CpuEngine& engine = kEngines.best();
  const Blocks blocks(p.count, p.sizes);
  double* sums = static_cast<double*>(p.workspace);
  std::vector<Moments> moments(size_t(p.count));
  std::vector<char> alive(size_t(p.count));
  const auto grad = [&](const Blocks::Block& b) {
    return at(p.grads[b.tensor], p.grad_dtype, b.begin);
  };
  // Blocks of a tensor in one go: its streams are the longer.
  const auto look = [&](int64_t block, int64_t end) {
    for (int64_t last; block < end; block = last) {
      const Blocks::Block b = blocks.at(block);
      last = std::min(end, blocks.before(b.tensor + 1));
      const int64_t n = std::min(p.sizes[b.tensor] - b.begin, (last - block) * kBlock);
      const double found = engine.finite(grad(b), p.grad_dtype, n) ? 0.0 : std::nan("");
      std::fill(sums + block, sums + last, found);
    }
  };
  const auto update = [&](int64_t block, int64_t ahead) {  // ahead: a block to look at, or -1
    const Blocks::Block b = blocks.at(block), c = ahead < 0 ? Blocks::Block{} : blocks.at(ahead);
    const int64_t t = b.tensor, n = alive[size_t(t)] ? b.end - b.begin : 0;
    const bool finite = engine.adamw(moments[size_t(t)], at(p.params[t], p.param_dtype, b.begin),
                                     p.param_dtype, grad(b), p.grad_dtype, p.exp_avgs[t] + b.begin,
                                     p.exp_avg_sqs[t] + b.begin, n, grad(c), c.end - c.begin);
    if (ahead >= 0) sums[ahead] = finite ? 0.0 : std::nan("");
  };
  const int64_t most = p.measure ? kCached * cpu::num_threads() : INT64_MAX;
  const auto end_of_run = [&](int64_t t) {
    for (int64_t elements = 0; t < p.count && elements < most; ++t) elements += p.sizes[t];
    return t;
  };
  int64_t from = 0, to = end_of_run(0), next = 0;
  if (p.measure) cpu::parallel_for(blocks.before(to), kGrain, look);
  for (; from < p.count; from = to, to = next) {
    for (int64_t t = from; t < to; ++t) {
      if (p.measure)
        p.squares[p.pieces[2 * t]] = sum_of_blocks(sums, blocks.before(t), blocks.before(t + 1));
      alive[size_t(t)] = moves(p.squares, p.pieces, t);
      if (alive[size_t(t)]) moments[size_t(t)] = moments_of(p, *p.steps[t] += 1);
    }
    next = end_of_run(to);
    const int64_t first = blocks.before(from), second = blocks.before(to);
    const int64_t count = second - first, more = p.measure ? blocks.before(next) - second : 0;
    cpu::parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t low = second + more * i / count, high = second + more * (i + 1) / count;
        update(first + i, low < high ? low : -1);
        look(low + 1, high);
      }
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
    p.squares[p.places[t]] = sum_of_blocks(sums, blocks.before(t), blocks.before(t + 1));
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
