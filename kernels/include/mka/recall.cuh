// Recall, thread by thread: what each kernel of csrc/recall.cu does between two barriers, as functions of a thread's
// number. The kernels run them on the GPU, and the tests run the same functions for every thread on the CPU.
//
// Sums are of integers (multiples of 2^-16), so their order does not matter. Means are summed in fp32, halves onto
// halves, as the reference does. Shapes: B batch, S slots at hand, C chunk size, n chunks at hand, N chunks of the
// row, H query heads, G KV heads, d channels, W words of a code, T tables, R recalled chunks, Q queries that select.
#pragma once

#include <math.h>

#include "mka/common.cuh"

namespace mka {
namespace recall {

constexpr int THREADS = 256;
constexpr int VECTOR = 8;  // channels of a thread
constexpr int QUERIES = 16;
constexpr int WARP = 32;
constexpr int SELECT_WARPS = 8;
constexpr int64_t NOWHERE = INT64_MIN;

// round(x * 2^16), halves to even; beyond +-2^15 that, NaN 0. The product by a power of two is exact.
MKA_HD int64_t fixed_point(float x) {
  if (!(x == x)) return 0;
  x = fminf(fmaxf(x, -32768.0f), 32768.0f) * 65536.0f;
#ifdef __CUDA_ARCH__
  return __float2ll_rn(x);
#else
  return llrintf(x);
#endif
}

template <typename T>
MKA_HD void load_channels(const T* from, float (&to)[VECTOR]) {
  constexpr int PER = 16 / sizeof(T) < VECTOR ? 16 / sizeof(T) : VECTOR;
#pragma unroll
  for (int begin = 0; begin < VECTOR; begin += PER) {
    const Vec<T, PER> some = load_vec<T, PER>(from + begin);
#pragma unroll
    for (int i = 0; i < PER; ++i) to[begin + i] = to_float(some.at[i]);
  }
}

// The block's threads: LANES side by side read a token's channels, ROWS of them read tokens.
template <int D>
struct Layout {
  static constexpr int LANES = D / VECTOR;
  static constexpr int ROWS = THREADS / LANES;
};

// Which plane side a block's total lies on: bit `plane` of its code. Planes are [64 W, D] of +-1.
template <int D>
MKA_HD bool plane_side(const int64_t* total, const int8_t* planes, int64_t plane) {
  const int8_t* signs = planes + plane * D;
  int64_t sum = 0;
#pragma unroll 1
  for (int begin = 0; begin < D; begin += 16) {
    const Vec<int8_t, 16> some = load_vec<int8_t, 16>(signs + begin);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int64_t flip = some.at[i] < 0 ? -1 : 0;
      sum += (total[begin + i] ^ flip) - flip;
    }
  }
  return sum >= 0;
}

// ---------------------------------------------------------------------------------------------------------------
// Pooling: one block per (row, chunk, KV head).

struct Place {
  int64_t row, chunk, group;
};

// Heads of a chunk lie side by side in memory, so they are neighbours in the grid.
MKA_HD Place place_of(int64_t block, int64_t chunks, int64_t groups) {
  return {block / groups / chunks, block / groups % chunks, block % groups};
}

// Tokens of a chunk that may be read, whatever its length says.
MKA_HD int64_t readable(int64_t length, int64_t chunk, int64_t size, int64_t slots) {
  return max64(0, min64(min64(length, size), slots - chunk * size));
}

// Where a block's head of its chunk's first slot begins; strides are those of rows, slots and heads.
MKA_HD int64_t head_offset(const Place& at, int64_t size, const int64_t (&strides)[3]) {
  return at.row * strides[0] + at.chunk * size * strides[1] + at.group * strides[2];
}

template <int D>
struct PoolShared {
  int64_t sums[Layout<D>::ROWS][D];
  float k[Layout<D>::ROWS][D];
  float v[Layout<D>::ROWS][D];
  int64_t total[D];
};

// The sum of tokens first + step * {j, j + n, j + 2n, ...} of COUNT when n are left: halves onto halves.
template <typename T, int COUNT, int N, bool FIXED>
MKA_HD void tree(
    const T* tokens, int stride, int first, int step, int length, int j, float (&out)[VECTOR], int64_t (&sums)[VECTOR]) {
  if constexpr (N == COUNT) {
    const int token = first + j * step;
    if (token < length) {
      load_channels(tokens + static_cast<int64_t>(token) * stride, out);
    } else {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) out[i] = 0.0f;
    }
    if constexpr (FIXED) {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) sums[i] += fixed_point(out[i]);
    }
  } else {
    float other[VECTOR];
    tree<T, COUNT, 2 * N, FIXED>(tokens, stride, first, step, length, j, out, sums);
    tree<T, COUNT, 2 * N, FIXED>(tokens, stride, first, step, length, j + N, other, sums);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) out[i] += other[i];
  }
}

// The same over the rows' parts of one channel, D apart.
template <int COUNT, int N>
MKA_HD float column_tree(const float* parts, int stride, int j) {
  if constexpr (N == COUNT) {
    return parts[j * stride];
  } else {
    return column_tree<COUNT, 2 * N>(parts, stride, j) + column_tree<COUNT, 2 * N>(parts, stride, j + N);
  }
}

// Phase 1: each row's part of the chunk's tokens, C / ROWS of them.
template <typename T, int D, int C>
MKA_HD void pool_rows(const MkaRecallPoolArgs& a, const Place& at, int thread, PoolShared<D>& s) {
  constexpr int ROWS = Layout<D>::ROWS, COUNT = C / ROWS;
  const int row = thread / Layout<D>::LANES, channel = thread % Layout<D>::LANES * VECTOR;
  const int length = static_cast<int>(readable(a.lengths[at.row * a.chunks + at.chunk], at.chunk, C, a.slots));
  int64_t sums[VECTOR] = {0, 0, 0, 0, 0, 0, 0, 0};
  float part[VECTOR];
  const T* k = static_cast<const T*>(a.k) + head_offset(at, C, a.k_strides) + channel;
  tree<T, COUNT, 1, true>(k, static_cast<int>(a.k_strides[1]), row, ROWS, length, 0, part, sums);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    s.k[row][channel + i] = part[i];
    s.sums[row][channel + i] = sums[i];
  }
  if (a.v == nullptr) return;
  const T* v = static_cast<const T*>(a.v) + head_offset(at, C, a.v_strides) + channel;
  tree<T, COUNT, 1, false>(v, static_cast<int>(a.v_strides[1]), row, ROWS, length, 0, part, sums);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) s.v[row][channel + i] = part[i];
}

// Phase 2: a channel's sum over the rows, less what all keys share, and its means.
template <typename T, int D>
MKA_HD void pool_columns(const MkaRecallPoolArgs& a, const Place& at, int thread, PoolShared<D>& s) {
  constexpr int ROWS = Layout<D>::ROWS;
  const int64_t length = a.lengths[at.row * a.chunks + at.chunk];
  const float count = static_cast<float>(max64(length, 1));
  const int64_t out = ((at.row * a.chunks + at.chunk) * a.groups + at.group) * D;
  for (int channel = thread; channel < D; channel += THREADS) {
    int64_t sum = 0;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) sum += s.sums[row][channel];
    if (a.centre != nullptr) {
      const int64_t i = at.group * D + channel;
      const float shared = a.centre_dtype == MKA_FP32   ? static_cast<const float*>(a.centre)[i]
                           : a.centre_dtype == MKA_BF16 ? to_float(static_cast<const __nv_bfloat16*>(a.centre)[i])
                                                        : to_float(static_cast<const __half*>(a.centre)[i]);
      sum -= length * fixed_point(shared);
    }
    s.total[channel] = sum;
    if (a.k_mean != nullptr) {
      const float mean = column_tree<ROWS, 1>(&s.k[0][channel], D, 0) / count;
      static_cast<T*>(a.k_mean)[out + channel] = from_float<T>(mean);
    }
  }
  if (a.v == nullptr) return;
  // the upper threads where there are enough of them
  for (int channel = (thread + THREADS / 2) % THREADS; channel < D; channel += THREADS) {
    const float mean = column_tree<ROWS, 1>(&s.v[0][channel], D, 0) / count;
    static_cast<T*>(a.v_mean)[out + channel] = from_float<T>(mean);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Sums of the last queries before a chunk: one block per (row, chunk, KV head).

template <int D>
struct QueriesShared {
  int64_t slots[QUERIES];
  int64_t sums[Layout<D>::ROWS][D];
  int64_t total[D];
};

// Where the `back`-th last token of a chunk's document before the chunk lies (back >= 1): a slot at hand, -k for the
// k-th last of the tokens before slot 0, or NOWHERE. `chunk`'s lengths are those of its row's chunks at hand.
MKA_HD int64_t recent_slot(
    const int64_t* lengths, int64_t chunk, int64_t tokens_before, int64_t size, int64_t slots, int64_t back) {
  if (back > tokens_before) return NOWHERE;
  for (int64_t at = chunk - 1; at >= 0; --at) {
    if (back <= lengths[at]) return min64(at * size + lengths[at] - back, slots - 1);
    back -= lengths[at];
  }
  return -back;
}

// Phase 1: the first threads find the queries.
template <int D>
MKA_HD void queries_find(const MkaRecallQueriesArgs& a, const Place& at, int thread, QueriesShared<D>& s) {
  if (thread >= QUERIES) return;
  const int64_t first = at.row * a.chunks;
  s.slots[thread] =
      recent_slot(a.lengths + first, at.chunk, a.counts[first + at.chunk], a.size, a.slots, QUERIES - thread);
}

// Phase 2: each row's part of the queries' heads; those before slot 0 are summed over heads already.
template <typename T, int D>
MKA_HD void queries_rows(const MkaRecallQueriesArgs& a, const Place& at, int thread, QueriesShared<D>& s) {
  constexpr int ROWS = Layout<D>::ROWS;
  const int row = thread / Layout<D>::LANES, channel = thread % Layout<D>::LANES * VECTOR;
  const int64_t heads = a.heads / a.groups;
  int64_t sums[VECTOR] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int64_t item = row; item < QUERIES * heads; item += ROWS) {
    const int64_t slot = s.slots[item / heads], head = item % heads;
    if (slot >= 0) {
      float some[VECTOR];
      const int64_t from =
          at.row * a.q_strides[0] + slot * a.q_strides[1] + (at.group * heads + head) * a.q_strides[2] + channel;
      load_channels(static_cast<const T*>(a.q) + from, some);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) sums[i] += fixed_point(some[i]);
    } else if (slot != NOWHERE && head == 0 && a.before != nullptr) {
      const double* from = a.before + ((at.row * QUERIES + QUERIES + slot) * a.groups + at.group) * D + channel;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) sums[i] += static_cast<int64_t>(from[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) s.sums[row][channel + i] = sums[i];
}

// Phase 3: a channel's sum over the rows.
template <int D>
MKA_HD void queries_columns(const MkaRecallQueriesArgs& a, const Place& at, int thread, QueriesShared<D>& s) {
  for (int channel = thread; channel < D; channel += THREADS) {
    int64_t sum = 0;
#pragma unroll
    for (int row = 0; row < Layout<D>::ROWS; ++row) sum += s.sums[row][channel];
    s.total[channel] = sum;
    const int64_t out = ((at.row * a.chunks + at.chunk) * a.groups + at.group) * D;
    a.sums[out + channel] = static_cast<double>(sum);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Selection: one warp per (row, query chunk, KV head), two passes over its candidates. The first counts how many lie
// at each distance, which gives the distance up to which R are taken; the second takes them in order of number.

struct Task {
  int64_t row, group, item;  // item: the query chunk at hand; -1: none
};

MKA_HD int64_t select_blocks(int64_t batch, int64_t groups, int64_t count) {
  return batch * groups * ceil_div(count, SELECT_WARPS);
}

// A block's warps have neighbouring chunks of one head, which read the same codes; the blocks with the most
// candidates come first.
MKA_HD Task select_task(int64_t block, int warp, int64_t batch, int64_t groups, int64_t count) {
  const int64_t tiles = ceil_div(count, SELECT_WARPS), heads = batch * groups;
  const int64_t item = (tiles - 1 - block / heads) * SELECT_WARPS + warp;
  return {block % heads / groups, block % heads % groups, item < count ? item : -1};
}

// Candidates of query chunk `item` are among the row's chunks [0, this).
MKA_HD int64_t candidate_end(int64_t first, int64_t item, int64_t window, int64_t stored, int64_t total) {
  return max64(0, min64(first + item - window + 1, min64(stored, total)));
}

MKA_HD int bits_of(int64_t x) {
#ifdef __CUDA_ARCH__
  return __popcll(static_cast<unsigned long long>(x));
#else
  return __builtin_popcountll(static_cast<unsigned long long>(x));
#endif
}
MKA_HD int bits_of(uint32_t x) {
#ifdef __CUDA_ARCH__
  return __popc(x);
#else
  return __builtin_popcount(x);
#endif
}

// The smallest Hamming distance over the tables, each of `per` words.
MKA_HD int distance(const int64_t* one, const int64_t* other, int64_t tables, int64_t per) {
  int best = 64 * static_cast<int>(per);
  for (int64_t table = 0; table < tables; ++table) {
    int bits = 0;
    for (int64_t word = 0; word < per; ++word) bits += bits_of(one[table * per + word] ^ other[table * per + word]);
    best = bits < best ? bits : best;
  }
  return best;
}

// The distance of candidate `number` from query chunk `task.item`, or -1 where it is of another document or empty.
MKA_HD int candidate_distance(const MkaRecallSelectArgs& a, const Task& task, int64_t own, int64_t number) {
  if (own < 0 || a.documents[task.row * a.total + number] != own) return -1;
  const int64_t* query = a.queries + ((task.row * a.count + task.item) * a.groups + task.group) * a.words;
  const int64_t* code = a.codes + ((task.row * a.stored + number) * a.groups + task.group) * a.words;
  return distance(query, code, a.tables, a.words / a.tables);
}

struct Cut {
  int distance;   // all that are nearer are taken,
  int64_t equal;  // and this many of those that are as far, the first ones
};

// From how many candidates lie at each distance.
MKA_HD Cut cut_of(const int* counts, int bins, int64_t recalled) {
  int64_t nearer = 0;
#pragma unroll 4
  for (int bin = 0; bin < bins; ++bin) {
    if (nearer + counts[bin] >= recalled) return {bin, recalled - nearer};
    nearer += counts[bin];
  }
  return {bins, 0};
}

// What a warp has taken so far.
struct Taken {
  int64_t found, equal;
};

// Where in the list a lane's candidate goes, -1: it is not taken. `nearer` and `equal`: lanes whose candidate is nearer
// than the cut, or as far.
MKA_HD int64_t place_in_list(const Taken& taken, const Cut& cut, uint32_t nearer, uint32_t equal, int lane) {
  const uint32_t below = (1u << lane) - 1u, own = 1u << lane;
  const int64_t equals = min64(taken.equal + bits_of(equal & below), cut.equal) - taken.equal;
  if (!(nearer & own) && !((equal & own) && taken.equal + bits_of(equal & below) < cut.equal)) return -1;
  return taken.found + bits_of(nearer & below) + equals;
}

MKA_HD Taken taken_after(const Taken& taken, const Cut& cut, uint32_t nearer, uint32_t equal) {
  const int64_t equals = min64(taken.equal + bits_of(equal), cut.equal);
  return {taken.found + bits_of(nearer) + equals - taken.equal, equals};
}

}  // namespace recall
}  // namespace mka
