// Hopper's own instructions (sm_90a): bulk tensor copies that complete on barriers in shared memory, and products of
// warp groups (wgmma) whose operands lie in 128-byte-swizzled tiles; each is one small function of `Gpu`.
//
// Code that is written over a machine runs on the GPU with Gpu and in tests with Model (mka/hopper_model.cuh), which
// does the same on the host. A variable that each thread has is an array over M::THREADS (a warp group's) or M::LANES
// (a warp's): one on the GPU, 128 and 32 on the host, as in mka/mma.cuh.
#pragma once

#include <cuda.h>

#include "mka/mma.cuh"

namespace mka {
namespace hopper {

constexpr int GROUP = 128;         // threads of a warp group
constexpr int ROW_BYTES = 128;     // of a tile: 64 elements; wider matrices are several tiles, one behind the other
constexpr int TILE_ALIGN = 1024;   // bytes; the swizzle depends on the address

// What a descriptor says of a 128-byte-swizzled operand (PTX manual, "matrix descriptor"), for K = 16 elements.
// Channels are the K dimension: 8 rows are 1024 bytes, the next 16 channels of a row lie 32 bytes on.
MKA_HD uint64_t rows_descriptor(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}
// Rows are the K dimension, channels the other: `tile` bytes from 64 channels to the next, 16 rows are 2048 bytes.
MKA_HD uint64_t columns_descriptor(uint32_t address, uint32_t tile) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | static_cast<uint64_t>(tile >> 4) << 16 | (address & 0x3ffff) >> 4;
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Accumulators as operands.
#define MKA_F4(c, i) "+f"(c[i][0]), "+f"(c[i + 1][0]), "+f"(c[i + 2][0]), "+f"(c[i + 3][0])
#define MKA_F16(c, i) MKA_F4(c, i), MKA_F4(c, i + 4), MKA_F4(c, i + 8), MKA_F4(c, i + 12)
#define MKA_F32(c) MKA_F16(c, 0), MKA_F16(c, 16)
#define MKA_F64(c) MKA_F32(c), MKA_F16(c, 32), MKA_F16(c, 48)
#define MKA_C32                                                                                                   \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31}"
#define MKA_C64                                                                                                   \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"    \
  "%57,%58,%59,%60,%61,%62,%63}"

struct Gpu {
  static constexpr int THREADS = 1;
  static constexpr int LANES = 1;
  using Map = CUtensorMap;

  __device__ static int thread(int) { return threadIdx.x % GROUP; }  // in its warp group
  __device__ static int lane(int) { return threadIdx.x % 32; }
  __device__ static bool first_lane() { return threadIdx.x % 32 == 0; }
  __device__ static uint32_t address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  }

  // Stops where a tile does not lie as the swizzle needs it.
  __device__ static void check_tile(const void* tile) {
    if (address(tile) % TILE_ALIGN) __trap();
  }

  // ---- barriers in shared memory: a phase ends when `count` arrivals and all expected bytes have come ----

  __device__ static void init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(count) : "memory");
  }
  // Makes the barriers known to the copy engine; a __syncthreads() is to follow.
  __device__ static void initialised() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
  __device__ static void arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
  }
  // Arrives, and expects so many bytes of copies.
  __device__ static void expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
  }
  // Waits until the phase of this parity has ended.
  __device__ static void wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}\n" ::"r"(address(barrier)),
        "r"(parity)
        : "memory");
  }
  // One arrival for each of the warp group's warps.
  __device__ static void release(uint64_t* barrier) {
    if (first_lane()) arrive(barrier);
  }

  // ---- named barriers ----

  __device__ static void sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
  __device__ static void signal(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
  }
  __device__ static void sync_warp() { __syncwarp(); }
  __device__ static uint32_t ballot(const bool (&x)[1]) { return __ballot_sync(0xffffffffu, x[0]); }
  __device__ static void exchange(uint32_t (&x)[1], int bit) { x[0] = __shfl_xor_sync(0xffffffffu, x[0], bit); }

  // ---- copies ----

  __device__ static void prefetch(const Map* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
  }
  // The map's box at (channel, row, head, batch) to a tile; its bytes count on the barrier. Zeros beyond the tensor.
  __device__ static void load(const Map* map, void* tile, uint64_t* barrier, int channel, int row, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(address(tile)), "l"(reinterpret_cast<uint64_t>(map)), "r"(address(barrier)), "r"(channel), "r"(row),
        "r"(head), "r"(batch)
        : "memory");
  }
  __device__ static void zero_unit(void* shared) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address(shared)), "r"(0) : "memory");
  }
  // This thread's writes to shared memory before it are seen by copies and products after it.
  __device__ static void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

  // ---- registers: of each thread of the warp group from here on ----

  template <int COUNT>
  __device__ static void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
  }
  template <int COUNT>
  __device__ static void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
  }

  // ---- products of a warp group: they run behind the program until waited for ----

  // Orders the registers that were written with the products that follow.
  __device__ static void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  __device__ static void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
  // All groups are done but for the last N.
  template <int N>
  __device__ static void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
  }
  // The compiler moves no use of these registers across.
  template <int COUNT>
  __device__ static void settle(float (&x)[COUNT][1]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(x[i][0])::"memory");
  }
  template <int COUNT>
  __device__ static void settle(uint32_t (&x)[COUNT][1]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(x[i][0])::"memory");
  }

  // c [64][128] (+)= a [64][16] b [128][16]^T, both by rows_descriptor.
  template <typename T>
  __device__ static void product(float (&c)[64][1], uint64_t a, uint64_t b, bool add) {
#define MKA_PRODUCT(type)                                                                                       \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                                   \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " MKA_C64                           \
               ", %64, %65, add, 1, 1, 0, 0;\n}\n"                                                               \
               : MKA_F64(c)                                                                                       \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      MKA_PRODUCT("bf16");
    else
      MKA_PRODUCT("f16");
#undef MKA_PRODUCT
  }

  // c [64][64] (+)= a [64][16] b [64][16]^T, both by rows_descriptor.
  template <typename T>
  __device__ static void product(float (&c)[32][1], uint64_t a, uint64_t b, bool add) {
#define MKA_PRODUCT(type)                                                                                         \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"                                                   \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " MKA_C32                            \
               ", %32, %33, add, 1, 1, 0, 0;\n}\n"                                                               \
               : MKA_F32(c)                                                                                       \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      MKA_PRODUCT("bf16");
    else
      MKA_PRODUCT("f16");
#undef MKA_PRODUCT
  }

  // c [64][128] += a [64][16] in registers (as mma.sync's, warp by warp) b [16][128], by columns_descriptor.
  template <typename T>
  __device__ static void product(float (&c)[64][1], const uint32_t (&a)[4][1], uint64_t b) {
#define MKA_PRODUCT(type)                                                                                         \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                                     \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " MKA_C64                           \
               ", {%64,%65,%66,%67}, %68, add, 1, 1, 1;\n}\n"                                                     \
               : MKA_F64(c)                                                                                       \
               : "r"(a[0][0]), "r"(a[1][0]), "r"(a[2][0]), "r"(a[3][0]), "l"(b))
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      MKA_PRODUCT("bf16");
    else
      MKA_PRODUCT("f16");
#undef MKA_PRODUCT
  }

  // The same of 64 columns.
  template <typename T>
  __device__ static void product(float (&c)[32][1], const uint32_t (&a)[4][1], uint64_t b) {
#define MKA_PRODUCT(type)                                                                                        \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                                    \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " MKA_C32                           \
               ", {%32,%33,%34,%35}, %36, add, 1, 1, 1;\n}\n"                                                    \
               : MKA_F32(c)                                                                                      \
               : "r"(a[0][0]), "r"(a[1][0]), "r"(a[2][0]), "r"(a[3][0]), "l"(b))
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      MKA_PRODUCT("bf16");
    else
      MKA_PRODUCT("f16");
#undef MKA_PRODUCT
  }
};

#undef MKA_F4
#undef MKA_F16
#undef MKA_F32
#undef MKA_F64
#undef MKA_C32
#undef MKA_C64

#endif

}  // namespace hopper
}  // namespace mka
