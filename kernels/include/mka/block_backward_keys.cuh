// dK and dV of block_attention, the same on the host: the rows of a target against the queries that visit it.
#pragma once

#include "mka/block_backward.cuh"

namespace mka {
namespace block {
namespace backward {

// A visit: where the queries of its first head are, of the KV head's, from the chunk's first slot on.
struct Visitor {
  const void* q;
  const void* grad_out;
  const float* lse;
  const float* delta;
  const float* bias;  // of the visit's level
  int32_t tokens;     // of the chunk; 0: it sees nothing
  int32_t level;
  int32_t diagonal;
  int32_t origin;     // of its document
  int32_t last;       // number of the last summary that it sees
};

template <typename T>
MKA_HD Visitor visitor_of(const MkaBlockAttentionArgs& a, const Plan& p, const Item& item, int64_t v) {
  const Visit at = visit(a, p, item, v);
  const int64_t row = item.pair / a.groups, group = item.pair % a.groups, head = group * (a.heads / a.groups);
  const int64_t own = a.first + at.chunk, slot = at.chunk * a.size, flat = (row * a.heads + head) * a.slots + slot;
  Visitor found{};
  if (at.level == NOTHING) return found;
  found.q = static_cast<const T*>(a.q) + row * a.q_strides[0] + slot * a.q_strides[1] + head * a.q_strides[2];
  found.grad_out =
      static_cast<const T*>(a.grad_out) + row * a.grad_strides[0] + slot * a.grad_strides[1] + head * a.grad_strides[2];
  found.lse = a.lse + flat;
  found.delta = p.delta + flat;
  if (a.bias)
    found.bias = a.bias + row * a.bias_strides[0] + slot * a.bias_strides[1] + group * a.bias_strides[2] + at.level;
  found.tokens = static_cast<int32_t>(query_tokens(a, p, row, at.chunk));
  found.level = at.level;
  found.diagonal = at.diagonal;
  found.origin = static_cast<int32_t>(origin(a, p, row, own));
  found.last = static_cast<int32_t>(own - a.window);
  return found;
}

// A stage of shared memory, for STEP queries: their rows of q, then of grad_out.
template <typename T>
struct Stage {
  T* tile;      // [2 STEP][D]
  float* rows;  // [3][STEP] lse, delta, bias
};

MKA_HD void copy_word(float* to, const float* from, bool wanted) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :
               : "r"(shared_address(to)), "l"(from), "r"(wanted ? 4 : 0)
               : "memory");
#else
  *to = wanted ? *from : 0.f;
#endif
}

// STEP queries of one head of a visitor: where they are, as in Visitor. The heads of a visitor follow one another.
struct Turn {
  const void* q;
  const void* grad_out;
  const float* lse;
  const float* delta;
  const float* bias;
  int32_t visitor;  // its number
  int32_t member;   // head, of the KV head's
  int32_t first;    // slot in the chunk
  int32_t tokens;   // from there on; 0: the visitors are through
};

// Turn (visitor, member, first), or the first after it with tokens.
template <typename T>
MKA_HD Turn turn_from(
    const MkaBlockAttentionArgs& a, const Visitor* visitors, int count, int32_t visitor, int32_t member, int32_t first) {
  while (visitor < count && first >= visitors[visitor].tokens) ++visitor, first = 0;
  if (visitor >= count) return Turn{};
  const Visitor& v = visitors[visitor];
  const int64_t flat = member * a.slots + first;
  return {static_cast<const T*>(v.q) + member * a.q_strides[2] + first * a.q_strides[1],
          static_cast<const T*>(v.grad_out) + member * a.grad_strides[2] + first * a.grad_strides[1],
          v.lse + flat,
          v.delta + flat,
          v.bias ? v.bias + first * a.bias_strides[1] : nullptr,
          visitor,
          member,
          first,
          v.tokens - first};
}

template <typename T>
MKA_HD Turn turn_after(const MkaBlockAttentionArgs& a, const Visitor* visitors, int count, int members, const Turn& t) {
  const bool more = t.member + 1 < members;
  return turn_from<T>(a, visitors, count, t.visitor, more ? t.member + 1 : 0, more ? t.first : t.first + STEP);
}

// One thread's part of copying a turn; rows without a token become zeros, which add nothing to dK and dV. The threads
// copy whole rows together, 8 of them or a multiple at a time.
template <typename T, int D>
MKA_HD void copy_turn(const Stage<T>& to, const MkaBlockAttentionArgs& a, const Turn& t, int thread, int threads) {
  thread = opaque(thread), threads = opaque(threads);
  const int first = thread / (D / 8), step = threads / (D / 8), channel = thread % (D / 8) * 8, wanted = t.tokens;
  T* tile = to.tile + swizzled<D>(first, channel);
  const int64_t q_stride = a.q_strides[1], grad_stride = a.grad_strides[1];
  const T* q = static_cast<const T*>(t.q) + first * q_stride + channel;
  const T* grad = static_cast<const T*>(t.grad_out) + first * grad_stride + channel;
  const int64_t q_step = step * q_stride, grad_step = step * grad_stride;
MKA_UNROLL_BY(2)
  for (int row = first; row < STEP; row += step) {
    // rows that are a multiple of 8 apart are swizzled alike
    copy_unit(tile, q, row < wanted);
    copy_unit(tile + STEP * D, grad, row < wanted);
    tile += step * D;
    q += q_step;
    grad += grad_step;
  }
  for (int row = thread; row < STEP; row += threads) {
    copy_word(to.rows + row, t.lse + row, row < wanted);
    copy_word(to.rows + STEP + row, t.delta + row, row < wanted);
    copy_word(to.rows + 2 * STEP + row, t.bias ? t.bias + row * a.bias_strides[1] : t.lse, t.bias && row < wanted);
  }
}

// ---- a warp: 32 rows of the target, and one of two roles ----
//
// One warp computes P and adds to dV; it hands P to another one, which computes dS and adds to dK. So each has room for
// 32 rows of its sum, and what it reads of the queries serves twice.

constexpr int SHARE = 32 * STEP / 2;  // words of P, two numbers each, that are handed over
// P is at most 1, about (a few times that where scores are so large that fp32 is coarse): as 2^12 P it is told by
// halves, more exactly than by bf16 down to 1e-8.
constexpr int SHIFT = 12;
constexpr float UNSHIFT = 1.f / (1 << SHIFT);

template <int D, int LANES>
struct KeyState {
  float grad[2][D / 8][LANES][4];  // dV / UNSHIFT or dK / scale
};

// Scores, or what follows from them, of 32 rows and STEP queries.
template <int LANES>
using Scores = float[2][STEP / 8][LANES][4];

// c = rows [0, 32) of a tile times the transposed rows [row, row + STEP) of another.
template <typename T, int D, int LANES>
MKA_HD void rows_times_rows(Scores<LANES>& c, const T* a_tile, const T* tile, int row) {
  clear(c[0]);
  clear(c[1]);
MKA_UNROLL_BY(4)
  for (int step = 0; step < D / 16; ++step) {
    uint32_t a[2][LANES][4];
    load_a<T, D, LANES>(a[0], a_tile, 0, 16 * step);
    load_a<T, D, LANES>(a[1], a_tile, 16, 16 * step);
MKA_UNROLL
    for (int n = 0; n < STEP / 16; ++n) {
      uint32_t b[2][LANES][2];
      load_b<T, D, LANES>(b, tile, row + 16 * n, 16 * step);
MKA_UNROLL
      for (int m = 0; m < 2; ++m) {
        mma<T, LANES>(c[m][2 * n], a[m], b[0]);
        mma<T, LANES>(c[m][2 * n + 1], a[m], b[1]);
      }
    }
  }
}

// c [32][D] += the columns [16 step, 16 step + 16) of x, rounded, times as many rows of a tile, from `row` on.
template <typename T, int D, int LANES>
MKA_HD void add_times(KeyState<D, LANES>& s, const Scores<LANES>& x, int step, const T* tile, int row) {
  uint32_t a[2][LANES][4];
MKA_UNROLL
  for (int m = 0; m < 2; ++m) as_a<T, LANES>(a[m], x[m][2 * step], x[m][2 * step + 1]);
MKA_UNROLL
  for (int n = 0; n < D / 16; ++n) {
    uint32_t b[2][LANES][2];
    load_b_trans<T, D, LANES>(b, tile, row, 16 * n);
MKA_UNROLL
    for (int m = 0; m < 2; ++m) {
      mma<T, LANES>(s.grad[m][2 * n], a[m], b[0]);
      mma<T, LANES>(s.grad[m][2 * n + 1], a[m], b[1]);
    }
  }
}

// The first slot of a visitor's chunk that sees row `row` of the target. origins: [C], of summaries.
MKA_HD int first_slot(const Visitor& v, const Keys& keys, const int32_t* origins, int row) {
  if (v.level == SUMMARY) return origins[row] == v.origin && keys.number + row <= v.last ? 0 : NEVER;
  return v.diagonal ? row : 0;
}

// Whether none of a turn's queries sees a key from `row` on: there is nothing to do.
MKA_HD bool behind(const Turn& turn, const Visitor* visitors, int row) {
  return visitors[turn.visitor].diagonal && row > turn.first + STEP - 1;
}

// P of the 32 rows from `row` on, which `tile` begins with: to `share` [8][32][4], and into dV. scale: of the scores, times log2 e. `meanwhile` is called while products
// are under way, `shared` when P is there.
template <typename T, int D, int LANES, typename Meanwhile, typename Shared>
MKA_HD void value_step(KeyState<D, LANES>& s, uint32_t* share, const T* tile, const Stage<T>& from, const Turn& turn,
                       const Visitor* visitors, const Keys& keys, const int32_t* origins, int row, const float& scale,
                       const Meanwhile& meanwhile, const Shared& shared) {
  Scores<LANES> x;
  rows_times_rows<T, D, LANES>(x, tile, from.tile, 0);
  meanwhile();
MKA_UNROLL
  for (int n = 0; n < STEP / 8; ++n)
MKA_UNROLL
    for (int l = 0; l < LANES; ++l) {
      const int column = 8 * n + c_column(lane_of<LANES>(l), 0);
      const auto lse = load_vec<float, 2>(from.rows + column);
      const auto bias = load_vec<float, 2>(from.rows + 2 * STEP + column);
MKA_UNROLL
      for (int m = 0; m < 2; ++m)
MKA_UNROLL
        for (int e = 0; e < 4; ++e)
          x[m][n][l][e] = exp2_of(x[m][n][l][e] * scale + ((bias.at[e % 2] - lse.at[e % 2]) * TO_BASE_2 + SHIFT));
    }
  const Visitor& v = visitors[turn.visitor];
  if (v.level == SUMMARY || (v.diagonal && row + 31 > turn.first)) {
MKA_UNROLL
    for (int l = 0; l < LANES; ++l)
MKA_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int lane = lane_of<LANES>(l);
        const int hidden = first_slot(v, keys, origins, row + lane / 4 + 8 * r) - turn.first - c_column(lane, 0);
MKA_UNROLL
        for (int n = 0; n < STEP / 8; ++n)
MKA_UNROLL
          for (int e = 0; e < 2; ++e)
            if (8 * n + e < hidden) x[r / 2][n][l][r % 2 * 2 + e] = 0.f;
      }
  }
MKA_UNROLL
  for (int l = 0; l < LANES; ++l)
MKA_UNROLL
    for (int i = 0; i < 8; ++i) {
      Vec<uint32_t, 4> words;
MKA_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float(&pair)[4] = x[i / 4][i % 4 * 2 + j / 2][l];
        words.at[j] = pack<__half>(pair[j % 2 * 2], pair[j % 2 * 2 + 1]);
      }
      store_vec(share + (i * 32 + lane_of<LANES>(l)) * 4, words);
    }
  shared();
MKA_UNROLL
  for (int step = 0; step < STEP / 16; ++step) add_times<T, D, LANES>(s, x, step, from.tile, STEP + 16 * step);
}

// dS of the same rows: into dK. `shared` waits for P.
template <typename T, int D, int LANES, typename Meanwhile, typename Shared>
MKA_HD void key_step(KeyState<D, LANES>& s, const uint32_t* share, const T* tile, const Stage<T>& from,
                     const Meanwhile& meanwhile, const Shared& shared) {
  Scores<LANES> y;
  rows_times_rows<T, D, LANES>(y, tile, from.tile, STEP);
  meanwhile();
  shared();
MKA_UNROLL
  for (int step = 0; step < STEP / 16; ++step) {
MKA_UNROLL
    for (int l = 0; l < LANES; ++l)
MKA_UNROLL
      for (int m = 0; m < 2; ++m) {
        const int lane = lane_of<LANES>(l);
        const auto words = load_vec<uint32_t, 4>(share + ((4 * m + step) * 32 + lane) * 4);
MKA_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int n = 2 * step + j / 2;
          const auto delta = load_vec<float, 2>(from.rows + STEP + 8 * n + c_column(lane, 0));
          __half weights[2];
          memcpy(static_cast<void*>(weights), &words.at[j], 4);
MKA_UNROLL
          for (int e = 0; e < 2; ++e) {
            float& x = y[m][n][l][j % 2 * 2 + e];
            const float weight = to_float(weights[e]);
            // what is not seen may be no number
            x = weight == 0.f ? 0.f : weight * (x * UNSHIFT - delta.at[e] * UNSHIFT);
          }
        }
      }
    add_times<T, D, LANES>(s, y, step, from.tile, 16 * step);
  }
}

// ---- where the gradients of a target go ----

template <typename T>
struct Grads {
  T* k;
  T* v;
  int64_t stride;
  int64_t rows;  // that there are
};

template <typename T>
MKA_HD Grads<T> grads_of(const MkaBlockAttentionArgs& a, int64_t pair, const Keys& keys) {
  const int64_t b = pair / a.groups, g = pair % a.groups, d = a.channels;
  if (keys.source == PAGES) {
    const int64_t at = (pair * a.pages * a.size + keys.row) * d;
    return {static_cast<T*>(a.grad_page_k) + at, static_cast<T*>(a.grad_page_v) + at, d, a.size};
  }
  const bool summaries = keys.source == SUMMARIES;
  const int64_t length = summaries ? a.summaries : halo(a) * a.size + a.slots;
  const int64_t at = ((b * length + keys.row) * a.groups + g) * d;
  return {static_cast<T*>(summaries ? a.grad_summary_k : a.grad_k) + at,
          static_cast<T*>(summaries ? a.grad_summary_v : a.grad_v) + at, a.groups * d, min64(a.size, length - keys.row)};
}

// The rows from `first` on of dV (`values`) or dK.
template <typename T, int D, int LANES>
MKA_HD void end_keys(const KeyState<D, LANES>& s, const MkaBlockAttentionArgs& a, const Plan& p, const Item& item,
                     const Keys& keys, int first, bool values) {
  const float factor = values ? UNSHIFT : static_cast<float>(a.scale);
MKA_UNROLL
  for (int m = 0; m < 2; ++m, first += 16) {
    const int64_t kept = keys.count - first;
    if (item.slot >= 0) {
      float* to = p.partials + ((item.slot * 2 + values) * a.size + first) * D;
      store_rows<D, LANES>(to, D, s.grad[m], factor, kept, 16);
    } else {
      const Grads<T> to = grads_of<T>(a, item.pair, keys);
      store_rows<D, LANES>(
          (values ? to.v : to.k) + first * to.stride, to.stride, s.grad[m], factor, kept, to.rows - first);
    }
  }
}

// Four channels of a gradient of a target that has several parts: `unit` of [2, C, d / 4].
template <typename T>
MKA_HD void reduce_unit(const MkaBlockAttentionArgs& a, const Plan& p, const Reduction& r, int64_t unit) {
  const int64_t channels = a.channels / 4, row = unit / channels % a.size, size = 2 * a.size * a.channels;
  const Grads<T> to = grads_of<T>(a, r.pair, target_keys(a, p, r.pair, r.target));
  if (row >= to.rows) return;
  const float* from = p.partials + r.slot * size + unit * 4;
  Vec<float, 4> sum{{0.f, 0.f, 0.f, 0.f}};
  for (int part = 0; part < r.count; ++part) {
    const auto x = load_vec<float, 4>(from + part * size);
MKA_UNROLL
    for (int e = 0; e < 4; ++e) sum.at[e] += x.at[e];
  }
  Vec<T, 4> rounded;
MKA_UNROLL
  for (int e = 0; e < 4; ++e) rounded.at[e] = from_float<T>(sum.at[e]);
  store_vec((unit < a.size * channels ? to.k : to.v) + row * to.stride + unit % channels * 4, rounded);
}

}  // namespace backward
}  // namespace block
}  // namespace mka
