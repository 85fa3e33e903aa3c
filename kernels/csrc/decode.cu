// The attention of one token per sequence over window, summaries and recalled chunks in paged keys and values.
//
// A block is (split, KV head, sequence): its warps take tiles of 16 keys, all query heads of the KV head at once, on
// the tensor cores, straight from memory to registers; their parts of the softmax are merged in the block and, by the
// block that comes last, over the splits: in the splits' order, so that equal inputs give equal bits.
#include <vector>

#include "mka/decode.cuh"

namespace mka {
namespace decode {

template <int D>
constexpr int64_t shared_bytes(int64_t rows) {
  return (ROWS * (D + Q_PAD)) * 2 + WARPS * rows * D * 4;
}

template <typename T, int D>
__global__ void __launch_bounds__(WARPS * 32, 2) attend_kernel(const MkaDecodeAttendArgs a) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  __shared__ Found found[BATCH];
  __shared__ float ml[WARPS][ROWS][2];
  __shared__ float sums[ROWS];
  __shared__ int last;
  T* q = reinterpret_cast<T*>(dynamic);                                          // [ROWS][D + Q_PAD]
  float* outs = reinterpret_cast<float*>(dynamic + ROWS * (D + Q_PAD) * 2);      // [WARPS][rows][D]
  const int64_t split = blockIdx.x, g = blockIdx.y, b = blockIdx.z, pair = b * a.groups + g;
  const int rows = static_cast<int>(a.heads / a.groups), warp = threadIdx.x / 32;
  const T* mine = static_cast<const T*>(a.q) + pair * rows * D;
  for (int i = threadIdx.x; i < ROWS * D; i += WARPS * 32)
    q[i / D * (D + Q_PAD) + i % D] = i / D < rows ? mine[i] : from_float<T>(0.f);

  const Plan p = plan(a.chunk[b], a.window, a.size, a.summary_k != nullptr, a.recalled_chunks);
  const int64_t begin = split_begin(p.tiles, a.splits, split), end = split_begin(p.tiles, a.splits, split + 1);
  const float scale = static_cast<float>(a.scale) * LOG2E;
  State<D, 1> state;
  clear(state);
  for (int64_t from = begin; from < end; from += BATCH) {
    const int count = static_cast<int>(min64(BATCH, end - from));
    __syncthreads();
    if (threadIdx.x < count) found[threadIdx.x] = find(a, p, b, g, from + threadIdx.x);
    __syncthreads();
    for (int t = warp; t < count; t += WARPS) {
      const Found f = found[t];
      if (!f.seen) continue;
      const T* k = static_cast<const T*>(f.level == 1 ? a.summary_k : a.k) + f.offset;
      const T* v = static_cast<const T*>(f.level == 1 ? a.summary_v : a.v) + f.offset;
      attend_tile<T, D, 1>(state, q, k, v, f.seen, scale, f.bias);
    }
  }
  keep<D, 1>(state, rows, outs + warp * rows * D, &ml[warp][0][0]);
  __syncthreads();

  float* part = a.splits == 1 ? nullptr : a.partial + (pair * a.splits + split) * rows * (D + 2);
  if (threadIdx.x < rows) {
    const Merged all = merge_weights(&ml[0][threadIdx.x][0], ROWS * 2, WARPS);
    sums[threadIdx.x] = all.l;
    if (part) part[2 * threadIdx.x] = all.m, part[2 * threadIdx.x + 1] = all.l;
  }
  __syncthreads();
  T* out = static_cast<T*>(a.out) + pair * rows * D;
  for (int i = threadIdx.x; i < rows * D; i += WARPS * 32) {
    const float x = merge(&ml[0][i / D][0], ROWS * 2, outs + i, rows * D, WARPS);
    if (part)
      part[2 * rows + i] = x;
    else
      out[i] = from_float<T>(sums[i / D] > 0.f ? x / sums[i / D] : 0.f);
  }
  if (!part) return;

  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(a.arrived + pair, 1) == a.splits - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  // [splits][rows][2], no larger than what the warps' outputs took
  const int splits = static_cast<int>(a.splits);
  const float* parts = a.partial + pair * a.splits * rows * (D + 2);
  for (int i = threadIdx.x; i < splits * rows * 2; i += WARPS * 32)
    outs[i] = __ldcg(parts + static_cast<int64_t>(i / (rows * 2)) * rows * (D + 2) + i % (rows * 2));
  __syncthreads();
  if (threadIdx.x < rows) sums[threadIdx.x] = merge_weights(outs + 2 * threadIdx.x, rows * 2, splits).l;
  __syncthreads();
  for (int i = threadIdx.x; i < rows * D; i += WARPS * 32) {
    float x = 0.f;
    const float* weights = outs + 2 * (i / D);
#pragma unroll 8
    for (int s = 0; s < splits; ++s) {
      const float w = weights[s * rows * 2];
      if (w != 0.f) x += w * __ldcg(parts + static_cast<int64_t>(s) * rows * (D + 2) + 2 * rows + i);
    }
    out[i] = from_float<T>(sums[i / D] > 0.f ? x / sums[i / D] : 0.f);
  }
  if (threadIdx.x == 0) a.arrived[pair] = 0;
}

// attend_kernel, a block after the other.
template <typename T, int D>
int attend_host(const MkaDecodeAttendArgs& a) {
  const int rows = static_cast<int>(a.heads / a.groups);
  const float scale = static_cast<float>(a.scale) * LOG2E;
  std::vector<T> padded(ROWS * (D + Q_PAD) + 8);
  T* q = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(padded.data()) + 15) / 16 * 16);
  std::vector<float> warps(WARPS * rows * D), splits(a.splits * rows * D), ml(WARPS * ROWS * 2), all(a.splits * rows * 2);
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t pair = b * a.groups + g;
      for (int i = 0; i < ROWS * D; ++i)
        q[i / D * (D + Q_PAD) + i % D] =
            i / D < rows ? static_cast<const T*>(a.q)[pair * rows * D + i] : from_float<T>(0.f);
      const Plan p = plan(a.chunk[b], a.window, a.size, a.summary_k != nullptr, a.recalled_chunks);
      for (int64_t split = 0; split < a.splits; ++split) {
        const int64_t begin = split_begin(p.tiles, a.splits, split), end = split_begin(p.tiles, a.splits, split + 1);
        for (int warp = 0; warp < WARPS; ++warp) {
          State<D, 32> state;
          clear(state);
          for (int64_t t = begin + warp; t < end; t += WARPS) {
            const Found f = find(a, p, b, g, t);
            if (!f.seen) continue;
            const T* k = static_cast<const T*>(f.level == 1 ? a.summary_k : a.k) + f.offset;
            const T* v = static_cast<const T*>(f.level == 1 ? a.summary_v : a.v) + f.offset;
            attend_tile<T, D, 32>(state, q, k, v, f.seen, scale, f.bias);
          }
          keep<D, 32>(state, rows, warps.data() + warp * rows * D, ml.data() + warp * ROWS * 2);
        }
        for (int row = 0; row < rows; ++row) {
          const Merged m = merge_weights(&ml[row * 2], ROWS * 2, WARPS);
          all[(split * rows + row) * 2] = m.m, all[(split * rows + row) * 2 + 1] = m.l;
        }
        for (int i = 0; i < rows * D; ++i)
          splits[split * rows * D + i] = merge(&ml[i / D * 2], ROWS * 2, warps.data() + i, rows * D, WARPS);
      }
      T* out = static_cast<T*>(a.out) + pair * rows * D;
      for (int row = 0; row < rows; ++row) {
        const float sum = merge_weights(&all[row * 2], rows * 2, a.splits).l;
        for (int i = row * D; i < (row + 1) * D; ++i) {
          const float x = merge(&all[row * 2], rows * 2, splits.data() + i, rows * D, a.splits);
          out[i] = from_float<T>(sum > 0.f ? x / sum : 0.f);
        }
      }
    }
  return 0;
}

template <typename T, int D>
int attend(const MkaDecodeAttendArgs& a, cudaStream_t stream) {
  const int64_t bytes = shared_bytes<D>(a.heads / a.groups);
  if (bytes > 40 * 1024)
    MKA_TRY(cudaFuncSetAttribute(attend_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  const dim3 grid(static_cast<unsigned>(a.splits), static_cast<unsigned>(a.groups), static_cast<unsigned>(a.batch));
  attend_kernel<T, D><<<grid, WARPS * 32, bytes, stream>>>(a);
  return launched();
}

bool possible(const MkaDecodeAttendArgs& a) {
  if (a.groups < 1 || a.heads % a.groups || a.heads / a.groups < 1 || a.heads / a.groups > ROWS) return false;
  if (a.batch > 65535 || a.groups > 65535 || a.splits < 1 || a.splits > MAX_SPLITS || a.window < 1 || a.size < 1) return false;
  if (a.splits > 1 && !(a.partial && a.arrived)) return false;
  if ((a.summary_k == nullptr) != (a.summary_v == nullptr) || (a.recalled_chunks > 0 && !a.recalled)) return false;
  for (const void* x : {a.q, a.k, a.v, a.summary_k, a.summary_v, static_cast<const void*>(a.out)})
    if (!aligned(x, 16)) return false;
  return a.dtype == MKA_BF16 || a.dtype == MKA_FP16;
}

#define MKA_DECODE_DISPATCH(dtype, channels, call)                          \
  if (dtype == MKA_BF16) {                                                  \
    using T = __nv_bfloat16;                                                \
    if (channels == 64) return call(64);                                    \
    if (channels == 128) return call(128);                                  \
    if (channels == 256) return call(256);                                  \
  } else {                                                                  \
    using T = __half;                                                       \
    if (channels == 64) return call(64);                                    \
    if (channels == 128) return call(128);                                  \
    if (channels == 256) return call(256);                                  \
  }                                                                         \
  return MKA_REFUSED

}  // namespace decode
}  // namespace mka

int mka_decode_attend(const MkaDecodeAttendArgs* args, void* stream) {
  const MkaDecodeAttendArgs& a = *args;
  if (!mka::decode::possible(a)) return MKA_REFUSED;
  if (a.batch == 0) return 0;
#define MKA_CALL(D) mka::decode::attend<T, D>(a, static_cast<cudaStream_t>(stream))
  MKA_DECODE_DISPATCH(a.dtype, a.channels, MKA_CALL);
#undef MKA_CALL
}

int mka_host_decode_attend(const MkaDecodeAttendArgs* args) {
  const MkaDecodeAttendArgs& a = *args;
  if (!mka::decode::possible(a)) return MKA_REFUSED;
#define MKA_CALL(D) mka::decode::attend_host<T, D>(a)
  MKA_DECODE_DISPATCH(a.dtype, a.channels, MKA_CALL);
#undef MKA_CALL
}

int64_t mka_plan_decode_tiles(int64_t own, int64_t window, int64_t size, int64_t summarised, int64_t recalled) {
  return mka::decode::plan(own, window, size, summarised != 0, recalled).tiles;
}

void mka_plan_decode_tile(int64_t own, int64_t window, int64_t size, int64_t summarised, int64_t recalled, int64_t t,
                          int64_t* out) {
  const auto at = mka::decode::tile(mka::decode::plan(own, window, size, summarised != 0, recalled), t);
  out[0] = at.level, out[1] = at.chunk, out[2] = at.begin;
}

int64_t mka_plan_decode_split(int64_t tiles, int64_t splits, int64_t split) {
  return mka::decode::split_begin(tiles, splits, split);
}

int64_t mka_plan_decode_splits(int64_t pairs, int64_t tiles, int64_t processors) {
  return mka::decode::choose_splits(pairs, tiles, processors);
}
