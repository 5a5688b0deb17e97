// SPDX-License-Identifier: MIT
//
// Ranks of an all_to_all in one process, as slices of one allocation, and what they must get, in
// loops from the definition of csrc/all_to_all/all_to_all.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "all_to_all/all_to_all.h"
#include "check.h"
#include "common/dtype.h"

namespace a2a {

using namespace kimi;
using Bytes = std::vector<uint8_t>;

inline std::string g_case;  // what a failure prints
inline void require(bool condition, const std::string& what) {
  if (!condition) check::fail(__FILE__, __LINE__, what + ": " + g_case);
}

struct Shape {
  int ranks = 2, experts = 4, top_k = 2, hidden = 16, align = 1, halves = 2;
  int64_t tokens = 4;  // of a rank, at most
  bool direct = false, weighted = true, strict = false;
  int beside = 0;         // bytes
  int64_t capacity = -1;  // -1: as many rows as there are
  kimi_dtype dtype = KIMI_BFLOAT16, wire = KIMI_BFLOAT16;
  uint64_t masked = 0;
  int64_t timeout = 1000'000'000'000;  // ns of the host's clock
};

struct Pair {
  int rank;
  int64_t token;
  int slot;
};

inline int64_t value_bytes(kimi_dtype dtype) { return dtype == KIMI_FLOAT32 ? 4 : 2; }
inline float load_value(const uint8_t* at, kimi_dtype dtype) {
  float x = 0;
  dispatch(dtype, [&]<class T>() {
    T v;
    std::memcpy(&v, at, sizeof v);
    x = to_float(v);
  });
  return x;
}
inline void store_value(uint8_t* at, kimi_dtype dtype, float x) {
  dispatch(dtype, [&]<class T>() {
    const T v = from_float<T>(x);
    std::memcpy(at, &v, sizeof v);
  });
}
inline float through(float x, kimi_dtype dtype) {
  uint8_t bytes[4];
  store_value(bytes, dtype, x);
  return load_value(bytes, dtype);
}

/// One rank's tensors; outputs are filled with a canary.
struct Rank {
  int64_t tokens = 0;
  Bytes x, beside, y, y_beside, out, home_y;
  std::vector<int32_t> ids, row_map, offsets, counts;
  std::vector<float> weights, y_weights;
  std::vector<int32_t> y_row_map, y_source, y_offsets, y_counts, loads;
  std::vector<uint32_t> y_slots, home;
  std::vector<int64_t> report;
  int64_t epoch = 0;
};

/// What the ranks must get.
struct Expected {
  std::vector<std::vector<Pair>> rows;  // of each rank; slot -1 is padding
  std::vector<std::vector<int32_t>> offsets, counts;
  std::vector<int64_t> wanted, dropped;
};

struct World {
  Shape s;
  std::mt19937 random;
  std::vector<Rank> rank;
  std::vector<kimi_all_to_all_state> state;
  int64_t buffer_bytes = 0;
  std::unique_ptr<uint8_t, decltype(&std::free)> memory{nullptr, &std::free};
  std::vector<void*> buffers;

  World(const Shape& shape, uint64_t seed)
      : s(shape),
        random(static_cast<unsigned>(seed * 7919 + 13)),
        rank(shape.ranks),
        state(shape.ranks) {
    kimi_all_to_all_dispatch_params d{};
    kimi_all_to_all_combine_params c{};
    d.peers.world = s.ranks;
    d.peers.halves = s.halves;
    d.max_tokens = c.max_tokens = s.tokens;
    d.row_bytes = row_bytes();
    d.beside_bytes = s.beside;
    d.num_experts = s.experts;
    d.top_k = s.top_k;
    d.direct = s.direct;
    c.hidden = s.hidden;
    c.wire_dtype = s.wire;
    buffer_bytes = static_cast<int64_t>(all_to_all_buffer_bytes(d, c));
    require(buffer_bytes % 128 == 0, "buffers lie one after the other");
    memory.reset(static_cast<uint8_t*>(
        std::aligned_alloc(128, static_cast<size_t>(buffer_bytes * s.ranks))));
    std::memset(memory.get(), 0, static_cast<size_t>(buffer_bytes * s.ranks));
    for (int r = 0; r < s.ranks; ++r) buffers.push_back(memory.get() + r * buffer_bytes);
    for (auto& each : state) {
      each = {};
      each.masked = s.masked;
    }
    fill(0xff);
  }

  int64_t row_bytes() const { return s.hidden * value_bytes(s.dtype); }
  bool masked(int r) const { return s.masked >> r & 1; }
  int first(int r) const {
    const int small = s.experts / s.ranks, more = s.experts % s.ranks;
    return r * small + std::min(r, more);
  }
  int owner(int expert) const {
    for (int r = 0; r < s.ranks; ++r)
      if (expert < first(r + 1)) return r;
    return -1;
  }
  /// Everything in the buffers but the flags; 0xff is NaN, -1.
  void fill(int byte) {
    const int64_t flags = s.halves * 64 * 8;
    for (void* buffer : buffers)
      std::memset(static_cast<char*>(buffer) + flags, byte,
                  static_cast<size_t>(buffer_bytes - flags));
  }

  /// New tokens: balanced or all to few experts, some dropped, some ranks without any.
  void draw(int hot, double drop) {
    std::normal_distribution<float> normal(0.0f, 2.0f);
    std::uniform_real_distribution<double> uniform(0.0, 1.0);
    for (int r = 0; r < s.ranks; ++r) {
      Rank& k = rank[r];
      k.tokens = masked(r) || random() % 5 == 0 ? 0
                 : random() % 3 == 0            ? s.tokens
                                                : static_cast<int64_t>(random() % (s.tokens + 1));
      const int64_t pairs = k.tokens * s.top_k;
      k.x.resize(k.tokens * row_bytes());
      for (size_t i = 0; i < k.x.size(); i += value_bytes(s.dtype))
        store_value(&k.x[i], s.dtype, normal(random));
      k.beside.resize(k.tokens * s.beside);
      for (uint8_t& b : k.beside) b = static_cast<uint8_t>(random());
      k.weights.resize(pairs);
      for (float& w : k.weights) w = normal(random);
      k.ids.resize(pairs);
      for (int64_t t = 0; t < k.tokens; ++t)
        for (int i = 0; i < s.top_k; ++i) {
          const int among = hot > 0 ? std::min(hot, s.experts) : s.experts;
          int32_t id = static_cast<int32_t>(random() % among);
          if (uniform(random) < drop) id = random() % 2 ? -1 : s.experts;
          k.ids[t * s.top_k + i] = id;
        }
      k.counts.assign(s.experts, 0);
      for (int32_t id : k.ids)
        if (id >= 0 && id < s.experts) ++k.counts[id];
      k.offsets.assign(s.experts, 0);
      int32_t end = 0;
      for (int e = 0; e < s.experts; ++e) k.offsets[e] = end += k.counts[e];
      std::vector<int32_t> next(s.experts);
      for (int e = 0; e < s.experts; ++e) next[e] = k.offsets[e] - k.counts[e];
      k.row_map.assign(pairs, -1);
      for (int64_t p = 0; p < pairs; ++p)
        if (const int32_t id = k.ids[p]; id >= 0 && id < s.experts) k.row_map[p] = next[id]++;
      clear(k, r);
    }
  }
  void clear(Rank& k, int r) {
    const int local = first(r + 1) - first(r);
    k.y_row_map.assign(s.ranks * s.tokens * s.top_k, -7);
    k.y_weights.assign(k.y_row_map.size(), -7.0f);
    k.y_slots.assign(s.ranks * s.tokens, 7);
    k.home.assign(s.tokens, 7);
    k.y_offsets.assign(local, -7);
    k.y_counts.assign(local, -7);
    k.loads.assign(s.ranks * s.experts, -7);
    k.report.assign(4 + s.ranks, -7);
    k.home_y.assign(k.tokens * row_bytes(), 0xa5);
  }

  /// Rows of each rank by (expert, source rank, token, slot).
  Expected expected() const {
    Expected e;
    for (int r = 0; r < s.ranks; ++r) {
      std::vector<std::vector<Pair>> of(first(r + 1) - first(r));
      for (int source = 0; source < s.ranks; ++source)
        for (int64_t t = 0; t < rank[source].tokens; ++t)
          for (int k = 0; k < s.top_k; ++k) {
            const int id = rank[source].ids[t * s.top_k + k] - first(r);
            if (!masked(r) && id >= 0 && id < static_cast<int>(of.size()))
              of[id].push_back({source, t, k});
          }
      const auto size = [&](size_t level) {
        int64_t rows = 0;
        for (const auto& pairs : of)
          rows += (std::min<int64_t>(pairs.size(), level) + s.align - 1) / s.align * s.align;
        return rows;
      };
      size_t level = 0, all = 0;
      for (const auto& pairs : of) level = std::max(level, pairs.size());
      for (const auto& pairs : of) all += pairs.size();
      e.wanted.push_back(size(level));
      while (s.capacity >= 0 && size(level) > s.capacity) --level;
      std::vector<Pair> rows;
      std::vector<int32_t> offsets, counts;
      for (const auto& pairs : of) {
        const size_t kept = std::min(pairs.size(), level);
        rows.insert(rows.end(), pairs.begin(), pairs.begin() + static_cast<int64_t>(kept));
        counts.push_back(static_cast<int32_t>(kept));
        all -= kept;
        while (rows.size() % s.align != 0) rows.push_back({-1, -1, -1});
        offsets.push_back(static_cast<int32_t>(rows.size()));
      }
      if (s.capacity >= 0) rows.resize(s.capacity, {-1, -1, -1});
      e.rows.push_back(rows);
      e.offsets.push_back(offsets);
      e.counts.push_back(counts);
      e.dropped.push_back(static_cast<int64_t>(all));
    }
    return e;
  }

  kimi_peer_memory peers(int r) {
    return {buffers.data(), &state[r], buffer_bytes, s.timeout, s.halves, r, s.ranks};
  }
  kimi_all_to_all_dispatch_params dispatch_params(int r, int64_t rows, bool again = false) {
    Rank& k = rank[r];
    k.y.assign(rows * row_bytes(), 0xa5);
    k.y_beside.assign(rows * s.beside, 0xa5);
    if (!again) k.y_source.assign(rows, -7);
    kimi_all_to_all_dispatch_params p{};
    p.peers = peers(r);
    p.x = k.x.data();
    p.beside = k.beside.data();
    p.indices = k.ids.data();
    p.row_map = k.row_map.data();
    p.offsets = k.offsets.data();
    p.tokens_per_expert = k.counts.data();
    p.weights = s.weighted ? k.weights.data() : nullptr;
    p.y = k.y.data();
    p.y_beside = k.y_beside.data();
    p.y_weights = s.weighted ? k.y_weights.data() : nullptr;
    p.y_row_map = k.y_row_map.data();
    p.y_source = k.y_source.data();
    p.y_slots = k.y_slots.data();
    p.home = k.home.data();
    p.y_offsets = k.y_offsets.data();
    p.y_tokens_per_expert = k.y_counts.data();
    p.loads = k.loads.data();
    p.report = k.report.data();
    p.num_tokens = k.tokens;
    p.max_tokens = s.tokens;
    p.num_rows = rows;
    p.row_bytes = p.x_stride_bytes = row_bytes();
    p.beside_bytes = s.beside;
    p.num_experts = s.experts;
    p.top_k = s.top_k;
    p.align = s.align;
    p.direct = s.direct;
    p.again = again;
    p.strict = s.strict;
    p.phases = KIMI_ALL_TO_ALL_ALL;
    return p;
  }
  kimi_all_to_all_combine_params combine_params(int r, const Bytes& out) {
    Rank& k = rank[r];
    kimi_all_to_all_combine_params p{};
    p.peers = peers(r);
    p.out = out.data();
    p.row_map = k.y_row_map.data();
    p.slots = k.y_slots.data();
    p.home = k.home.data();
    p.report = k.report.data();
    p.weights = !s.weighted ? nullptr : s.direct ? k.weights.data() : k.y_weights.data();
    p.y = k.home_y.data();
    p.epoch = &k.epoch;
    p.num_tokens = k.tokens;
    p.max_tokens = s.tokens;
    p.hidden = p.out_stride = s.hidden;
    p.top_k = s.top_k;
    p.direct = s.direct;
    p.dtype = s.dtype;
    p.wire_dtype = s.wire;
    p.phases = KIMI_ALL_TO_ALL_ALL;
    return p;
  }

  /// `again`: of the layout nothing has been written.
  void check_dispatch(const Expected& e, int r) const;
  /// y of all ranks from the results outs.
  void check_combine(const Expected& e, const std::vector<Bytes>& outs, int r) const;
};

inline void World::check_dispatch(const Expected& e, int r) const {
  const Rank& k = rank[r];
  const std::string who = " of rank " + std::to_string(r);
  std::vector<int32_t> row_map(k.y_row_map.size(), -1), source;
  std::vector<float> weights(k.y_weights.size(), 0.0f);
  Bytes y, beside;
  for (const Pair& pair : e.rows[r]) {
    if (pair.slot < 0) {
      source.push_back(-1);
      y.resize(y.size() + row_bytes(), 0);
      beside.resize(beside.size() + s.beside, 0);
      continue;
    }
    const Rank& from = rank[pair.rank];
    const int64_t at = (pair.rank * s.tokens + pair.token) * s.top_k + pair.slot;
    row_map[at] = static_cast<int32_t>(source.size());
    weights[at] = from.weights[pair.token * s.top_k + pair.slot];
    source.push_back(static_cast<int32_t>(at));
    y.insert(y.end(), &from.x[pair.token * row_bytes()],
             &from.x[pair.token * row_bytes()] + row_bytes());
    const auto extra = from.beside.begin() + pair.token * s.beside;
    beside.insert(beside.end(), extra, extra + s.beside);
  }
  require(k.y == y, "y" + who);
  require(k.y_beside == beside, "y_beside" + who);
  require(k.y_source == source, "source" + who);
  require(k.y_row_map == row_map, "row_map" + who);
  require(!s.weighted || k.y_weights == weights, "weights" + who);
  require(k.y_offsets == e.offsets[r], "offsets" + who);
  require(k.y_counts == e.counts[r], "tokens_per_expert" + who);
  require(k.report[1] == e.wanted[r] && k.report[3] == e.dropped[r], "report" + who);
  require(k.report[2] == *std::max_element(e.wanted.begin(), e.wanted.end()), "most rows" + who);
  for (int other = 0; other < s.ranks; ++other) {
    require(k.report[4 + other] == (masked(other) ? 0 : rank[other].tokens), "tokens" + who);
    for (int x = 0; x < s.experts; ++x)
      require(k.loads[other * s.experts + x] == (masked(owner(x)) ? 0 : rank[other].counts[x]),
              "loads" + who);
  }
}

inline void World::check_combine(const Expected& e, const std::vector<Bytes>& outs, int r) const {
  struct Place {
    int rank;
    int64_t row;
  };
  const Rank& k = rank[r];
  std::vector<Place> places(k.tokens * s.top_k, {-1, 0});
  for (int other = 0; other < s.ranks; ++other)
    for (size_t row = 0; row < e.rows[other].size(); ++row)
      if (const Pair& pair = e.rows[other][row]; pair.slot >= 0 && pair.rank == r)
        places[pair.token * s.top_k + pair.slot] = {other, static_cast<int64_t>(row)};
  for (int64_t t = 0; t < k.tokens; ++t)
    for (int h = 0; h < s.hidden; ++h) {
      const auto add = [&](int only, float sum) {
        for (int slot = 0; slot < s.top_k; ++slot) {
          const Place place = places[t * s.top_k + slot];
          if (place.rank < 0 || (only >= 0 && place.rank != only)) continue;
          float v = load_value(
              &outs[place.rank][place.row * row_bytes() + h * value_bytes(s.dtype)], s.dtype);
          if (only < 0) v = through(v, s.wire);
          const float w = s.weighted ? k.weights[t * s.top_k + slot] : 1.0f;
          sum = s.weighted ? std::fma(w, v, sum) : sum + v;
        }
        return sum;
      };
      float y = 0.0f;
      if (s.direct) y = add(-1, 0.0f);
      for (int other = 0; other < s.ranks && !s.direct; ++other)
        y += through(add(other, 0.0f), s.wire);
      const float want = through(y, s.dtype);
      const float got = load_value(&k.home_y[t * row_bytes() + h * value_bytes(s.dtype)], s.dtype);
      require(bits_of(got) == bits_of(want) || (got != got && want != want),
              "y of rank " + std::to_string(r) + " token " + std::to_string(t) + " column " +
                  std::to_string(h) + ": " + std::to_string(got) + ", expected " +
                  std::to_string(want));
    }
}

}  // namespace a2a
