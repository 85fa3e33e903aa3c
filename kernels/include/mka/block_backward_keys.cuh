// dK and dV of block_attention for a warp, the same on the host: 16 rows of a target against the queries that visit it.
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

template <int D, int LANES>
struct KeyState {
  float grad_k[D / 8][LANES][4], grad_v[D / 8][LANES][4];  // dK / scale
};

// The first slot of a visitor's chunk that sees row `row` of the target. origins: [C], of summaries.
MKA_HD int first_slot(const Visitor& v, const Keys& keys, const int32_t* origins, int row) {
  if (v.level == SUMMARY) return origins[row] == v.origin && keys.number + row <= v.last ? 0 : NEVER;
  return v.diagonal ? row : 0;
}

// The target's rows lie in k_tile and v_tile, the warp's from `row` on; scale: of the scores, times log2 e. `meanwhile`
// is called once, while products are under way.
template <typename T, int D, int LANES, typename Meanwhile>
MKA_HD void key_step(KeyState<D, LANES>& s, const T* k_tile, const T* v_tile, const Stage<T>& from, const Turn& turn,
                     const Visitor* visitors, const Keys& keys, const int32_t* origins, int row, const float& scale,
                     const Meanwhile& meanwhile) {
  float x[STEP / 8][LANES][4], y[STEP / 8][LANES][4];
  // a warp whose keys all lie behind the queries has nothing to do
  const bool behind = visitors[turn.visitor].diagonal && row > turn.first + STEP - 1;
  if (behind) {
    meanwhile();
    return;
  }
  times_rows<T, D, STEP / 16, LANES>(x, k_tile + row * D, from.tile, 0);
  meanwhile();
MKA_UNROLL
  for (int n = 0; n < STEP / 8; ++n)
MKA_UNROLL
    for (int l = 0; l < LANES; ++l) {
      const int column = 8 * n + c_column(lane_of<LANES>(l), 0);
      const auto lse = load_vec<float, 2>(from.rows + column);
      const auto bias = load_vec<float, 2>(from.rows + 2 * STEP + column);
MKA_UNROLL
      for (int e = 0; e < 4; ++e)
        x[n][l][e] = exp2_of(x[n][l][e] * scale + (bias.at[e % 2] - lse.at[e % 2]) * TO_BASE_2);
    }
  times_rows<T, D, STEP / 16, LANES>(y, v_tile + row * D, from.tile, STEP);
  const Visitor& v = visitors[turn.visitor];
  const int first = turn.first;
  if (v.level == SUMMARY || (v.diagonal && row + 15 > first)) {
MKA_UNROLL
    for (int l = 0; l < LANES; ++l)
MKA_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int lane = lane_of<LANES>(l);
        const int hidden = first_slot(v, keys, origins, row + lane / 4 + 8 * r) - first - c_column(lane, 0);
MKA_UNROLL
        for (int n = 0; n < STEP / 8; ++n)
MKA_UNROLL
          for (int e = 0; e < 2; ++e)
            if (8 * n + e < hidden) x[n][l][2 * r + e] = y[n][l][2 * r + e] = 0.f;
      }
  }
  add_times<T, D, STEP / 16, LANES>(s.grad_v, x, from.tile, STEP);
MKA_UNROLL
  for (int n = 0; n < STEP / 8; ++n)
MKA_UNROLL
    for (int l = 0; l < LANES; ++l) {
      const auto delta = load_vec<float, 2>(from.rows + STEP + 8 * n + c_column(lane_of<LANES>(l), 0));
MKA_UNROLL
      for (int e = 0; e < 4; ++e) y[n][l][e] = x[n][l][e] * (y[n][l][e] - delta.at[e % 2]);
    }
  add_times<T, D, STEP / 16, LANES>(s.grad_k, y, from.tile, 0);
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

template <typename T, int D, int LANES>
MKA_HD void end_keys(
    const KeyState<D, LANES>& s, const MkaBlockAttentionArgs& a, const Plan& p, const Item& item, const Keys& keys, int first) {
  const float scale = static_cast<float>(a.scale);
  const int64_t kept = keys.count - first;
  if (item.slot >= 0) {
    float* to = p.partials + (item.slot * 2 * a.size + first) * D;
    store_rows<D, LANES>(to, D, s.grad_k, scale, kept, 16);
    store_rows<D, LANES>(to + a.size * D, D, s.grad_v, 1.f, kept, 16);
    return;
  }
  const Grads<T> to = grads_of<T>(a, item.pair, keys);
  store_rows<D, LANES>(to.k + first * to.stride, to.stride, s.grad_k, scale, kept, to.rows - first);
  store_rows<D, LANES>(to.v + first * to.stride, to.stride, s.grad_v, 1.f, kept, to.rows - first);
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
