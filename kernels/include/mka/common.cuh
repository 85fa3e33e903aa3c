// What every kernel needs: element types, rounding, 16-byte vectors, launch checks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "c_api.h"

#define MKA_HD __host__ __device__ __forceinline__

namespace mka {

template <typename T>
MKA_HD float to_float(T x) {
  return static_cast<float>(x);
}
template <>
MKA_HD float to_float<__nv_bfloat16>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
MKA_HD float to_float<__half>(__half x) {
  return __half2float(x);
}

// Rounds to the nearest, ties to even, as PyTorch does.
template <typename T>
MKA_HD T from_float(float x) {
  return static_cast<T>(x);
}
template <>
MKA_HD __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
MKA_HD __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// N elements that move as one access of N * sizeof(T) bytes (at most 16).
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T at[N];
};

template <typename T, int N>
MKA_HD Vec<T, N> load_vec(const T* from) {
  return *reinterpret_cast<const Vec<T, N>*>(from);
}
template <typename T, int N>
MKA_HD void store_vec(T* to, const Vec<T, N>& v) {
  *reinterpret_cast<Vec<T, N>*>(to) = v;
}

MKA_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MKA_HD int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
MKA_HD int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// The result of the launches before it, and of nothing that ran earlier on the stream.
inline int launched() { return static_cast<int>(cudaGetLastError()); }

}  // namespace mka

// Runs the statement with `T` as the element type of a dtype code; returns MKA_REFUSED for an unknown code.
#define MKA_DISPATCH_DTYPE(code, T, ...)   \
  switch (code) {                          \
    case MKA_FP32: {                       \
      using T = float;                     \
      __VA_ARGS__;                         \
      break;                               \
    }                                      \
    case MKA_BF16: {                       \
      using T = __nv_bfloat16;             \
      __VA_ARGS__;                         \
      break;                               \
    }                                      \
    case MKA_FP16: {                       \
      using T = __half;                    \
      __VA_ARGS__;                         \
      break;                               \
    }                                      \
    default:                               \
      return MKA_REFUSED;                  \
  }

// Returns the error of a CUDA runtime call from the enclosing int function.
#define MKA_TRY(call)                                   \
  do {                                                  \
    cudaError_t mka_error_ = (call);                    \
    if (mka_error_ != cudaSuccess) return mka_error_;   \
  } while (0)
