// Tensor cores through mma.sync (sm_80 and later): a warp's operands in registers and in swizzled tiles of shared
// memory, and the copies that fill those; the same on the host.
//
// LANES is 1 on the GPU, where each lane has its own registers, and 32 on the host, which stands for a whole warp: what
// the GPU's instructions do is done there lane by lane, as the PTX manual has the layouts.
#pragma once

#include <math.h>
#include <string.h>

#include <type_traits>

#include "mka/common.cuh"

// For loops that the host's compiler may leave as they are.
#ifdef __CUDA_ARCH__
#define MKA_PRAGMA(x) _Pragma(#x)
#define MKA_UNROLL _Pragma("unroll")
#define MKA_UNROLL_BY(n) MKA_PRAGMA(unroll n)
#else
#define MKA_UNROLL
#define MKA_UNROLL_BY(n)
#endif

namespace mka {

template <int LANES>
MKA_HD int lane_of(int l) {
#ifdef __CUDA_ARCH__
  return threadIdx.x & 31;
#else
  return l;
#endif
}

// Two numbers, rounded, as one word with the first below.
template <typename T>
MKA_HD uint32_t pack(float low, float high) {
  uint32_t word;
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
  }
#else
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  memcpy(&word, static_cast<const void*>(pair), 4);
#endif
  return word;
}

// 2^x; on the GPU to 2 ulp, with 0 for what would be denormal.
MKA_HD float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// ---- products ----

// c += a b, m16n8k16: c [16][8], a [16][16], b [16][8].
template <typename T, int LANES>
MKA_HD void mma(float (&c)[LANES][4], const uint32_t (&a)[LANES][4], const uint32_t (&b)[LANES][2]) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3])
        : "r"(a[0][0]), "r"(a[0][1]), "r"(a[0][2]), "r"(a[0][3]), "r"(b[0][0]), "r"(b[0][1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3])
        : "r"(a[0][0]), "r"(a[0][1]), "r"(a[0][2]), "r"(a[0][3]), "r"(b[0][0]), "r"(b[0][1]));
#else
  // the layout that the PTX manual gives: a [16][16] by rows, b [16][8] by columns
  float A[16][16], B[8][16];
  for (int l = 0; l < LANES; ++l)
    for (int e = 0; e < 8; ++e) {
      T pair[2];
      memcpy(static_cast<void*>(pair), &a[l][e / 2], 4);
      A[l / 4 + (e / 2 % 2) * 8][l % 4 * 2 + (e & 1) + (e >= 4 ? 8 : 0)] = to_float(pair[e & 1]);
      if (e >= 4) continue;
      memcpy(static_cast<void*>(pair), &b[l][e / 2], 4);
      B[l / 4][l % 4 * 2 + (e & 1) + (e >= 2 ? 8 : 0)] = to_float(pair[e & 1]);
    }
  for (int l = 0; l < LANES; ++l)
    for (int e = 0; e < 4; ++e)
      for (int x = 0; x < 16; ++x) c[l][e] += A[l / 4 + 8 * (e / 2)][x] * B[l % 4 * 2 + (e & 1)][x];
#endif
}

// Of c, a lane has rows lane / 4 (elements 0 and 1) and lane / 4 + 8 (2 and 3), columns c_column and the next.
MKA_HD int c_row(int lane, int e) { return lane / 4 + 8 * (e / 2); }
MKA_HD int c_column(int lane, int e) { return lane % 4 * 2 + (e & 1); }

// Two results side by side, [16][8] each, rounded, as the a of another product.
template <typename T, int LANES>
MKA_HD void as_a(uint32_t (&a)[LANES][4], const float (&c0)[LANES][4], const float (&c1)[LANES][4]) {
MKA_UNROLL
  for (int l = 0; l < LANES; ++l) {
    a[l][0] = pack<T>(c0[l][0], c0[l][1]), a[l][1] = pack<T>(c0[l][2], c0[l][3]);
    a[l][2] = pack<T>(c1[l][0], c1[l][1]), a[l][3] = pack<T>(c1[l][2], c1[l][3]);
  }
}

// The largest, and the sum, of what the four lanes of a row have; all four get it.
template <int LANES>
MKA_HD void row_max(float (&x)[LANES]) {
#ifdef __CUDA_ARCH__
  x[0] = fmaxf(x[0], __shfl_xor_sync(0xffffffffu, x[0], 1));
  x[0] = fmaxf(x[0], __shfl_xor_sync(0xffffffffu, x[0], 2));
#else
  for (int bit = 1; bit < 4; bit *= 2)
    for (int l = 0; l < LANES; ++l)
      if (!(l & bit)) x[l] = x[l ^ bit] = fmaxf(x[l], x[l ^ bit]);
#endif
}
template <int LANES>
MKA_HD void row_sum(float (&x)[LANES]) {
#ifdef __CUDA_ARCH__
  x[0] += __shfl_xor_sync(0xffffffffu, x[0], 1);
  x[0] += __shfl_xor_sync(0xffffffffu, x[0], 2);
#else
  for (int bit = 1; bit < 4; bit *= 2)
    for (int l = 0; l < LANES; ++l)
      if (!(l & bit)) x[l] = x[l ^ bit] = x[l] + x[l ^ bit];
#endif
}

// ---- tiles in shared memory: [rows][D], aligned to a row's 2 D bytes ----

// Where an element lies. Units of 8 channels are exchanged within a row so that the same unit of 8 adjacent rows is in
// 8 different bank groups.
template <int D>
MKA_HD int swizzled(int row, int channel) {
  static_assert(D == 64 || D == 128 || D == 256, "the exchange is within a row's alignment");
  return row * D + ((channel / 8 ^ (row & 7)) * 8 | (channel & 7));
}

#ifdef __CUDA_ARCH__
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// The same; on the GPU what is computed from it is computed again instead of kept in registers.
MKA_HD int opaque(int x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Four matrices [8][8]; row l % 8 of matrix l / 8 is row lane_row(l) from `row`, channel lane_channel(l) (0 or 8) from
// `channel`. Of each matrix a lane gets row lane / 4, columns lane % 4 * 2 and the next; TRANSPOSED: rows lane % 4 * 2
// and the next of column lane / 4. `row` is a multiple of 8, `channel` of 16.
template <typename T, int D, bool TRANSPOSED, int LANES, typename LaneRow, typename LaneChannel>
MKA_HD void load_matrices(uint32_t (&words)[LANES][4], const T* tile, int row, int channel, const LaneRow& lane_row,
                          const LaneChannel& lane_channel) {
#ifdef __CUDA_ARCH__
  // swizzled<D>(row + lane_row, channel + lane_channel), one instruction from where the lane's (0, 0) lies
  const int lane = lane_of<LANES>(0);
  const uint32_t base = shared_address(tile) + 2 * swizzled<D>(lane_row(lane), lane_channel(lane));
  const uint32_t at = (base ^ 2 * channel) + 2 * D * row;
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0][0]), "=r"(words[0][1]), "=r"(words[0][2]), "=r"(words[0][3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0][0]), "=r"(words[0][1]), "=r"(words[0][2]), "=r"(words[0][3])
                 : "r"(at)
                 : "memory");
#else
  for (int l = 0; l < LANES; ++l)
    for (int m = 0; m < 4; ++m)
      for (int e = 0; e < 2; ++e) {
        const int i = TRANSPOSED ? l % 4 * 2 + e : l / 4, column = TRANSPOSED ? l / 4 : l % 4 * 2 + e;
        const int at = swizzled<D>(row + lane_row(8 * m + i), channel + lane_channel(8 * m + i));
        memcpy(reinterpret_cast<char*>(&words[l][m]) + 2 * e, tile + at + column, 2);
      }
#endif
}

// a: rows [row, row + 16), channels [channel, channel + 16).
template <typename T, int D, int LANES>
MKA_HD void load_a(uint32_t (&a)[LANES][4], const T* tile, int row, int channel) {
  load_matrices<T, D, false, LANES>(
      a, tile, row, channel, [](int lane) { return lane % 16; }, [](int lane) { return lane / 16 * 8; });
}

template <int LANES>
MKA_HD void as_two(uint32_t (&b)[2][LANES][2], const uint32_t (&words)[LANES][4]) {
MKA_UNROLL
  for (int l = 0; l < LANES; ++l)
MKA_UNROLL
    for (int i = 0; i < 4; ++i) b[i / 2][l][i % 2] = words[l][i];
}

// Two b of the transposed tile: their n is the tile's rows [row, row + 8) and [row + 8, row + 16), k is channels
// [channel, channel + 16).
template <typename T, int D, int LANES>
MKA_HD void load_b(uint32_t (&b)[2][LANES][2], const T* tile, int row, int channel) {
  uint32_t words[LANES][4];
  load_matrices<T, D, false, LANES>(
      words, tile, row, channel, [](int lane) { return lane % 8 + lane / 16 * 8; },
      [](int lane) { return lane / 8 % 2 * 8; });
  as_two<LANES>(b, words);
}

// Two b of the tile as it is: their k is rows [row, row + 16), n is channels [channel, channel + 8) and
// [channel + 8, channel + 16).
template <typename T, int D, int LANES>
MKA_HD void load_b_trans(uint32_t (&b)[2][LANES][2], const T* tile, int row, int channel) {
  uint32_t words[LANES][4];
  load_matrices<T, D, true, LANES>(
      words, tile, row, channel, [](int lane) { return lane % 16; }, [](int lane) { return lane / 16 * 8; });
  as_two<LANES>(b, words);
}

// ---- copies into them ----

// 16 bytes to shared memory, or zeros where `wanted` is 0; done after commit and wait (on the host at once).
MKA_HD void copy_unit(void* to, const void* from, uint32_t wanted) {
#ifdef __CUDA_ARCH__
  asm volatile(
      "{ .reg .pred unwanted; setp.eq.u32 unwanted, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, unwanted; }"
      :
      : "r"(shared_address(to)), "l"(from), "r"(wanted)
      : "memory");
#else
  if (wanted)
    memcpy(to, from, 16);
  else
    memset(to, 0, 16);
#endif
}

// One thread's part of copying `rows` rows, `stride` elements apart, to a tile; those that `wanted(row)` denies become
// zeros and are not read. The threads copy whole rows together, 8 of them or a multiple at a time.
template <typename T, int D, typename Wanted>
MKA_HD void copy_rows_where(T* tile, const T* from, int64_t stride, int rows, const Wanted& wanted, int thread, int threads) {
  constexpr int UNITS = D / 8;
  const int first = thread / UNITS, channel = thread % UNITS * 8, step = threads / UNITS;
  T* to = tile + swizzled<D>(first, channel);
  from += first * stride + channel;
MKA_UNROLL
  for (int row = 0; row < rows; row += step) {
    copy_unit(to + row * D, from, wanted(first + row));
    from += step * stride;
  }
}

// The same of the first `wanted` of them.
template <typename T, int D>
MKA_HD void copy_rows(T* tile, const T* from, int64_t stride, int rows, int wanted, int thread, int threads) {
  copy_rows_where<T, D>(tile, from, stride, rows, [=](int row) { return row < wanted; }, thread, threads);
}

// Ends a group of copies.
MKA_HD void commit() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// This thread's groups have arrived but for the last N; others' only after a barrier.
template <int N>
MKA_HD void wait() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

}  // namespace mka
