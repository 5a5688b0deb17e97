// SPDX-License-Identifier: MIT
// The three phases of combine, for one rank: a block a token, a thread 8 columns.
//
//   send     for each token of each rank that has pairs here: sums of its rows, or each row, to the
//            token's places in the half of its home
//   meet     all ranks have sent
//   receive  for each token of mine: its places, added up in order
//
// Four rows of a thread are in flight. Types are chosen as the kernel runs: it waits for memory, and
// one instance serves them all.
#pragma once

#include "all_to_all/exchange.cuh"
#include "device/convert.cuh"
#include "device/math.cuh"

namespace kimi::exchange {

inline constexpr int kBatch = 4;  // rows of a thread in flight

/// 8 values as they lie in memory; the second half is that of fp32.
struct Columns {
  uint4 part[2];
};

struct Rows {
  kimi_dtype dtype;
  bool wide;  // 16 bytes divide every row's address, and 8 its columns

  __device__ Rows(kimi_dtype dtype, const void* base, int64_t stride, int64_t hidden)
      : dtype(dtype),
        wide((reinterpret_cast<uintptr_t>(base) | static_cast<uint64_t>(stride)) % 16 == 0 &&
             hidden % 8 == 0) {}

  __device__ int bytes() const { return dtype == KIMI_FLOAT32 ? 4 : 2; }

  __device__ Columns load(const char* at) const {
    Columns c;
    c.part[0] = load16_peer(at);
    c.part[1] = dtype == KIMI_FLOAT32 ? load16_peer(at + 16) : uint4{};
    return c;
  }
  __device__ void widen(const Columns& c, float (&v)[8]) const {
    const uint32_t words[8] = {c.part[0].x, c.part[0].y, c.part[0].z, c.part[0].w,
                               c.part[1].x, c.part[1].y, c.part[1].z, c.part[1].w};
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      if (dtype == KIMI_FLOAT32) {
        v[i] = float_of(words[i]);
        v[i + 1] = float_of(words[i + 1]);
      } else if (dtype == KIMI_BFLOAT16) {
        widen_pair<bf16>(words[i / 2], v[i], v[i + 1]);
      } else {
        widen_pair<fp16>(words[i / 2], v[i], v[i + 1]);
      }
    }
  }
  __device__ void store(char* at, const float (&v)[8]) const {
    if (dtype == KIMI_FLOAT32) {
      store16(at, {bits_of(v[0]), bits_of(v[1]), bits_of(v[2]), bits_of(v[3])});
      store16(at + 16, {bits_of(v[4]), bits_of(v[5]), bits_of(v[6]), bits_of(v[7])});
      return;
    }
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] = dtype == KIMI_BFLOAT16 ? round_pair<bf16>(v[2 * i], v[2 * i + 1])
                                        : round_pair<fp16>(v[2 * i], v[2 * i + 1]);
    store16(at, {words[0], words[1], words[2], words[3]});
  }

  // One by one, where the rows are not wide.
  __device__ float value(const char* at) const {
    if (dtype == KIMI_FLOAT32) return *reinterpret_cast<const float*>(at);
    const uint16_t bits = *reinterpret_cast<const uint16_t*>(at);
    return dtype == KIMI_BFLOAT16 ? to_float(bf16{bits}) : to_float(fp16{bits});
  }
  __device__ void set(char* at, float x) const {
    if (dtype == KIMI_FLOAT32)
      *reinterpret_cast<float*>(at) = x;
    else if (dtype == KIMI_BFLOAT16)
      *reinterpret_cast<bf16*>(at) = from_float<bf16>(x);
    else
      *reinterpret_cast<fp16*>(at) = from_float<fp16>(x);
  }
};

/// Those rows of `base` that `lanes` names, in order: v = fma(weight of the lane, row, v) from zero,
/// or the one row itself where `alone`. The warp stays together; `inside`: the thread has columns.
__device__ inline void add_up(const Rows& rows, const char* base, int64_t stride, int32_t row,
                              float weight, uint32_t lanes, bool alone, bool inside,
                              float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = 0.0f;
  while (lanes != 0) {
    Columns values[kBatch];
    uint32_t left = lanes;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (left == 0) continue;
      const int64_t from = warp_broadcast(row, __ffs(static_cast<int>(left)) - 1);
      left &= left - 1;
      if (inside) values[b] = rows.load(base + from * stride);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (lanes == 0) continue;
      const float w = warp_broadcast(weight, __ffs(static_cast<int>(lanes)) - 1);
      lanes &= lanes - 1;
      if (!inside) continue;
      float x[8];
      rows.widen(values[b], x);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = alone ? x[i] : fma_rn(w, x[i], v[i]);
    }
  }
}
/// The same for one column.
__device__ inline float add_up_one(const Rows& rows, const char* base, int64_t stride, int32_t row,
                                   float weight, uint32_t lanes, bool alone, bool inside) {
  float sum = 0.0f;
  for (; lanes != 0; lanes &= lanes - 1) {
    const int lane = __ffs(static_cast<int>(lanes)) - 1;
    const char* const from = base + warp_broadcast(row, lane) * stride;
    const float w = warp_broadcast(weight, lane), x = inside ? rows.value(from) : 0.0f;
    sum = alone ? x : fma_rn(w, x, sum);
  }
  return sum;
}

/// A row `to` of sums, by the whole block: 8 columns a thread where both sides are wide.
__device__ inline void sum_row(const Rows& rows, const char* base, int64_t stride, int32_t row,
                               float weight, uint32_t lanes, bool alone, const Rows& out, char* to,
                               int hidden) {
  const int thread = static_cast<int>(threadIdx.x);
  if (rows.wide && out.wide) {
    for (int first = 0; first < hidden; first += kThreads * 8) {
      const int h = first + thread * 8;
      float sum[8];
      add_up(rows, base + h * rows.bytes(), stride, row, weight, lanes, alone, h < hidden, sum);
      if (h < hidden) out.store(to + h * out.bytes(), sum);
    }
    return;
  }
  for (int first = 0; first < hidden; first += kThreads) {
    const int h = first + thread;
    const float sum =
        add_up_one(rows, base + h * rows.bytes(), stride, row, weight, lanes, alone, h < hidden);
    if (h < hidden) out.set(to + h * out.bytes(), sum);
  }
}

template <class Flags>
__device__ void send(const CombineParams& p, const Exchange<Flags>& exchange) {
  const CombineLayout layout(p);
  const int hidden = static_cast<int>(p.hidden);
  const int64_t stride = p.out_stride * (p.dtype == KIMI_FLOAT32 ? 4 : 2);
  const Rows rows(p.dtype, p.out, stride, p.hidden), wire(p.wire_dtype, nullptr, 0, p.hidden);
  const int jobs = static_cast<int>(p.peers.world * p.max_tokens);
  for (int job = static_cast<int>(blockIdx.x); job < jobs; job += static_cast<int>(gridDim.x)) {
    const Job at(job, p.peers);
    if (exchange.masked(at.rank) || at.token >= p.report[4 + at.rank]) continue;
    const int64_t token = at.rank * p.max_tokens + at.token, pair = token * p.top_k + lane_id();
    const bool inside = lane_id() < p.top_k;
    const int32_t row = inside ? p.row_map[pair] : -1;
    const float weight = inside && !p.direct && p.weights != nullptr ? p.weights[pair] : 1.0f;
    const uint32_t all = warp_ballot(row >= 0);
    char* const half = exchange.half_of(at.rank);
    for (uint32_t slots = p.slots[token]; slots != 0; slots &= slots - 1) {
      const int slot = __ffs(static_cast<int>(slots)) - 1;
      const int64_t place = slot * p.max_tokens + at.token;
      const uint32_t lanes = p.direct ? all & 1u << slot : all;
      if (p.direct && threadIdx.x == 0)
        reinterpret_cast<int32_t*>(half + layout.live)[place] = lanes != 0;
      sum_row(rows, static_cast<const char*>(p.out), stride, row, weight, lanes, p.direct, wire,
              half + place * layout.row_stride, hidden);
    }
  }
}

template <class Flags>
__device__ void receive(const CombineParams& p, const Exchange<Flags>& exchange) {
  const CombineLayout layout(p);
  const int hidden = static_cast<int>(p.hidden);
  const int64_t y_stride = p.hidden * (p.dtype == KIMI_FLOAT32 ? 4 : 2);
  const Rows rows(p.dtype, p.y, y_stride, p.hidden), wire(p.wire_dtype, nullptr, 0, p.hidden);
  const char* const half = exchange.half_of(p.peers.rank);
  for (int64_t t = blockIdx.x; t < p.num_tokens; t += gridDim.x) {
    const int lane = lane_id();
    const int32_t place = static_cast<int32_t>(lane * p.max_tokens + t);
    bool there = p.home[t] >> lane & 1;
    if (p.direct && there) there = reinterpret_cast<const int32_t*>(half + layout.live)[place] != 0;
    const float weight =
        there && p.direct && p.weights != nullptr ? p.weights[t * p.top_k + lane] : 1.0f;
    const uint32_t lanes = warp_ballot(there);
    sum_row(wire, half, layout.row_stride, place, weight, lanes, false, rows,
            static_cast<char*>(p.y) + t * y_stride, hidden);
  }
}

template <class Flags>
__device__ void combine_rank(const CombineParams& p) {
  const bool sends = p.phases & KIMI_ALL_TO_ALL_SEND, meets = p.phases & KIMI_ALL_TO_ALL_MEET;
  const Exchange<Flags> exchange(
      p.peers, sends || meets ? Exchange<Flags>::next(p.peers) : static_cast<uint64_t>(p.epoch[0]));
  if (exchange.broken()) return;
  if (sends) send(p, exchange);
  if (meets) {
    const uint32_t tag = tag_of({2, p.max_tokens, p.hidden, p.top_k, p.direct, p.wire_dtype});
    exchange.signal(tag);
    if (!exchange.wait(tag)) return;
    if (blockIdx.x == 0 && threadIdx.x == 0) p.epoch[0] = static_cast<int64_t>(exchange.epoch());
  }
  if (p.phases & KIMI_ALL_TO_ALL_RECEIVE) receive(p, exchange);
}

}  // namespace kimi::exchange
