// The arithmetic of block_attention's backward for a warp, the same on the host (LANES: mka/mma.cuh).
//
// With x = scale q.k + bias, P = exp(x - lse) and delta = rowsum(dO * O): dS = P (dO V^T - delta) is the gradient of x,
// so dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO, and the bias of a level gets the sum of the level's dS.
#pragma once

#include "mka/block_plan.cuh"
#include "mka/mma.cuh"

namespace mka {
namespace block {
namespace backward {

constexpr float TO_BASE_2 = 1.4426950408889634f;
constexpr int STEP = 64;        // keys, or queries, that a block takes at a time
constexpr int NEVER = 1 << 20; // a slot that no chunk has

// ---- rows in global memory and the registers of a warp ----

// Of 16 rows, `stride` elements apart, channels [16 step, 16 step + 16) as an a; those from `count` on are zeros.
template <typename T, int LANES>
MKA_HD void rows_as_a(uint32_t (&a)[LANES][4], const T* from, int64_t stride, int count, int step) {
MKA_UNROLL
  for (int l = 0; l < LANES; ++l)
MKA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int lane = lane_of<LANES>(l), row = lane / 4 + e % 2 * 8, channel = 16 * step + e / 2 * 8 + lane % 4 * 2;
      a[l][e] = row < count ? *reinterpret_cast<const uint32_t*>(from + row * stride + channel) : 0u;
    }
}

template <typename T>
MKA_HD float dot(uint32_t x, uint32_t y) {
  T a[2], b[2];
  memcpy(static_cast<void*>(a), &x, 4);
  memcpy(static_cast<void*>(b), &y, 4);
  return to_float(a[0]) * to_float(b[0]) + to_float(a[1]) * to_float(b[1]);
}

// A result [16][D] times `factor` to the first `rows` rows; those from `kept` on as zeros.
template <int D, int LANES, typename Out>
MKA_HD void store_rows(
    Out* to, int64_t stride, const float (&c)[D / 8][LANES][4], float factor, int64_t kept, int64_t rows) {
MKA_UNROLL
  for (int l = 0; l < LANES; ++l)
MKA_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int lane = lane_of<LANES>(l), row = lane / 4 + 8 * r;
      if (row >= rows) continue;
MKA_UNROLL
      for (int n = 0; n < D / 8; ++n) {
        Vec<Out, 2> pair;
MKA_UNROLL
        for (int e = 0; e < 2; ++e) pair.at[e] = from_float<Out>(row < kept ? c[n][l][2 * r + e] * factor : 0.f);
        store_vec(to + row * stride + 8 * n + lane % 4 * 2, pair);
      }
    }
}

template <int N, int LANES>
MKA_HD void clear(float (&c)[N][LANES][4]) {
MKA_UNROLL
  for (int n = 0; n < N; ++n)
MKA_UNROLL
    for (int l = 0; l < LANES; ++l)
MKA_UNROLL
      for (int e = 0; e < 4; ++e) c[n][l][e] = 0.f;
}

// c [16][16 N] = a times the transposed rows [row, row + 16 N) of a tile.
template <typename T, int D, int N, int LANES>
MKA_HD void times_rows(float (&c)[2 * N][LANES][4], const uint32_t (&a)[D / 16][LANES][4], const T* tile, int row) {
  clear(c);
MKA_UNROLL
  for (int step = 0; step < D / 16; ++step)
MKA_UNROLL
    for (int n = 0; n < N; ++n) {
      uint32_t b[2][LANES][2];
      load_b<T, D, LANES>(b, tile, row + 16 * n, 16 * step);
      mma<T, LANES>(c[2 * n], a[step], b[0]);
      mma<T, LANES>(c[2 * n + 1], a[step], b[1]);
    }
}

// The same with the first 16 rows of another tile as a.
template <typename T, int D, int N, int LANES>
MKA_HD void times_rows(float (&c)[2 * N][LANES][4], const T* a_tile, const T* tile, int row) {
  clear(c);
MKA_UNROLL
  for (int step = 0; step < D / 16; ++step) {
    uint32_t a[LANES][4];
    load_a<T, D, LANES>(a, a_tile, 0, 16 * step);
MKA_UNROLL
    for (int n = 0; n < N; ++n) {
      uint32_t b[2][LANES][2];
      load_b<T, D, LANES>(b, tile, row + 16 * n, 16 * step);
      mma<T, LANES>(c[2 * n], a, b[0]);
      mma<T, LANES>(c[2 * n + 1], a, b[1]);
    }
  }
}

// c [16][D] += x [16][16 N], rounded, times rows [row, row + 16 N) of a tile.
template <typename T, int D, int N, int LANES>
MKA_HD void add_times(float (&c)[D / 8][LANES][4], const float (&x)[2 * N][LANES][4], const T* tile, int row) {
MKA_UNROLL
  for (int step = 0; step < N; ++step) {
    uint32_t a[LANES][4];
    as_a<T, LANES>(a, x[2 * step], x[2 * step + 1]);
MKA_UNROLL
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[2][LANES][2];
      load_b_trans<T, D, LANES>(b, tile, row + 16 * step, 16 * n);
      mma<T, LANES>(c[2 * n], a, b[0]);
      mma<T, LANES>(c[2 * n + 1], a, b[1]);
    }
  }
}

// ---- dQ: a warp has 16 packed query rows, slots of one query head ----

struct Queries {
  int64_t row, group, head;
  int64_t slot;    // of the first row, among those at hand
  int first;       // the same in its chunk
  int rows, tokens; // of the 16: that there are, that have a token
};

MKA_HD Queries queries_of(const MkaBlockAttentionArgs& a, const Plan& p, const QueryTile& tile, int warp) {
  const int64_t fan = a.heads / a.groups, packed = tile.first + 16 * warp, first = packed % a.size;
  Queries q{tile.row, tile.group, tile.group * fan + packed / a.size, tile.chunk * a.size + first,
            static_cast<int>(first), 0, 0};
  if (packed >= fan * a.size) return q;
  q.rows = static_cast<int>(max64(0, min64(16, a.slots - q.slot)));
  q.tokens = static_cast<int>(max64(0, min64(16, query_tokens(a, p, tile.row, tile.chunk) - first)));
  return q;
}

template <int D, int LANES>
struct QueryState {
  uint32_t q[D / 16][LANES][4], grad_out[D / 16][LANES][4];
  float grad[D / 8][LANES][4];  // dQ / scale
};

// What a warp keeps in shared memory.
struct QueryRows {
  float delta[16];
  float constant[3][16];         // (bias - lse) log2 e
  float grad_bias[3][2][32];     // of a lane's columns, for its rows lane / 4 and lane / 4 + 8
};

template <typename T, int D, int LANES>
MKA_HD void begin_queries(
    QueryState<D, LANES>& s, QueryRows& kept, const MkaBlockAttentionArgs& a, const Plan& p, const Queries& q) {
  const T* rows = static_cast<const T*>(a.q) + q.row * a.q_strides[0] + q.slot * a.q_strides[1] + q.head * a.q_strides[2];
  const T* grads = static_cast<const T*>(a.grad_out) + q.row * a.grad_strides[0] + q.slot * a.grad_strides[1] +
                   q.head * a.grad_strides[2];
  const T* outs = static_cast<const T*>(a.out) + ((q.row * a.slots + q.slot) * a.heads + q.head) * D;
  clear(s.grad);
  float delta[2][LANES];
MKA_UNROLL
  for (int l = 0; l < LANES; ++l) delta[0][l] = delta[1][l] = 0.f;
MKA_UNROLL
  for (int step = 0; step < D / 16; ++step) {
    uint32_t out[LANES][4];
    rows_as_a(s.q[step], rows, a.q_strides[1], q.tokens, step);
    rows_as_a(s.grad_out[step], grads, a.grad_strides[1], q.tokens, step);
    rows_as_a(out, outs, a.heads * D, q.tokens, step);
MKA_UNROLL
    for (int l = 0; l < LANES; ++l)
MKA_UNROLL
      for (int e = 0; e < 4; ++e) delta[e % 2][l] += dot<T>(s.grad_out[step][l][e], out[l][e]);
  }
  row_sum<LANES>(delta[0]);
  row_sum<LANES>(delta[1]);
  const int64_t at = (q.row * a.heads + q.head) * a.slots + q.slot;
MKA_UNROLL
  for (int l = 0; l < LANES; ++l)
MKA_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int lane = lane_of<LANES>(l), row = lane / 4 + 8 * r;
      for (int level = 0; level < 3; ++level) kept.grad_bias[level][r][lane] = 0.f;
      if (lane % 4) continue;
      const bool token = row < q.tokens;
      kept.delta[row] = delta[r][l];
      if (row < q.rows) p.delta[at + row] = delta[r][l];
      const float lse = token ? a.lse[at + row] : INFINITY;
      const int64_t bias = q.row * a.bias_strides[0] + (q.slot + row) * a.bias_strides[1] + q.group * a.bias_strides[2];
      for (int level = 0; level < 3; ++level)
        kept.constant[level][row] = ((a.bias && token ? a.bias[bias + level] : 0.f) - lse) * TO_BASE_2;
    }
}

// Keys that a block of queries takes at once.
struct Found {
  const void* k;
  const void* v;
  int64_t k_stride, v_stride;
  uint64_t seen;  // bit i: row i
  int level;
  int from;       // row i is seen by the chunk's slots from + i and on; below -STEP: by all
};

// Rows of k and v: the first, and how far the next is.
template <typename T>
struct Rows {
  const T* k;
  const T* v;
  int64_t k_stride, v_stride;
};

template <typename T>
MKA_HD Rows<T> rows_of(const MkaBlockAttentionArgs& a, int64_t pair, int source, int64_t row) {
  const int64_t b = pair / a.groups, g = pair % a.groups;
  if (source == PAGES) {
    const int64_t at = (pair * a.pages * a.size + row) * a.channels;
    return {static_cast<const T*>(a.page_k) + at, static_cast<const T*>(a.page_v) + at, a.channels, a.channels};
  }
  const bool summaries = source == SUMMARIES;
  const int64_t* ks = summaries ? a.summary_k_strides : a.k_strides;
  const int64_t* vs = summaries ? a.summary_v_strides : a.v_strides;
  return {static_cast<const T*>(summaries ? a.summary_k : a.k) + b * ks[0] + row * ks[1] + g * ks[2],
          static_cast<const T*>(summaries ? a.summary_v : a.v) + b * vs[0] + row * vs[1] + g * vs[2], ks[1], vs[1]};
}

template <typename T>
MKA_HD Found find(const MkaBlockAttentionArgs& a, const Plan& p, const KeyList<STEP>& list, int64_t t) {
  const KeyTile tile = key_tile<STEP>(a, p, list, t);
  const Rows<T> rows = rows_of<T>(a, list.pair, tile.source, tile.row);
  Found f{rows.k, rows.v, rows.k_stride, rows.v_stride, 0, tile.level,
          tile.diagonal ? static_cast<int>(tile.chunk_row) : -NEVER};
  if (tile.level == SUMMARY) {
    for (int i = 0; i < STEP; ++i)
      if (i < tile.count)
        f.seen |= static_cast<uint64_t>(sees_summary(a, p, list.pair / a.groups, list.own, list.origin, tile.number + i)) << i;
  } else if (tile.count > 0) {
    f.seen = ~uint64_t{0} >> (STEP - tile.count);
  }
  return f;
}

// One thread's part of copying what was found; rows that nobody sees become zeros.
template <typename T, int D>
MKA_HD void copy_keys(T* k, T* v, const Found& f, int thread, int threads) {
  const uint64_t seen = f.seen;
  const auto wanted = [=](int row) { return seen >> row & 1; };
  copy_rows_where<T, D>(k, static_cast<const T*>(f.k), f.k_stride, STEP, wanted, thread, threads);
  copy_rows_where<T, D>(v, static_cast<const T*>(f.v), f.v_stride, STEP, wanted, thread, threads);
}

// scale: of the scores, times log2 e. `meanwhile` is called once, while products are under way.
template <typename T, int D, int LANES, typename Meanwhile>
MKA_HD void query_step(QueryState<D, LANES>& s, QueryRows& kept, const T* k, const T* v, const Found& f, const Queries& q,
                       float scale, const Meanwhile& meanwhile) {
  // no token, no key, or all keys behind the queries
  if (q.tokens == 0 || f.seen == 0 || f.from > q.first + 15) {
    meanwhile();
    return;
  }
  float x[STEP / 8][LANES][4], y[STEP / 8][LANES][4];
  times_rows<T, D, STEP / 16, LANES>(x, s.q, k, 0);
  meanwhile();
  const uint64_t seen = f.seen;
  const int from = f.from, first = q.first;
MKA_UNROLL
  for (int l = 0; l < LANES; ++l)
MKA_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float constant = kept.constant[f.level][lane_of<LANES>(l) / 4 + 8 * r];
MKA_UNROLL
      for (int n = 0; n < STEP / 8; ++n)
MKA_UNROLL
        for (int e = 2 * r; e < 2 * r + 2; ++e) x[n][l][e] = exp2_of(x[n][l][e] * scale + constant);
    }
  if (~seen || from + STEP - 1 > first) {
MKA_UNROLL
    for (int l = 0; l < LANES; ++l) {
      const int lane = lane_of<LANES>(l);
      const uint64_t mine = seen >> c_column(lane, 0);
MKA_UNROLL
      for (int n = 0; n < STEP / 8; ++n)
MKA_UNROLL
        for (int e = 0; e < 4; ++e) {
          const bool sees = mine >> (8 * n + e % 2) & 1 && from + 8 * n + c_column(lane, e) <= first + c_row(lane, e);
          if (!sees) x[n][l][e] = 0.f;
        }
    }
  }
  times_rows<T, D, STEP / 16, LANES>(y, s.grad_out, v, 0);
MKA_UNROLL
  for (int l = 0; l < LANES; ++l)
MKA_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int lane = lane_of<LANES>(l);
      const float delta = kept.delta[lane / 4 + 8 * r];
      float sum = 0.f;
MKA_UNROLL
      for (int n = 0; n < STEP / 8; ++n)
MKA_UNROLL
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          y[n][l][e] = x[n][l][e] * (y[n][l][e] - delta);
          sum += y[n][l][e];
        }
      kept.grad_bias[f.level][r][lane] += sum;
    }
  add_times<T, D, STEP / 16, LANES>(s.grad, y, k, 0);
}

template <typename T, int D, int LANES>
MKA_HD void end_queries(
    const QueryState<D, LANES>& s, const QueryRows& kept, const MkaBlockAttentionArgs& a, const Queries& q) {
  const int64_t at = (q.row * a.slots + q.slot) * a.heads + q.head;
  store_rows<D, LANES>(static_cast<T*>(a.grad_q) + at * D, a.heads * D, s.grad, static_cast<float>(a.scale), q.tokens, q.rows);
  if (!a.grad_bias) return;
MKA_UNROLL
  for (int level = 0; level < 3; ++level)
MKA_UNROLL
    for (int r = 0; r < 2; ++r) {
      float sum[LANES];
MKA_UNROLL
      for (int l = 0; l < LANES; ++l) sum[l] = kept.grad_bias[level][r][lane_of<LANES>(l)];
      row_sum<LANES>(sum);
MKA_UNROLL
      for (int l = 0; l < LANES; ++l) {
        const int lane = lane_of<LANES>(l), row = lane / 4 + 8 * r;
        if (lane % 4 == 0 && row < q.rows) a.grad_bias[(at + row * a.heads) * 3 + level] = row < q.tokens ? sum[l] : 0.f;
      }
    }
}

}  // namespace backward
}  // namespace block
}  // namespace mka
