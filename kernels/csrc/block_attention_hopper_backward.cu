// The backward of block_attention on Hopper: dQ and the gradient of the bias (mka/block_hopper_queries.cuh), then dK and
// dV (mka/block_hopper_keys.cuh); one block of 384 threads on every processor.
#include <stdio.h>
#include <string.h>

#include <memory>
#include <vector>

#include "mka/block_hopper_keys.cuh"
#include "mka/block_hopper_maps.cuh"
#include "mka/block_hopper_queries.cuh"

namespace mka {
namespace block {
namespace wgmma {

constexpr int BACKWARD_THREADS = (1 + GROUPS) * hopper::GROUP;

template <typename T, int D>
__global__ void __launch_bounds__(BACKWARD_THREADS, 1)
    queries_kernel(const __grid_constant__ MkaBlockAttentionArgs a, const __grid_constant__ Plan p,
                   const __grid_constant__ QueriesMaps<CUtensorMap> maps, const int tasks) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  // the first warp group plans and fetches; it and the others share 65,536
  constexpr int PLANNER_REGISTERS = 56, OTHER_REGISTERS = 224;
  extern __shared__ __align__(hopper::TILE_ALIGN) unsigned char dynamic[];
  const QueriesLayout<D> shared{dynamic};
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

template <typename T, int D>
__global__ void __launch_bounds__(BACKWARD_THREADS, 1)
    keys_kernel(const __grid_constant__ MkaBlockAttentionArgs a, const __grid_constant__ Plan p,
                const __grid_constant__ KeysMaps<CUtensorMap> maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int PLANNER_REGISTERS = 56, OTHER_REGISTERS = 224;
  extern __shared__ __align__(hopper::TILE_ALIGN) unsigned char dynamic[];
  const KeysLayout<D> shared{dynamic};
  hopper::Gpu gpu;
  if (threadIdx.x == 0) prepare(gpu, shared, a.scale);
  __syncthreads();
  const int index = static_cast<int>(threadIdx.x) / hopper::GROUP - 1;
  if (index < 0) {
    gpu.give_registers<PLANNER_REGISTERS>();
    if (threadIdx.x < 32) {
      KeysFetcher<D, hopper::Gpu> fetcher{gpu, a, p, maps, shared};
      fetcher.run();
    } else if (threadIdx.x < 64) {
      KeysPlanner<D, hopper::Gpu> planner{gpu, a, p, shared};
      planner.run(blockIdx.x, gridDim.x);
    }
  } else {
    gpu.take_registers<OTHER_REGISTERS>();
    Summing<D, 1> registers;
    Summer<T, D, hopper::Gpu> summer{gpu, a, p, shared, index, registers};
    summer.run();
  }
#endif
}

inline hopper::Tensor grad_out(const MkaBlockAttentionArgs& a) {
  return {a.grad_out, a.channels, a.slots, a.heads, a.batch, a.grad_strides[1], a.grad_strides[2], a.grad_strides[0]};
}

template <typename T, int D>
int launch_queries(const MkaBlockAttentionArgs& a, const QueriesMaps<CUtensorMap>& maps, cudaStream_t stream) {
  constexpr int bytes = QueriesLayout<D>::BYTES;
  int device = 0, processors = 0;
  MKA_TRY(cudaGetDevice(&device));
  MKA_TRY(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  MKA_TRY(cudaFuncSetAttribute(queries_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const int tasks = static_cast<int>(query_blocks(a));
  queries_kernel<T, D><<<min(tasks, processors), BACKWARD_THREADS, bytes, stream>>>(a, plan_view(a, true), maps, tasks);
  return launched();
}

template <typename T, int D>
int launch_keys(const MkaBlockAttentionArgs& a, const KeysMaps<CUtensorMap>& maps, cudaStream_t stream) {
  constexpr int bytes = KeysLayout<D>::BYTES;
  int device = 0, processors = 0;
  MKA_TRY(cudaGetDevice(&device));
  MKA_TRY(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  MKA_TRY(cudaFuncSetAttribute(keys_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const Plan p = plan_view(a, true);
  const auto blocks = static_cast<unsigned>(min64(p.item_count, processors));
  keys_kernel<T, D><<<blocks, BACKWARD_THREADS, bytes, stream>>>(a, p, maps);
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

template <typename T, int D>
void keys_block(const MkaBlockAttentionArgs& a, const Plan& p, const KeysMaps<hopper::Tensor>& maps, int block,
                int blocks, bool late) {
  hopper::Board board(KeysLayout<D>::BYTES, late);
  const KeysLayout<D> shared{board.shared};
  memset(static_cast<void*>(board.shared), 0xff, KeysLayout<D>::BYTES);
  hopper::Model first(board);
  prepare(first, shared, a.scale);
  const auto sum = [&](hopper::Model& machine, int index) {
    const auto registers = std::make_unique<Summing<D, hopper::GROUP>>();
    memset(static_cast<void*>(registers.get()), 0xff, sizeof(*registers));
    Summer<T, D, hopper::Model> summer{machine, a, p, shared, index, *registers};
    summer.run();
  };
  hopper::run_roles(board, {[&](hopper::Model& machine) {
                              KeysPlanner<D, hopper::Model> planner{machine, a, p, shared};
                              planner.run(block, blocks);
                            },
                            [&](hopper::Model& machine) {
                              KeysFetcher<D, hopper::Model> fetcher{machine, a, p, maps, shared};
                              fetcher.run();
                            },
                            [&](hopper::Model& machine) { sum(machine, 0); },
                            [&](hopper::Model& machine) { sum(machine, 1); }});
}

template <typename T, int D>
int keys_on_host(const MkaBlockAttentionArgs& a, const hopper::Tensor (&all)[9]) {
  KeysMaps<hopper::Tensor> maps;
  memcpy(&maps, all, sizeof(maps));
  const Plan p = plan_view(a, true);
  const int blocks = static_cast<int>(min64(p.item_count, 3));
  // the gradients, of the call and of the other run: (where, bytes)
  struct Part {
    void* at;
    int64_t bytes;
    std::vector<char> other;
  };
  const int64_t row = a.batch * a.groups * D * 2, rows = halo(a) * a.size + a.slots;
  Part parts[7] = {{a.grad_k, rows * row, {}},
                   {a.grad_v, rows * row, {}},
                   {a.grad_summary_k, a.summaries * row, {}},
                   {a.grad_summary_v, a.summaries * row, {}},
                   {a.grad_page_k, a.pages * a.size * row, {}},
                   {a.grad_page_v, a.pages * a.size * row, {}},
                   {p.partials, p.slots * 2 * a.size * D * 4, {}}};
  try {
    for (const bool late : {true, false}) {
      for (int block = 0; block < blocks; ++block) keys_block<T, D>(a, p, maps, block, blocks, late);
      if (late)
        for (Part& part : parts) part.other.assign(static_cast<char*>(part.at), static_cast<char*>(part.at) + part.bytes);
    }
  } catch (const std::exception& error) {
    fprintf(stderr, "block_attention's model: %s\n", error.what());
    return static_cast<int>(cudaErrorAssert);
  }
  bool same = true;
  for (const Part& part : parts) same = same && (!part.bytes || !memcmp(part.at, part.other.data(), part.bytes));
  return same ? 0 : static_cast<int>(cudaErrorAssert);
}

// The forward's, of grad_out; q and grad_out again, by STEP_ROWS.
inline void backward_tensors(const MkaBlockAttentionArgs& a, hopper::Tensor (&found)[9]) {
  hopper::Tensor forward[7];
  tensors(a, forward);
  for (int i = 0; i < 7; ++i) found[i] = forward[i];
  found[7] = found[0], found[8] = grad_out(a);
  found[7].box = found[8].box = STEP_ROWS;
}

}  // namespace wgmma

bool hopper_backward_possible(const MkaBlockAttentionArgs& a) {
  return wgmma::has_kernel(a) && wgmma::mappable(wgmma::grad_out(a)) && wgmma::on_hopper();
}

int backward_hopper(const MkaBlockAttentionArgs& a, cudaStream_t stream) {
  if (query_blocks(a) == 0) return 0;
  hopper::Tensor by_step[9], whole[8];
  wgmma::backward_tensors(a, by_step);
  for (int i = 0; i < 7; ++i) whole[i] = by_step[i];
  whole[7] = wgmma::grad_out(a);
  wgmma::QueriesMaps<CUtensorMap> queries;
  wgmma::KeysMaps<CUtensorMap> keys;
  CUtensorMap maps[9], whole_maps[8];
  if (const int error = wgmma::encode_all(by_step, a.dtype, maps)) return error;
  if (const int error = wgmma::encode_all(whole, a.dtype, whole_maps)) return error;
  static_assert(sizeof(keys) == sizeof(maps) && sizeof(queries) == sizeof(whole_maps), "the maps follow one another");
  memcpy(&keys, maps, sizeof(keys));
  memcpy(&queries, whole_maps, sizeof(queries));
  const auto launch = [&]() -> int {
#define MKA_CALL(D) wgmma::launch_queries<T, D>(a, queries, stream)
    MKA_HOPPER_DISPATCH(a, MKA_CALL);
#undef MKA_CALL
  };
  if (const int error = launch()) return error;
#define MKA_CALL(D) wgmma::launch_keys<T, D>(a, keys, stream)
  MKA_HOPPER_DISPATCH(a, MKA_CALL);
#undef MKA_CALL
}

int backward_hopper_on_host(const MkaBlockAttentionArgs& a) {
  if (!wgmma::has_kernel(a) || !wgmma::mappable(wgmma::grad_out(a))) return MKA_REFUSED;
  if (query_blocks(a) == 0) return 0;
  const auto queries = [&]() -> int {
#define MKA_CALL(D) wgmma::queries_on_host<T, D>(a)
    MKA_HOPPER_DISPATCH(a, MKA_CALL);
#undef MKA_CALL
  };
  if (const int error = queries()) return error;
  hopper::Tensor all[9];
  wgmma::backward_tensors(a, all);
#define MKA_CALL(D) wgmma::keys_on_host<T, D>(a, all)
  MKA_HOPPER_DISPATCH(a, MKA_CALL);
#undef MKA_CALL
}

}  // namespace block
}  // namespace mka
