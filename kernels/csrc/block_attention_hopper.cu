// The forward of block_attention on Hopper: one block of 384 threads on every processor; see mka/block_hopper.cuh.
#include <stdio.h>
#include <string.h>

#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "mka/block_hopper_attend.cuh"
#include "mka/block_launch.cuh"
#include "mka/hopper_model.cuh"

namespace mka {
namespace block {
namespace wgmma {

constexpr int THREADS = (1 + GROUPS) * hopper::GROUP;

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 1)
    forward_kernel(const __grid_constant__ MkaBlockAttentionArgs a, const __grid_constant__ Plan p, const __grid_constant__ Maps<CUtensorMap> maps, const int tasks) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  // the first warp group plans and fetches; it and the others share 65,536
  constexpr int PLANNER_REGISTERS = 56, ATTENDER_REGISTERS = 224;
  extern __shared__ unsigned char dynamic[];
  const uint32_t over = hopper::Gpu::address(dynamic) % hopper::TILE_ALIGN;
  const Layout<D> shared{dynamic + (over ? hopper::TILE_ALIGN - over : 0)};
  hopper::Gpu gpu;
  if (threadIdx.x == 0) prepare(gpu, shared);
  __syncthreads();
  const int index = static_cast<int>(threadIdx.x) / hopper::GROUP - 1;
  if (index < 0) {
    gpu.give_registers<PLANNER_REGISTERS>();
    if (threadIdx.x < 32) {
      Fetcher<D, hopper::Gpu> fetcher{gpu, maps, shared};
      fetcher.run(blockIdx.x, gridDim.x, tasks);
    } else if (threadIdx.x < 64) {
      Planner<D, hopper::Gpu> planner{gpu, a, p, shared};
      planner.run(blockIdx.x, gridDim.x, tasks);
    }
  } else {
    gpu.take_registers<ATTENDER_REGISTERS>();
    Attending<D, 1> registers;
    Attender<T, D, hopper::Gpu> attender{gpu, a, shared, index, registers};
    attender.run(blockIdx.x, gridDim.x, tasks);
  }
#endif
}

// ---- tensors ----

// q, then the keys and values of rows, summaries and pages; those that are not there have no base.
void tensors(const MkaBlockAttentionArgs& a, hopper::Tensor (&found)[7]) {
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
bool mappable(const hopper::Tensor& t) {
  const auto stride_fits = [](int64_t stride, int64_t count) {
    return count == 1 || (stride > 0 && stride < MOST_STRIDE && stride % 8 == 0);
  };
  return !t.base || (aligned(t.base, 16) && t.rows < MOST_ROWS && stride_fits(t.row_stride, t.rows) &&
                     stride_fits(t.head_stride, t.heads) && stride_fits(t.batch_stride, t.batch));
}

bool has_kernel(const MkaBlockAttentionArgs& a) {
  if (!possible(a) || a.size != TILE_ROWS || (a.channels != 64 && a.channels != 128) || !(a.scale > 0)) return false;
  if (a.slots == 0 || a.batch == 0) return true;
  if (a.chunks >= MOST_ROWS || a.batch >= MOST_ROWS || query_blocks(a) > INT32_MAX) return false;
  hopper::Tensor all[7];
  tensors(a, all);
  for (const hopper::Tensor& t : all)
    if (!mappable(t)) return false;
  return true;
}

// The driver's function, found at run time so that the library loads where there is no driver.
using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

int encode(Encode function, const hopper::Tensor& t, int64_t dtype, CUtensorMap& map) {
  const auto bytes = [](int64_t stride, int64_t count) { return static_cast<cuuint64_t>(2 * (count == 1 ? 64 : stride)); };
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(t.channels), static_cast<cuuint64_t>(t.rows),
                               static_cast<cuuint64_t>(t.heads), static_cast<cuuint64_t>(t.batch)};
  const cuuint64_t strides[3] = {bytes(t.row_stride, t.rows), bytes(t.head_stride, t.heads), bytes(t.batch_stride, t.batch)};
  const cuuint32_t box[4] = {64, TILE_ROWS, 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result =
      function(&map, dtype == MKA_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
               const_cast<void*>(t.base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : static_cast<int>(cudaErrorInvalidValue);
}

template <typename T, int D>
int launch(const MkaBlockAttentionArgs& a, const Maps<CUtensorMap>& maps, cudaStream_t stream) {
  constexpr int bytes = Layout<D>::BYTES + hopper::TILE_ALIGN;
  int device = 0, processors = 0;
  MKA_TRY(cudaGetDevice(&device));
  MKA_TRY(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  MKA_TRY(cudaFuncSetAttribute(forward_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const int tasks = static_cast<int>(query_blocks(a));
  forward_kernel<T, D><<<min(tasks, processors), THREADS, bytes, stream>>>(a, plan_view(a, false), maps, tasks);
  return launched();
}

// ---- the same on the host ----

// A block: its roles side by side.
template <typename T, int D>
void block_on_host(const MkaBlockAttentionArgs& a, const Plan& p, const Maps<hopper::Tensor>& maps, int block,
                   int blocks, bool late) {
  const int tasks = static_cast<int>(query_blocks(a));
  hopper::Board board(Layout<D>::BYTES, late);
  const Layout<D> shared{board.shared};
  memset(static_cast<void*>(board.shared), 0xff, Layout<D>::BYTES);
  hopper::Model first(board);
  prepare(first, shared);
  std::exception_ptr errors[2 + GROUPS];
  std::vector<std::thread> roles;
  for (int role = 0; role < 2 + GROUPS; ++role)
    roles.emplace_back([&, role] {
      try {
        hopper::Model machine(board);
        if (role == GROUPS) {
          Planner<D, hopper::Model> planner{machine, a, p, shared};
          planner.run(block, blocks, tasks);
        } else if (role > GROUPS) {
          Fetcher<D, hopper::Model> fetcher{machine, maps, shared};
          fetcher.run(block, blocks, tasks);
        } else {
          const auto registers = std::make_unique<Attending<D, hopper::GROUP>>();
          memset(static_cast<void*>(registers.get()), 0xff, sizeof(*registers));
          Attender<T, D, hopper::Model> attender{machine, a, shared, role, *registers};
          attender.run(block, blocks, tasks);
        }
      } catch (...) {
        errors[role] = std::current_exception();
      }
    });
  for (auto& role : roles) role.join();
  for (const auto& error : errors)
    if (error) std::rethrow_exception(error);
}

// Twice, with everything that is asynchronous as early and as late as can be: both must give the same.
template <typename T, int D>
int on_host(const MkaBlockAttentionArgs& a) {
  Maps<hopper::Tensor> maps;
  tensors(a, maps.at);
  const Plan p = plan_view(a, false);
  const int blocks = static_cast<int>(min64(query_blocks(a), 3));
  const int64_t size = a.batch * a.slots * a.heads;
  std::vector<T> out(size * D);
  std::vector<float> lse(size);
  MkaBlockAttentionArgs other = a;
  other.out = out.data(), other.lse = lse.data();
  try {
    for (int block = 0; block < blocks; ++block) {
      block_on_host<T, D>(a, p, maps, block, blocks, false);
      block_on_host<T, D>(other, p, maps, block, blocks, true);
    }
  } catch (const std::exception& error) {
    fprintf(stderr, "block_attention's model: %s\n", error.what());
    return static_cast<int>(cudaErrorAssert);
  }
  const bool same = !memcmp(a.out, static_cast<const void*>(out.data()), size * D * sizeof(T)) &&
                    !memcmp(a.lse, lse.data(), size * sizeof(float));
  return same ? 0 : static_cast<int>(cudaErrorAssert);
}

}  // namespace wgmma

#define MKA_BLOCK_DISPATCH(call)                                   \
  do {                                                             \
    if (a.dtype == MKA_BF16) {                                     \
      using T = __nv_bfloat16;                                     \
      return a.channels == 64 ? call(64) : call(128);              \
    }                                                              \
    using T = __half;                                              \
    return a.channels == 64 ? call(64) : call(128);                \
  } while (0)

bool hopper_forward_possible(const MkaBlockAttentionArgs& a) {
  int device = 0, major = 0, minor = 0;
  return wgmma::has_kernel(a) && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
}

int forward_hopper(const MkaBlockAttentionArgs& a, cudaStream_t stream) {
  if (query_blocks(a) == 0) return 0;
  static const wgmma::Encode function = wgmma::find_encode();
  if (!function) return static_cast<int>(cudaErrorNotSupported);
  wgmma::Maps<CUtensorMap> maps;
  memset(&maps, 0, sizeof(maps));
  hopper::Tensor all[7];
  wgmma::tensors(a, all);
  for (int i = 0; i < 7; ++i)
    if (all[i].base)
      if (const int error = wgmma::encode(function, all[i], a.dtype, maps.at[i])) return error;
#define MKA_CALL(D) wgmma::launch<T, D>(a, maps, stream)
  MKA_BLOCK_DISPATCH(MKA_CALL);
#undef MKA_CALL
}

int forward_hopper_on_host(const MkaBlockAttentionArgs& a) {
  if (!wgmma::has_kernel(a)) return MKA_REFUSED;
  if (query_blocks(a) == 0) return 0;
  plan_on_host(a, false);
#define MKA_CALL(D) wgmma::on_host<T, D>(a)
  MKA_BLOCK_DISPATCH(MKA_CALL);
#undef MKA_CALL
}

}  // namespace block
}  // namespace mka
