// The forward of block_attention on Hopper: one block of 384 threads on every processor; see mka/block_hopper.cuh.
#include <stdio.h>
#include <string.h>

#include <exception>
#include <memory>
#include <vector>

#include "mka/block_hopper_attend.cuh"
#include "mka/block_hopper_maps.cuh"

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
  extern __shared__ __align__(hopper::TILE_ALIGN) unsigned char dynamic[];
  const Layout<D> shared{dynamic};
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
      Planner<Layout<D>, hopper::Gpu> planner{gpu, a, p, shared};
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

template <typename T, int D>
int launch(const MkaBlockAttentionArgs& a, const Maps<CUtensorMap>& maps, cudaStream_t stream) {
  constexpr int bytes = Layout<D>::BYTES;
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
  const auto attend = [&](hopper::Model& machine, int index) {
    const auto registers = std::make_unique<Attending<D, hopper::GROUP>>();
    memset(static_cast<void*>(registers.get()), 0xff, sizeof(*registers));
    Attender<T, D, hopper::Model> attender{machine, a, shared, index, *registers};
    attender.run(block, blocks, tasks);
  };
  hopper::run_roles(board, {[&](hopper::Model& machine) {
                              Planner<Layout<D>, hopper::Model> planner{machine, a, p, shared};
                              planner.run(block, blocks, tasks);
                            },
                            [&](hopper::Model& machine) {
                              Fetcher<D, hopper::Model> fetcher{machine, maps, shared};
                              fetcher.run(block, blocks, tasks);
                            },
                            [&](hopper::Model& machine) { attend(machine, 0); },
                            [&](hopper::Model& machine) { attend(machine, 1); }});
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

bool hopper_forward_possible(const MkaBlockAttentionArgs& a) { return wgmma::has_kernel(a) && wgmma::on_hopper(); }

int forward_hopper(const MkaBlockAttentionArgs& a, cudaStream_t stream) {
  if (query_blocks(a) == 0) return 0;
  wgmma::Maps<CUtensorMap> maps;
  hopper::Tensor all[7];
  wgmma::tensors(a, all);
  if (const int error = wgmma::encode_all(all, a.dtype, maps.at)) return error;
#define MKA_CALL(D) wgmma::launch<T, D>(a, maps, stream)
  MKA_HOPPER_DISPATCH(a, MKA_CALL);
#undef MKA_CALL
}

int forward_hopper_on_host(const MkaBlockAttentionArgs& a) {
  if (!wgmma::has_kernel(a)) return MKA_REFUSED;
  if (query_blocks(a) == 0) return 0;
  plan_on_host(a, false);
#define MKA_CALL(D) wgmma::on_host<T, D>(a)
  MKA_HOPPER_DISPATCH(a, MKA_CALL);
#undef MKA_CALL
}

}  // namespace block
}  // namespace mka
