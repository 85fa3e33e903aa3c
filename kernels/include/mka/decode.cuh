// The decode's plan and arithmetic, the same on the host: which split and warp attends which keys, what lies in which
// register of which lane, and how the parts of the softmax are merged.
#pragma once

#include <math.h>

#include "mka/mma.cuh"

namespace mka {
namespace decode {

constexpr int WARPS = 4;       // of a block of the attention
constexpr int TILE = 16;       // keys that a warp attends at a time
constexpr int ROWS = 16;       // most query heads of a KV head
constexpr int BATCH = 128;     // tiles that a block resolves at a time, one per thread
constexpr int MAX_SPLITS = 128;
constexpr float LOG2E = 1.4426950408889634f;

// ---- which keys ----

// A sequence's tiles: those of the window's chunks in order, then of the summaries, then of the recalled chunks.
struct Plan {
  int64_t first;      // chunk that the window begins with
  int64_t near;       // chunks of the window
  int64_t summaries;  // chunks before it; 0 without L2
  int64_t per_chunk;  // tiles of a chunk
  int64_t tiles;
};

MKA_HD Plan plan(int64_t own, int64_t window, int64_t size, bool summarised, int64_t recalled) {
  Plan p{0, 0, 0, ceil_div(size, TILE), 0};
  if (own < 0) return p;
  p.first = max64(0, own - window + 1);
  p.near = own - p.first + 1;
  p.summaries = summarised ? p.first : 0;
  p.tiles = (p.near + recalled) * p.per_chunk + ceil_div(p.summaries, TILE);
  return p;
}

struct Tile {
  int64_t level;  // 0 window, 1 summaries, 2 recalled
  int64_t chunk;  // level 0: its number; level 1: the first summary; level 2: its rank among the recalled
  int64_t begin;  // slot of the chunk; 0 for summaries
};

MKA_HD Tile tile(const Plan& p, int64_t t) {
  const int64_t window = p.near * p.per_chunk, summaries = ceil_div(p.summaries, TILE);
  if (t < window) return {0, p.first + t / p.per_chunk, t % p.per_chunk * TILE};
  t -= window;
  if (t < summaries) return {1, t * TILE, 0};
  t -= summaries;
  return {2, t / p.per_chunk, t % p.per_chunk * TILE};
}

// Split s of a sequence and KV head has the tiles [split_begin(s), split_begin(s + 1)); its warp t % WARPS has tile
// split_begin(s) + t.
MKA_HD int64_t split_begin(int64_t tiles, int64_t splits, int64_t s) { return tiles * s / splits; }

// Two blocks on every processor where that leaves each warp a tile.
MKA_HD int64_t choose_splits(int64_t pairs, int64_t tiles, int64_t processors) {
  const int64_t room = max64(1, 2 * processors / pairs);
  return max64(1, min64(min64(room, MAX_SPLITS), ceil_div(tiles, WARPS)));
}

// The first `tokens` - begin of a tile's keys.
MKA_HD uint32_t head_mask(int64_t tokens, int64_t begin) {
  const int64_t count = min64(TILE, max64(0, tokens - begin));
  return (1u << count) - 1u;
}

// A tile's place in memory.
struct Found {
  int64_t offset;  // of its first row, in elements
  float bias;      // times log2 e
  uint32_t seen;   // bit i: key i is attended
  int64_t level;
};

template <typename Args>
MKA_HD Found find(const Args& a, const Plan& p, int64_t b, int64_t g, int64_t t) {
  const Tile at = tile(p, t);
  const int64_t pair = b * a.groups + g;
  Found f{0, 0.f, 0u, at.level};
  if (a.bias) f.bias = a.bias[(b * a.bias_groups + (a.bias_groups > 1 ? g : 0)) * 3 + at.level] * LOG2E;
  if (f.bias == -INFINITY) return f;
  const int32_t* lengths = a.lengths + b * a.chunks;
  if (at.level == 1) {
    f.offset = (pair * a.chunks + at.chunk) * a.channels;
    for (int64_t i = 0; i < min64(TILE, p.summaries - at.chunk); ++i)
      f.seen |= static_cast<uint32_t>(lengths[at.chunk + i] > 0) << i;
    return f;
  }
  const int64_t chunk = at.level == 0 ? at.chunk : a.recalled[pair * a.recalled_chunks + at.chunk];
  if (chunk < 0 || chunk >= a.chunks) return f;
  const int64_t page = a.table[pair * a.chunks + chunk];
  if (page < 0) return f;
  f.offset = (page * a.size + at.begin) * a.channels;
  f.seen = head_mask(min64(lengths[chunk], a.size), at.begin);
  return f;
}

// ---- what lies where: m16n8k16 with channels and keys permuted so that every lane reads 16 contiguous bytes ----

MKA_HD int k_row(int lane, int half) { return 8 * half + lane / 4; }
MKA_HD int k_channel(int lane, int block) { return 32 * block + 8 * (lane % 4); }
MKA_HD int v_row(int lane, int r) { return 2 * (lane % 4) + (r & 1) + 8 * (r >> 1); }
MKA_HD int v_channel(int lane, int set) { return 64 * set + 8 * (lane / 4); }
MKA_HD int c_key(int lane, int half, int c) { return 8 * half + 2 * (lane % 4) + (c & 1); }
MKA_HD int c_channel(int lane, int set, int i, int c) { return 64 * set + 8 * (2 * (lane % 4) + (c & 1)) + i; }

struct alignas(16) Words {
  uint32_t at[4];
};

// Element i (0 to 7) of two rows, as one word with the first row's below.
MKA_HD uint32_t join(const Words& low, const Words& high, int i) {
  const uint32_t a = low.at[i / 2], b = high.at[i / 2];
#ifdef __CUDA_ARCH__
  return __byte_perm(a, b, i % 2 ? 0x7632 : 0x5410);
#else
  return i % 2 ? (a >> 16) | (b & 0xffff0000u) : (a & 0xffffu) | (b << 16);
#endif
}

// The weight of something with maximum m, in powers of two, beside one with M >= m.
MKA_HD float weight(float m, float M) { return m == -INFINITY ? 0.f : exp2f(m - M); }

// A warp's registers: LANES is 1 on the GPU, where each lane has its own, and 32 on the host, which stands for all.
template <int D, int LANES>
struct State {
  float o[D / 64][8][LANES][4];  // unnormalised outputs
  float m[2][LANES];             // largest score of rows lane / 4 and lane / 4 + 8, times log2 e
  float l[2][LANES];             // this lane's part of the sum of weights
};

template <int D, int LANES>
MKA_HD void clear(State<D, LANES>& state) {
MKA_UNROLL
  for (int l = 0; l < LANES; ++l) {
MKA_UNROLL
    for (int r = 0; r < 2; ++r) state.m[r][l] = -INFINITY, state.l[r][l] = 0.f;
MKA_UNROLL
    for (int u = 0; u < D / 64; ++u)
MKA_UNROLL
      for (int i = 0; i < 8; ++i)
MKA_UNROLL
        for (int c = 0; c < 4; ++c) state.o[u][i][l][c] = 0.f;
  }
}

template <typename T>
MKA_HD Words read(const T* from, bool wanted) {
  Words words{{0u, 0u, 0u, 0u}};
  if (wanted) words = *reinterpret_cast<const Words*>(from);
  return words;
}

constexpr int Q_PAD = 32;  // elements behind a query, so that rows lie in different banks

// Sixteen keys and values; those that are not seen are not read. q: [ROWS][D + Q_PAD], zeros in rows without a head;
// k, v: [TILE][D]; at least one key is seen and the bias is finite.
template <typename T, int D, int LANES>
MKA_HD void attend_tile(State<D, LANES>& state, const T* q, const T* k, const T* v, uint32_t seen, float scale,
                        float bias) {
  constexpr bool ahead = D <= 128;  // where registers allow, values are asked for before the scores are computed
  Words keys[2][D / 32][LANES], values[4][ahead ? D / 64 : 1][LANES];
MKA_UNROLL
  for (int half = 0; half < 2; ++half)
MKA_UNROLL
    for (int j = 0; j < D / 32; ++j)
MKA_UNROLL
      for (int l = 0; l < LANES; ++l) {
        const int lane = lane_of<LANES>(l), row = k_row(lane, half);
        keys[half][j][l] = read(k + row * D + k_channel(lane, j), seen >> row & 1);
      }
  if constexpr (ahead) {
MKA_UNROLL
    for (int r = 0; r < 4; ++r)
MKA_UNROLL
      for (int u = 0; u < D / 64; ++u)
MKA_UNROLL
        for (int l = 0; l < LANES; ++l) {
          const int lane = lane_of<LANES>(l), row = v_row(lane, r);
          values[r][u][l] = read(v + row * D + v_channel(lane, u), seen >> row & 1);
        }
  }

  float s[2][LANES][4];
MKA_UNROLL
  for (int l = 0; l < LANES; ++l)
MKA_UNROLL
    for (int c = 0; c < 4; ++c) s[0][l][c] = s[1][l][c] = 0.f;
MKA_UNROLL
  for (int j = 0; j < D / 32; ++j)
MKA_UNROLL
    for (int step = 0; step < 2; ++step) {
      uint32_t a[LANES][4], b[LANES][2];
MKA_UNROLL
      for (int l = 0; l < LANES; ++l) {
        const int lane = lane_of<LANES>(l);
        const T* from = q + (lane / 4) * (D + Q_PAD) + k_channel(lane, j);
        const Words low = read(from, true), high = read(from + 8 * (D + Q_PAD), true);
        a[l][0] = low.at[2 * step], a[l][1] = high.at[2 * step];
        a[l][2] = low.at[2 * step + 1], a[l][3] = high.at[2 * step + 1];
      }
MKA_UNROLL
      for (int half = 0; half < 2; ++half) {
MKA_UNROLL
        for (int l = 0; l < LANES; ++l) {
          b[l][0] = keys[half][j][l].at[2 * step];
          b[l][1] = keys[half][j][l].at[2 * step + 1];
        }
        mma<T, LANES>(s[half], a, b);
      }
    }

  uint32_t p[LANES][4];
MKA_UNROLL
  for (int r = 0; r < 2; ++r) {
    float most[LANES];
MKA_UNROLL
    for (int l = 0; l < LANES; ++l) {
      const int lane = lane_of<LANES>(l);
      most[l] = -INFINITY;
MKA_UNROLL
      for (int half = 0; half < 2; ++half)
MKA_UNROLL
        for (int c = 2 * r; c < 2 * r + 2; ++c) {
          float& x = s[half][l][c];
          x = seen >> c_key(lane, half, c) & 1 ? x * scale + bias : -INFINITY;
          most[l] = fmaxf(most[l], x);
        }
    }
    row_max<LANES>(most);
MKA_UNROLL
    for (int l = 0; l < LANES; ++l) {
      const float m = fmaxf(state.m[r][l], most[l]), shrink = weight(state.m[r][l], m);
      float sum = 0.f;
MKA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float x = weight(s[half][l][2 * r], m), y = weight(s[half][l][2 * r + 1], m);
        sum += x + y;
        p[l][2 * half + r] = pack<T>(x, y);
      }
      state.m[r][l] = m;
      state.l[r][l] = state.l[r][l] * shrink + sum;
MKA_UNROLL
      for (int u = 0; u < D / 64; ++u)
MKA_UNROLL
        for (int i = 0; i < 8; ++i) {
          state.o[u][i][l][2 * r] *= shrink;
          state.o[u][i][l][2 * r + 1] *= shrink;
        }
    }
  }

MKA_UNROLL
  for (int u = 0; u < D / 64; ++u) {
    const int at = ahead ? u : 0;
    if constexpr (!ahead) {
MKA_UNROLL
      for (int r = 0; r < 4; ++r)
MKA_UNROLL
        for (int l = 0; l < LANES; ++l) {
          const int lane = lane_of<LANES>(l), row = v_row(lane, r);
          values[r][0][l] = read(v + row * D + v_channel(lane, u), seen >> row & 1);
        }
    }
MKA_UNROLL
    for (int i = 0; i < 8; ++i) {
      uint32_t b[LANES][2];
MKA_UNROLL
      for (int l = 0; l < LANES; ++l) {
        b[l][0] = join(values[0][at][l], values[1][at][l], i);
        b[l][1] = join(values[2][at][l], values[3][at][l], i);
      }
      mma<T, LANES>(state.o[u][i], p, b);
    }
  }
}

// A warp's outputs to o [rows][D], its maxima and sums to ml [rows][2].
template <int D, int LANES>
MKA_HD void keep(State<D, LANES>& state, int rows, float* o, float* ml) {
MKA_UNROLL
  for (int r = 0; r < 2; ++r) row_sum<LANES>(state.l[r]);
MKA_UNROLL
  for (int l = 0; l < LANES; ++l) {
    const int lane = lane_of<LANES>(l);
MKA_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = lane / 4 + 8 * r;
      if (row >= rows) continue;
      if (lane % 4 == 0) ml[2 * row] = state.m[r][l], ml[2 * row + 1] = state.l[r][l];
MKA_UNROLL
      for (int u = 0; u < D / 64; ++u)
MKA_UNROLL
        for (int i = 0; i < 8; ++i)
MKA_UNROLL
          for (int c = 2 * r; c < 2 * r + 2; ++c) o[row * D + c_channel(lane, u, i, c)] = state.o[u][i][l][c];
    }
  }
}

// The weights of `count` parts of a row, in place of their maxima (ml: [count], `stride` apart, a maximum and a sum
// each): the parts' common maximum and the sum of all weights.
struct Merged {
  float m, l;
};
MKA_HD Merged merge_weights(float* ml, int64_t stride, int64_t count) {
  Merged all{-INFINITY, 0.f};
  for (int64_t i = 0; i < count; ++i) all.m = fmaxf(all.m, ml[i * stride]);
  for (int64_t i = 0; i < count; ++i) {
    const float w = weight(ml[i * stride], all.m);
    ml[i * stride] = w;
    all.l += w * ml[i * stride + 1];
  }
  return all;
}

// The weighted sum of the parts' outputs, in their order; parts of weight 0 were perhaps never written.
MKA_HD float merge(const float* weights, int64_t weight_stride, const float* outs, int64_t stride, int64_t count) {
  float sum = 0.f;
  for (int64_t i = 0; i < count; ++i) {
    const float w = weights[i * weight_stride];
    if (w != 0.f) sum += w * outs[i * stride];
  }
  return sum;
}

}  // namespace decode
}  // namespace mka
