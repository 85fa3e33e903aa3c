// The arithmetic of block_attention's mma.sync forward on tiles in shared memory, the same on the host: queries and
// keys into their tiles, scores, masks, the softmax so far, outputs.
//
// A warp has 32 of a block's 128 packed query rows, as two operands of 16, so that what it reads of the keys serves
// twice; keys come 64 at a time. Scores are powers of two: log2 e times scale * q k + bias.
#pragma once

#include "mka/block_plan.cuh"
#include "mka/mma.cuh"

namespace mka {
namespace block {
namespace forward {

constexpr int KEY_ROWS = 64;
constexpr int WARP_ROWS = 32;
constexpr int LEVELS = 3;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
// A row's weights are relative to a maximum that is exceeded by at most this, in powers of two: the outputs are scaled
// anew only when it is. A row's own keys decide, so that no other row changes its bits.
constexpr float SLACK = 8.f;

// ---- what is copied ----

// A packed row of a query tile.
struct PackedRow {
  int64_t head, slot;
  bool inside;  // there is such a slot
  bool token;   // and it is no padding
};

MKA_HD PackedRow packed_row(const MkaBlockAttentionArgs& a, const QueryTile& at, int64_t tokens, int row) {
  const int bits = a.size == 64 ? 6 : 7, fan = static_cast<int>(a.heads) / static_cast<int>(a.groups);
  const int packed = static_cast<int>(at.first) + row, head = packed >> bits, slot = packed & ((1 << bits) - 1);
  const int64_t number = at.chunk * a.size + slot;
  return {at.group * fan + head, number, head < fan && number < a.slots, head < fan && slot < tokens};
}

// A thread's part of copying a query tile of [B, S, H, d]; padding becomes zeros.
template <typename T, int D>
MKA_HD void copy_queries(T* tile, const void* from, const int64_t (&strides)[3], const MkaBlockAttentionArgs& a,
                         const QueryTile& at, int64_t tokens, int thread, int threads) {
  constexpr int UNITS = D / 8;
  const int channel = thread % UNITS * 8;
  const T* base = static_cast<const T*>(from) + at.row * strides[0] + channel;
MKA_UNROLL_BY(2)
  for (int row = thread / UNITS; row < QUERY_ROWS; row += threads / UNITS) {
    const PackedRow r = packed_row(a, at, tokens, row);
    copy_unit(tile + swizzled<D>(row, channel), base + r.slot * strides[1] + r.head * strides[2], r.token);
  }
}

// A thread's part of the biases [3][128] of the rows, times log2 e.
MKA_HD void copy_bias(float* to, const MkaBlockAttentionArgs& a, const QueryTile& at, int64_t tokens, int thread, int threads) {
  for (int row = thread; row < QUERY_ROWS; row += threads) {
    const PackedRow r = packed_row(a, at, tokens, row);
    const int64_t from = at.row * a.bias_strides[0] + r.slot * a.bias_strides[1] + at.group * a.bias_strides[2];
    for (int level = 0; level < LEVELS; ++level)
      to[level * QUERY_ROWS + row] = a.bias && r.token ? a.bias[from + level] * LOG2E : 0.f;
  }
}

// A tile of keys as the loop over them needs it.
struct Found {
  const void* k;  // its first row
  const void* v;
  int64_t k_stride, v_stride;
  uint64_t seen;  // bit i: row i is a key; 0: nothing to do
  int level;
  int from;       // key i is seen by query slots from `from` + i on
};

template <typename T>
MKA_HD Found find(const MkaBlockAttentionArgs& a, const Plan& p, const QueryTile& at, const KeyList<KEY_ROWS>& list,
                  int64_t t) {
  const KeyTile tile = key_tile(a, p, list, t);
  Found f{nullptr,       nullptr,
          a.channels,    a.channels,
          0,             tile.level,
          tile.diagonal ? static_cast<int>(tile.chunk_row) : -KEY_ROWS};
  if (tile.count <= 0) return f;
  f.seen = ~uint64_t{0} >> (KEY_ROWS - tile.count);
  if (tile.source == PAGES) {
    const int64_t first = (list.pair * a.pages * a.size + tile.row) * a.channels;
    f.k = static_cast<const T*>(a.page_k) + first, f.v = static_cast<const T*>(a.page_v) + first;
    return f;
  }
  const auto point = [&](const void* base, const int64_t(&strides)[3]) {
    return static_cast<const T*>(base) + at.row * strides[0] + tile.row * strides[1] + at.group * strides[2];
  };
  if (tile.source == ROWS) {
    f.k = point(a.k, a.k_strides), f.v = point(a.v, a.v_strides);
    f.k_stride = a.k_strides[1], f.v_stride = a.v_strides[1];
    return f;
  }
  f.k = point(a.summary_k, a.summary_k_strides), f.v = point(a.summary_v, a.summary_v_strides);
  f.k_stride = a.summary_k_strides[1], f.v_stride = a.summary_v_strides[1];
  const int32_t* begins = p.begin + at.row * a.chunks + tile.number;
  const int count = static_cast<int>(tile.count), wanted = static_cast<int>(list.origin);
  uint64_t mine = 0;
MKA_UNROLL_BY(8)
  for (int i = 0; i < KEY_ROWS; ++i) mine |= static_cast<uint64_t>((i < count ? begins[i] : -1) == wanted) << i;
  f.seen = mine;
  return f;
}

// A thread's part of copying 64 keys or values; what is not seen becomes zeros.
template <typename T, int D, int THREADS>
MKA_HD void copy_keys(T* tile, const void* from, int64_t stride, uint64_t seen, int thread) {
  constexpr int UNITS = D / 8;
  thread = opaque(thread);
  const int first = thread / UNITS;
  const uint32_t low = static_cast<uint32_t>(seen >> first), high = static_cast<uint32_t>(seen >> 32 >> first);
  copy_rows_where<T, D>(
      tile, static_cast<const T*>(from), stride, KEY_ROWS,
      [=](int row) { return (row - first < 32 ? low : high) & 1u << (row - first) % 32; }, thread, THREADS);
}

// The first tile from `t` on with anything to do.
MKA_HD int next_tile(const Found* found, int t, int count) {
  while (t < count && !found[t].seen) ++t;
  return t;
}

// ---- a warp ----

// Scores, then weights, of a warp's rows and a tile's keys: of operand u keys [8 j, 8 j + 8).
template <int LANES>
using Scores = float[2][KEY_ROWS / 8][LANES][4];

template <int D, int LANES>
struct State {
  float o[2][D / 8][LANES][4];  // unnormalised outputs
  float m[2][2][LANES];         // what a row's weights are relative to
  float l[2][2][LANES];         // this lane's part of the sum of weights
};

template <int D, int LANES>
MKA_HD void clear(State<D, LANES>& state) {
MKA_UNROLL
  for (int u = 0; u < 2; ++u)
MKA_UNROLL
    for (int l = 0; l < LANES; ++l) {
MKA_UNROLL
      for (int h = 0; h < 2; ++h) state.m[u][h][l] = -INFINITY, state.l[u][h][l] = 0.f;
MKA_UNROLL
      for (int j = 0; j < D / 8; ++j)
MKA_UNROLL
        for (int e = 0; e < 4; ++e) state.o[u][j][l][e] = 0.f;
    }
}

// The products of the warp's queries, rows `first` to `first` + 32 of their tile, and the keys.
template <typename T, int D, int LANES>
MKA_HD void multiply(Scores<LANES>& s, const T* q, const T* k, int first) {
  q += opaque(first * D);
MKA_UNROLL
  for (int u = 0; u < 2; ++u)
MKA_UNROLL
    for (int j = 0; j < KEY_ROWS / 8; ++j)
MKA_UNROLL
      for (int l = 0; l < LANES; ++l)
MKA_UNROLL
        for (int e = 0; e < 4; ++e) s[u][j][l][e] = 0.f;
MKA_UNROLL
  for (int channel = 0; channel < D; channel += 16) {
    uint32_t a[2][LANES][4];
    load_a<T, D, LANES>(a[0], q, 0, channel);
    load_a<T, D, LANES>(a[1], q, 16, channel);
MKA_UNROLL
    for (int j = 0; j < KEY_ROWS / 8; j += 2) {
      uint32_t b[2][LANES][2];
      load_b<T, D, LANES>(b, k, 8 * j, channel);
MKA_UNROLL
      for (int u = 0; u < 2; ++u) {
        mma<T, LANES>(s[u][j], a[u], b[0]);
        mma<T, LANES>(s[u][j + 1], a[u], b[1]);
      }
    }
  }
}

// -inf where a query does not see a key. `slot`: of the warp's first row in its chunk.
template <int LANES>
MKA_HD void hide(Scores<LANES>& s, uint64_t seen, int from, int slot) {
MKA_UNROLL
  for (int l = 0; l < LANES; ++l) {
    const int lane = lane_of<LANES>(l);
    const uint64_t mine = seen >> c_column(lane, 0);
MKA_UNROLL
    for (int u = 0; u < 2; ++u)
MKA_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int last = slot + 16 * u + c_row(lane, e) - from - c_column(lane, 0);
MKA_UNROLL
        for (int j = 0; j < KEY_ROWS / 8; ++j)
          if (!(mine >> (8 * j + (e & 1)) & 1) || 8 * j + (e & 1) > last) s[u][j][l][e] = -INFINITY;
      }
  }
}

template <int LANES>
MKA_HD bool any(const bool (&x)[LANES]) {
#ifdef __CUDA_ARCH__
  return __any_sync(0xffffffffu, x[0]);
#else
  bool found = false;
  for (int l = 0; l < LANES; ++l) found = found || x[l];
  return found;
#endif
}

// Takes a tile's scores and values in. `bias`: of the tile's level, of the warp's rows; `scale`: times log2 e, positive.
template <typename T, int D, int LANES>
MKA_HD void accumulate(State<D, LANES>& state, Scores<LANES>& s, const T* v, const float* bias, float scale) {
  float base[2][2][LANES], shrink[2][2][LANES];
  bool grows[LANES];
MKA_UNROLL
  for (int l = 0; l < LANES; ++l) grows[l] = false;
MKA_UNROLL
  for (int u = 0; u < 2; ++u)
MKA_UNROLL
    for (int h = 0; h < 2; ++h) {
      float most[LANES];
MKA_UNROLL
      for (int l = 0; l < LANES; ++l) {
        most[l] = fmaxf(s[u][0][l][2 * h], s[u][0][l][2 * h + 1]);
MKA_UNROLL
        for (int j = 1; j < KEY_ROWS / 8; ++j) most[l] = fmaxf(most[l], fmaxf(s[u][j][l][2 * h], s[u][j][l][2 * h + 1]));
      }
      row_max<LANES>(most);
MKA_UNROLL
      for (int l = 0; l < LANES; ++l) {
        const float add = bias[16 * u + 8 * h + lane_of<LANES>(l) / 4];
        const float highest = fmaf(most[l], scale, add), before = state.m[u][h][l];
        const bool grow = highest > before + SLACK;
        const float m = grow ? highest : before;
        shrink[u][h][l] = grow ? exp2_of(before - m) : 1.f;
        base[u][h][l] = add - (m == -INFINITY ? 0.f : m);
        grows[l] = grows[l] || grow;
        state.m[u][h][l] = m;
      }
    }
  if (any<LANES>(grows)) {
MKA_UNROLL
    for (int u = 0; u < 2; ++u)
MKA_UNROLL
      for (int l = 0; l < LANES; ++l) {
MKA_UNROLL
        for (int h = 0; h < 2; ++h) state.l[u][h][l] *= shrink[u][h][l];
MKA_UNROLL
        for (int j = 0; j < D / 8; ++j)
MKA_UNROLL
          for (int e = 0; e < 4; ++e) state.o[u][j][l][e] *= shrink[u][e / 2][l];
      }
  }
MKA_UNROLL
  for (int j = 0; j < KEY_ROWS / 8; j += 2) {
    uint32_t a[2][LANES][4];
MKA_UNROLL
    for (int u = 0; u < 2; ++u) {
MKA_UNROLL
      for (int l = 0; l < LANES; ++l)
MKA_UNROLL
        for (int e = 0; e < 8; ++e) {
          float& x = s[u][j + e / 4][l][e % 4];
          x = exp2_of(fmaf(x, scale, base[u][e % 4 / 2][l]));
          state.l[u][e % 4 / 2][l] += x;
        }
      as_a<T, LANES>(a[u], s[u][j], s[u][j + 1]);
    }
MKA_UNROLL
    for (int channel = 0; channel < D; channel += 16) {
      uint32_t b[2][LANES][2];
      load_b_trans<T, D, LANES>(b, v, 8 * j, channel);
MKA_UNROLL
      for (int u = 0; u < 2; ++u) {
        mma<T, LANES>(state.o[u][channel / 8], a[u], b[0]);
        mma<T, LANES>(state.o[u][channel / 8 + 1], a[u], b[1]);
      }
    }
  }
}

MKA_HD void sync_warp() {
#ifdef __CUDA_ARCH__
  __syncwarp();
#endif
}

// Writes the outputs of the warp's rows, through their place in the query tile, and their logsumexp.
template <typename T, int D, int LANES>
MKA_HD void keep(State<D, LANES>& state, T* tile, const MkaBlockAttentionArgs& a, const QueryTile& at, int64_t tokens,
                 int first) {
MKA_UNROLL
  for (int u = 0; u < 2; ++u)
MKA_UNROLL
    for (int h = 0; h < 2; ++h) {
      row_sum<LANES>(state.l[u][h]);
MKA_UNROLL
      for (int l = 0; l < LANES; ++l) {
        const int lane = lane_of<LANES>(l), row = first + 16 * u + 8 * h + lane / 4;
        const PackedRow r = packed_row(a, at, tokens, row);
        const float sum = state.l[u][h][l];
        // a sum that is no number is passed on
        const bool nothing = sum == 0.f || !r.token;
        if (lane % 4 == 0 && r.inside)
          a.lse[(at.row * a.heads + r.head) * a.slots + r.slot] =
              nothing ? INFINITY : (state.m[u][h][l] + log2f(sum)) * LN2;
        const float scale = 1.f / sum;
MKA_UNROLL
        for (int j = 0; j < D / 8; ++j) {
          const float x = state.o[u][j][l][2 * h] * scale, y = state.o[u][j][l][2 * h + 1] * scale;
          const uint32_t word = nothing ? 0 : pack<T>(x, y);
          memcpy(static_cast<void*>(tile + swizzled<D>(row, 8 * j + c_column(lane, 0))), &word, 4);
        }
      }
    }
  sync_warp();
  T* out = static_cast<T*>(a.out) + at.row * a.slots * a.heads * D;
MKA_UNROLL
  for (int l = 0; l < LANES; ++l)
MKA_UNROLL_BY(2)
    for (int x = 0; x < WARP_ROWS * D / 8; x += 32) {
      const int i = x + lane_of<LANES>(l);
      const int row = first + i / (D / 8), channel = i % (D / 8) * 8;
      const PackedRow r = packed_row(a, at, tokens, row);
      if (r.inside) store_vec(out + (r.slot * a.heads + r.head) * D + channel, load_vec<T, 8>(tile + swizzled<D>(row, channel)));
    }
}

}  // namespace forward
}  // namespace block
}  // namespace mka
