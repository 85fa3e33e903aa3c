// dQ and the gradient of the bias on Hopper; dK and dV are those of mma.sync. See mka/block_hopper_queries.cuh.
#include <stdio.h>
#include <string.h>

#include <memory>
#include <vector>

#include "mka/block_hopper_maps.cuh"
#include "mka/block_hopper_queries.cuh"

namespace mka {
namespace block {
namespace wgmma {

constexpr int QUERIES_THREADS = (1 + GROUPS) * hopper::GROUP;

template <typename T, int D>
__global__ void __launch_bounds__(QUERIES_THREADS, 1)
    queries_kernel(const __grid_constant__ MkaBlockAttentionArgs a, const __grid_constant__ Plan p,
                   const __grid_constant__ QueriesMaps<CUtensorMap> maps, const int tasks) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  // the first warp group plans and fetches; it and the others share 65,536
  constexpr int PLANNER_REGISTERS = 56, OTHER_REGISTERS = 224;
  extern __shared__ unsigned char dynamic[];
  const uint32_t over = hopper::Gpu::address(dynamic) % hopper::TILE_ALIGN;
  const QueriesLayout<D> shared{dynamic + (over ? hopper::TILE_ALIGN - over : 0)};
  hopper::Gpu gpu;
  if (threadIdx.x == 0) prepare(gpu, shared);
  __syncthreads();
  const int index = static_cast<int>(threadIdx.x) / hopper::GROUP - 1;
  if (index < 0) {
    gpu.give_registers<PLANNER_REGISTERS>();
    if (threadIdx.x < 32) {
      QueriesFetcher<D, hopper::Gpu> fetcher{gpu, maps, shared};
      fetcher.run(blockIdx.x, gridDim.x, tasks);
    } else if (threadIdx.x < 64) {
      Planner<QueriesLayout<D>, hopper::Gpu> planner{gpu, a, p, shared};
      planner.run(blockIdx.x, gridDim.x, tasks);
    }
  } else {
    gpu.take_registers<OTHER_REGISTERS>();
    Differentiating<D, 1> registers;
    Differentiator<T, D, hopper::Gpu> differentiator{gpu, a, p, shared, index, registers};
    differentiator.run(blockIdx.x, gridDim.x, tasks);
  }
#endif
}

inline hopper::Tensor grad_out(const MkaBlockAttentionArgs& a) {
  return {a.grad_out, a.channels, a.slots, a.heads, a.batch, a.grad_strides[1], a.grad_strides[2], a.grad_strides[0]};
}

template <typename T, int D>
int launch_queries(const MkaBlockAttentionArgs& a, const QueriesMaps<CUtensorMap>& maps, cudaStream_t stream) {
  constexpr int bytes = QueriesLayout<D>::BYTES + hopper::TILE_ALIGN;
  int device = 0, processors = 0;
  MKA_TRY(cudaGetDevice(&device));
  MKA_TRY(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  MKA_TRY(cudaFuncSetAttribute(queries_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const int tasks = static_cast<int>(query_blocks(a));
  queries_kernel<T, D><<<min(tasks, processors), QUERIES_THREADS, bytes, stream>>>(a, plan_view(a, true), maps, tasks);
  return launched();
}

// ---- the same on the host ----

// A block: its roles side by side.
template <typename T, int D>
void queries_block(const MkaBlockAttentionArgs& a, const Plan& p, const QueriesMaps<hopper::Tensor>& maps, int block,
                   int blocks, bool late) {
  const int tasks = static_cast<int>(query_blocks(a));
  hopper::Board board(QueriesLayout<D>::BYTES, late);
  const QueriesLayout<D> shared{board.shared};
  memset(static_cast<void*>(board.shared), 0xff, QueriesLayout<D>::BYTES);
  hopper::Model first(board);
  prepare(first, shared);
  const auto differentiate = [&](hopper::Model& machine, int index) {
    const auto registers = std::make_unique<Differentiating<D, hopper::GROUP>>();
    memset(static_cast<void*>(registers.get()), 0xff, sizeof(*registers));
    Differentiator<T, D, hopper::Model> differentiator{machine, a, p, shared, index, *registers};
    differentiator.run(block, blocks, tasks);
  };
  hopper::run_roles(board, {[&](hopper::Model& machine) {
                              Planner<QueriesLayout<D>, hopper::Model> planner{machine, a, p, shared};
                              planner.run(block, blocks, tasks);
                            },
                            [&](hopper::Model& machine) {
                              QueriesFetcher<D, hopper::Model> fetcher{machine, maps, shared};
                              fetcher.run(block, blocks, tasks);
                            },
                            [&](hopper::Model& machine) { differentiate(machine, 0); },
                            [&](hopper::Model& machine) { differentiate(machine, 1); }});
}

// Twice, with everything that is asynchronous as early and as late as can be: both must give the same.
template <typename T, int D>
int queries_on_host(const MkaBlockAttentionArgs& a) {
  QueriesMaps<hopper::Tensor> maps;
  tensors(a, maps.forward.at);
  maps.grad_out = grad_out(a);
  const Plan p = plan_view(a, true);
  const int blocks = static_cast<int>(min64(query_blocks(a), 3));
  const int64_t rows = a.batch * a.slots * a.heads;
  std::vector<T> grad(rows * D);
  std::vector<float> bias(a.grad_bias ? rows * 3 : 0);
  MkaBlockAttentionArgs other = a;
  other.grad_q = grad.data();
  if (a.grad_bias) other.grad_bias = bias.data();
  try {
    for (int block = 0; block < blocks; ++block) {
      queries_block<T, D>(other, p, maps, block, blocks, true);
      queries_block<T, D>(a, p, maps, block, blocks, false);
    }
  } catch (const std::exception& error) {
    fprintf(stderr, "block_attention's model: %s\n", error.what());
    return static_cast<int>(cudaErrorAssert);
  }
  const bool same = !memcmp(a.grad_q, static_cast<const void*>(grad.data()), rows * D * sizeof(T)) &&
                    (!a.grad_bias || !memcmp(a.grad_bias, bias.data(), rows * 3 * sizeof(float)));
  return same ? 0 : static_cast<int>(cudaErrorAssert);
}

}  // namespace wgmma

bool hopper_backward_possible(const MkaBlockAttentionArgs& a) {
  return wgmma::has_kernel(a) && wgmma::mappable(wgmma::grad_out(a)) && wgmma::on_hopper();
}

int backward_queries_hopper(const MkaBlockAttentionArgs& a, cudaStream_t stream) {
  if (query_blocks(a) == 0) return 0;
  hopper::Tensor all[8];
  CUtensorMap encoded[8];
  {
    hopper::Tensor forward[7];
    wgmma::tensors(a, forward);
    for (int i = 0; i < 7; ++i) all[i] = forward[i];
    all[7] = wgmma::grad_out(a);
  }
  if (const int error = wgmma::encode_all(all, a.dtype, encoded)) return error;
  wgmma::QueriesMaps<CUtensorMap> maps;
  static_assert(sizeof(maps) == sizeof(encoded), "the maps follow one another");
  memcpy(&maps, encoded, sizeof(maps));
#define MKA_CALL(D) wgmma::launch_queries<T, D>(a, maps, stream)
  MKA_HOPPER_DISPATCH(a, MKA_CALL);
#undef MKA_CALL
}

int backward_queries_on_host(const MkaBlockAttentionArgs& a) {
  if (!wgmma::has_kernel(a) || !wgmma::mappable(wgmma::grad_out(a))) return MKA_REFUSED;
  if (query_blocks(a) == 0) return 0;
#define MKA_CALL(D) wgmma::queries_on_host<T, D>(a)
  MKA_HOPPER_DISPATCH(a, MKA_CALL);
#undef MKA_CALL
}

}  // namespace block
}  // namespace mka
