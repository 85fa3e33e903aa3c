// The decode's update path, thread by thread: what each kernel of csrc/decode_update.cu does between two barriers, as
// functions of a thread's number. The kernels run them on the GPU, and the tests for every thread on the CPU.
#pragma once

#include "mka/recall.cuh"

namespace mka {
namespace decode {

constexpr int THREADS = 256;
constexpr int QUERIES = 16;
constexpr int MAX_WORDS = 16;
constexpr int MAX_RECALLED = 256;
constexpr int64_t NONE = INT64_MAX;

// ---- fuse: element i of [B, G, d], of the keys or the values ----

template <typename T>
MKA_HD void fuse_element(const MkaDecodeFuseArgs& a, bool values, int64_t i) {
  const T* x = static_cast<const T*>(values ? a.x_v : a.x_k);
  const T* long_term = static_cast<const T*>(values ? a.long_term_v : a.long_term_k);
  float* state = values ? a.state_v : a.state_k;
  const float rate = (values ? a.decay_v : a.decay_k)[i % (a.groups * a.channels)];
  const int64_t pair = i / a.channels, b = pair / a.groups;
  const float* shares = a.shares + (b * a.share_groups + (a.share_groups > 1 ? pair % a.groups : 0)) * a.levels;
  const float wide = to_float(x[i]);
  const float level = a.position[b] == 0 ? wide : rate * state[i] + (1.f - rate) * wide;
  if (a.chunk[b] >= 0) state[i] = level;
  float fused = wide + shares[0] * (level - wide);
  if (long_term) fused += shares[1] * (to_float(long_term[i]) - wide);
  static_cast<T*>(values ? a.out_v : a.out_k)[i] = from_float<T>(fused);
}

// ---- append: a block per sequence ----

struct Slot {
  int64_t chunk, at;  // at < 0: no token is taken
};
MKA_HD Slot open_slot(const MkaDecodeAppendArgs& a, int64_t b) {
  const int64_t chunk = a.chunk[b];
  if (chunk < 0 || chunk >= a.chunks) return {0, -1};
  const int64_t at = a.lengths[b * a.chunks + chunk];
  return {chunk, at < a.size ? at : -1};
}

// Channel i of [G, d].
template <typename T>
MKA_HD void append_element(const MkaDecodeAppendArgs& a, int64_t b, const Slot& slot, int64_t i) {
  const int64_t g = i / a.channels, c = i % a.channels, pair = b * a.groups + g, from = pair * a.channels + c;
  const int64_t page = a.table[pair * a.chunks + slot.chunk];
  if (page >= 0) {
    const int64_t to = (page * a.size + slot.at) * a.channels + c;
    static_cast<T*>(a.k)[to] = static_cast<const T*>(a.rotated)[from];
    static_cast<T*>(a.v)[to] = static_cast<const T*>(a.value)[from];
  }
  const float key = to_float(static_cast<const T*>(a.key)[from]);
  if (a.sum_k) {
    a.sum_k[from] += key;
    a.sum_v[from] += to_float(static_cast<const T*>(a.value)[from]);
  }
  if (!a.code_sum) return;
  a.code_sum[from] += recall::fixed_point(key);
  const int64_t fan = a.heads / a.groups;
  const T* q = static_cast<const T*>(a.q) + pair * fan * a.channels + c;
  int64_t sum = 0;
  for (int64_t f = 0; f < fan; ++f) sum += recall::fixed_point(to_float(q[f * a.channels]));
  a.queries[((b * QUERIES + a.position[b] % QUERIES) * a.groups + g) * a.channels + c] = sum;
}

MKA_HD void append_end(const MkaDecodeAppendArgs& a, int64_t b, const Slot& slot) {
  a.lengths[b * a.chunks + slot.chunk] += 1;
  a.position[b] += 1;
}

// ---- close: a block per (sequence, KV head), then one thread per sequence ----

// Tokens of the open chunk if it closes, else 0.
MKA_HD int64_t closing(const MkaDecodeCloseArgs& a, int64_t b) {
  const int64_t chunk = a.chunk[b];
  if (chunk < 0 || chunk >= a.chunks) return 0;
  const int64_t tokens = a.lengths[b * a.chunks + chunk];
  return tokens >= a.size || (a.force && a.force[b]) ? tokens : 0;
}

struct CloseShared {
  int64_t total[256];              // sums that are coded
  uint8_t side[64 * MAX_WORDS];    // bit by bit
  uint64_t query[MAX_WORDS];
  int64_t best[THREADS];
  int64_t best_of[32];
  int64_t found[MAX_RECALLED];
};

// Phase 1: the summary, and the sums of the code.
template <typename T>
MKA_HD void close_summary(const MkaDecodeCloseArgs& a, int64_t b, int64_t g, int64_t tokens, int thread, CloseShared& s) {
  if (thread >= a.channels) return;
  const int64_t pair = b * a.groups + g, half = a.rotated / 2, c = thread;
  if (a.summary_k) {
    const float* sum = a.sum_k + pair * a.channels;
    const float count = static_cast<float>(tokens);
    float mean = sum[c] / count;
    if (c < a.rotated) {
      const float other = c < half ? -sum[c + half] / count : sum[c - half] / count;
      mean = mean * a.cos[b * a.rotated + c] + other * a.sin[b * a.rotated + c];
    }
    const int64_t to = (pair * a.chunks + a.chunk[b]) * a.channels + c;
    static_cast<T*>(a.summary_k)[to] = from_float<T>(mean);
    static_cast<T*>(a.summary_v)[to] = from_float<T>(a.sum_v[pair * a.channels + c] / count);
  }
  if (a.planes) {
    const int64_t bias = a.key_bias ? recall::fixed_point(a.key_bias[g * a.channels + c]) : 0;
    s.total[c] = a.code_sum[pair * a.channels + c] - tokens * bias;
  }
}

// Phases 2 and 4: the planes' sides of the total.
template <int D>
MKA_HD void close_sides(const MkaDecodeCloseArgs& a, int thread, CloseShared& s) {
  for (int64_t plane = thread; plane < 64 * a.words; plane += THREADS)
    s.side[plane] = recall::plane_side<D>(s.total, a.planes, plane);
}

MKA_HD uint64_t word_of(const CloseShared& s, int64_t word) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(s.side[64 * word + i]) << i;
  return bits;
}

// Phase 3: the code; the sums of the next chunk; the total of the last queries.
MKA_HD void close_code(const MkaDecodeCloseArgs& a, int64_t b, int64_t g, int thread, CloseShared& s) {
  const int64_t pair = b * a.groups + g;
  if (a.planes && thread < a.words)
    a.codes[(pair * a.chunks + a.chunk[b]) * a.words + thread] = static_cast<int64_t>(word_of(s, thread));
  if (thread >= a.channels) return;
  const int64_t at = pair * a.channels + thread;
  if (a.summary_k) a.sum_k[at] = a.sum_v[at] = 0.f;
  if (!a.planes) return;
  a.code_sum[at] = 0;
  int64_t total = 0;
  for (int64_t i = 0; i < min64(QUERIES, a.position[b]); ++i)
    total += a.queries[((b * QUERIES + i) * a.groups + g) * a.channels + thread];
  s.total[thread] = total;
}

// Phase 5: the query's code.
MKA_HD void close_query(const MkaDecodeCloseArgs& a, int thread, CloseShared& s) {
  if (thread < a.words) s.query[thread] = word_of(s, thread);
}

MKA_HD int popcount(uint64_t x) {
#ifdef __CUDA_ARCH__
  return __popcll(x);
#else
  return __builtin_popcountll(x);
#endif
}

// The smallest Hamming distance over the tables.
MKA_HD int64_t distance(const uint64_t* query, const int64_t* code, int64_t words, int64_t tables) {
  const int64_t per = words / tables;
  int64_t least = NONE;
  for (int64_t t = 0; t < tables; ++t) {
    int64_t bits = 0;
    for (int64_t w = t * per; w < (t + 1) * per; ++w) bits += popcount(query[w] ^ static_cast<uint64_t>(code[w]));
    least = min64(least, bits);
  }
  return least;
}

// Phase 6, once per recalled chunk, in three steps: the nearest of the chunks behind `before` in the order of
// (distance, number).
MKA_HD void select_own(const MkaDecodeCloseArgs& a, int64_t b, int64_t g, int64_t before, int thread, CloseShared& s) {
  const int64_t pair = b * a.groups + g, last = min64(a.chunk[b] + 1 - a.window, a.chunks - 1);
  int64_t best = NONE;
  for (int64_t n = thread; n <= last; n += THREADS) {
    if (a.lengths[b * a.chunks + n] <= 0) continue;
    const int64_t order = distance(s.query, a.codes + (pair * a.chunks + n) * a.words, a.words, a.tables) << 32 | n;
    if (order > before) best = min64(best, order);
  }
  s.best[thread] = best;
}
MKA_HD void select_some(int thread, CloseShared& s) {
  if (thread >= 32) return;
  int64_t best = NONE;
  for (int i = thread; i < THREADS; i += 32) best = min64(best, s.best[i]);
  s.best_of[thread] = best;
}
MKA_HD int64_t select_best(int64_t round, int thread, CloseShared& s) {
  int64_t best = NONE;
  for (int i = 0; i < 32; ++i) best = min64(best, s.best_of[i]);
  if (thread == 0) s.found[round] = best == NONE ? NONE : best & 0xffffffff;
  return best;
}

// Phase 7: the chosen in ascending order, then -1.
MKA_HD void select_write(const MkaDecodeCloseArgs& a, int64_t b, int64_t g, int thread, const CloseShared& s) {
  const int64_t mine = thread < a.recalled_chunks ? s.found[thread] : NONE;
  if (thread >= a.recalled_chunks) return;
  int64_t rank = 0;
  for (int64_t i = 0; i < a.recalled_chunks; ++i) rank += s.found[i] < mine || (s.found[i] == mine && i < thread);
  a.recalled[(b * a.groups + g) * a.recalled_chunks + rank] = mine == NONE ? -1 : static_cast<int32_t>(mine);
}

}  // namespace decode
}  // namespace mka
