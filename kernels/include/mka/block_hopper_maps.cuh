// The tensors of block_attention as the copy engine reads them, and how it is told.
#pragma once

#include <string.h>

#include "mka/block_hopper.cuh"
#include "mka/block_launch.cuh"
#include "mka/hopper_model.cuh"

namespace mka {
namespace block {
namespace wgmma {

// q, then the keys and values of rows, summaries and pages; those that are not there have no base.
inline void tensors(const MkaBlockAttentionArgs& a, hopper::Tensor (&found)[7]) {
  const auto strided = [&](const void* base, int64_t rows, int64_t heads, const int64_t (&strides)[3]) {
    return hopper::Tensor{base, a.channels, rows, heads, a.batch, strides[1], strides[2], strides[0]};
  };
  const int64_t rows = halo(a) * a.size + a.slots, page = a.size * a.channels;
  const int64_t packed[3] = {a.groups * a.pages * page, a.channels, a.pages * page};
  found[0] = strided(a.q, a.slots, a.heads, a.q_strides);
  found[1] = strided(a.k, rows, a.groups, a.k_strides);
  found[2] = strided(a.v, rows, a.groups, a.v_strides);
  found[3] = strided(a.summaries ? a.summary_k : nullptr, a.summaries, a.groups, a.summary_k_strides);
  found[4] = strided(a.summaries ? a.summary_v : nullptr, a.summaries, a.groups, a.summary_v_strides);
  found[5] = strided(a.pages ? a.page_k : nullptr, a.pages * a.size, a.groups, packed);
  found[6] = strided(a.pages ? a.page_v : nullptr, a.pages * a.size, a.groups, packed);
}

constexpr int64_t MOST_ROWS = int64_t{1} << 31;      // a box's place is 32 bits
constexpr int64_t MOST_STRIDE = int64_t{1} << 39;    // elements; 2^40 bytes

// What the copy engine can address.
inline bool mappable(const hopper::Tensor& t) {
  const auto stride_fits = [](int64_t stride, int64_t count) {
    return count == 1 || (stride > 0 && stride < MOST_STRIDE && stride % 8 == 0);
  };
  return !t.base || (aligned(t.base, 16) && t.rows < MOST_ROWS && stride_fits(t.row_stride, t.rows) &&
                     stride_fits(t.head_stride, t.heads) && stride_fits(t.batch_stride, t.batch));
}

// Whether there is a kernel for these arguments.
inline bool has_kernel(const MkaBlockAttentionArgs& a) {
  if (!possible(a) || a.size != TILE_ROWS || (a.channels != 64 && a.channels != 128) || !(a.scale > 0)) return false;
  if (a.slots == 0 || a.batch == 0) return true;
  if (a.chunks >= MOST_ROWS || a.batch >= MOST_ROWS || query_blocks(a) > INT32_MAX) return false;
  hopper::Tensor all[7];
  tensors(a, all);
  for (const hopper::Tensor& t : all)
    if (!mappable(t)) return false;
  return true;
}

// Whether the current device has wgmma.
inline bool on_hopper() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
}

// The driver's function, found at run time so that the library loads where there is no driver.
using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
inline Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

inline int encode(Encode function, const hopper::Tensor& t, int64_t dtype, CUtensorMap& map) {
  const auto bytes = [](int64_t stride, int64_t count) { return static_cast<cuuint64_t>(2 * (count == 1 ? 64 : stride)); };
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(t.channels), static_cast<cuuint64_t>(t.rows),
                               static_cast<cuuint64_t>(t.heads), static_cast<cuuint64_t>(t.batch)};
  const cuuint64_t strides[3] = {bytes(t.row_stride, t.rows), bytes(t.head_stride, t.heads), bytes(t.batch_stride, t.batch)};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(t.box), 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result =
      function(&map, dtype == MKA_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
               const_cast<void*>(t.base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : static_cast<int>(cudaErrorInvalidValue);
}

// Writes the maps of the tensors that are there.
template <int COUNT>
int encode_all(const hopper::Tensor (&all)[COUNT], int64_t dtype, CUtensorMap (&maps)[COUNT]) {
  static const Encode function = find_encode();
  if (!function) return static_cast<int>(cudaErrorNotSupported);
  memset(maps, 0, sizeof(maps));
  for (int i = 0; i < COUNT; ++i)
    if (all[i].base)
      if (const int error = encode(function, all[i], dtype, maps[i])) return error;
  return 0;
}

}  // namespace wgmma
}  // namespace block
}  // namespace mka

// Runs `call` with T and the channels of arguments that there is a kernel for.
#define MKA_HOPPER_DISPATCH(a, call)                        \
  do {                                                      \
    if ((a).dtype == MKA_BF16) {                            \
      using T = __nv_bfloat16;                              \
      return (a).channels == 64 ? call(64) : call(128);     \
    }                                                       \
    using T = __half;                                       \
    return (a).channels == 64 ? call(64) : call(128);       \
  } while (false)
