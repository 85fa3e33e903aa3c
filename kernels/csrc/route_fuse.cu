// FastMKA's fusion, forward and backward: the kernels around the phases of route_fuse_tile.cuh.
//
// Forward: x is read and y written once; the maps and states between tiles are 2/(chunk) of that and stay in L2.
// Backward: x, grad_y are read and grad_x written once; states are recomputed from those that the forward kept, and
// the products of the gate's gradient go through 8 bytes per token and tile.
#include "mka/route_fuse_launch.cuh"

namespace mka {
namespace route_fuse {
namespace {

__device__ uint32_t acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
__device__ void release(uint32_t* flag) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(1u) : "memory");
}

// A warp owns 32 channels of a tile and a flag for them: no barrier of the block is needed to publish or to wait.
__device__ void publish(const Workspace& w, const Plan& p, int ticket, int c, const Map& m) {
  __stcg(reinterpret_cast<float2*>(w.links) + static_cast<int64_t>(ticket) * p.width + c, make_float2(m.a, m.b));
  __threadfence();
  __syncwarp();
  if (c % 32 == 0) release(w.flags + static_cast<int64_t>(ticket) * (p.width / 32) + c / 32);
}
__device__ void wait_for(const Workspace& w, const Plan& p, const Tile& t, int begin, int end, int c) {
  int order = begin + c % 32;
  if (order < end) {
    const uint32_t* flag = w.flags + ticket_of(p, t, order) * (p.width / 32) + c / 32;
    while (acquire(flag) == 0) {
    }
  }
  __syncwarp();
}
__device__ Map published(const Workspace& w, const Plan& p, const Tile& t, int order, int c) {
  float2 link = __ldcg(reinterpret_cast<const float2*>(w.links) + ticket_of(p, t, order) * p.width + c);
  return {link.x, link.y};
}

// The state that arrives at a tile, whose own map is `own`; publishes what later tiles need of it.
__device__ float look_back(const Workspace& w, const Plan& p, const Tile& t, int ticket, int c, const Map& own,
                           float initial) {
  bool gives = publishes(p, t.order), state = publishes_state(t.order);
  if (gives && !state) publish(w, p, ticket, c, own);
  int begin = link_begin(t.order);
  wait_for(w, p, t, begin, t.order, c);
  Map m{1.0f, 0.0f};
  for (int order = begin; order < t.order; ++order) m = then(m, published(w, p, t, order, c));
  float s = initial;
  if (begin > 0) {
    wait_for(w, p, t, begin - 1, begin, c);
    s = published(w, p, t, begin - 1, c).b;
  }
  s = apply(m, s);
  if (gives && state) publish(w, p, ticket, c, {0.0f, apply(own, s)});
  return s;
}

// Blocks take tiles in the order of their arrival, so that all that a tile waits for is running or done.
struct Job {
  int ticket;
  Tile tile;
};
__device__ void take(Job& job, const Workspace& w, const Plan& p, bool reverse) {
  if (threadIdx.x == 0) {
    job.ticket = static_cast<int>(atomicAdd(w.counter, 1u));
    job.tile = tile_of(p, job.ticket, reverse);
  }
  __syncthreads();
}

// The job stays in shared memory, and every phase finds its place and its decays again: between barriers the registers
// hold the elements and little else.
template <class Geo>
__global__ void __launch_bounds__(kThreads, 3) forward_kernel(RouteFuseArgs g, Plan p, Workspace w) {
  __shared__ Shared<Geo> sh;
  __shared__ Job job;
  int thread = threadIdx.x;
  take(job, w, p, false);
  const Tile& t = job.tile;
  Raw x[Geo::Steps], m[Geo::L3 ? Geo::Steps : 1];
  {
    Place<Geo> at(p, t, thread);
    load_slots(x, g.x[t.stream], g.x_strides, t, at);
    if constexpr (Geo::L3) load_slots(m, g.long_term[t.stream], at);
  }
  gate_phase(sh, g, t, thread);
  __syncthreads();
  if (g.decay[0] != nullptr) {
    {
      Place<Geo> at(p, t, thread);
      float decay[Geo::Vector];
      load_decay(decay, g.decay[t.stream], at);
      map_phase(sh, x, decay, at);
    }
    __syncthreads();
    if (thread < Geo::Width) forward_column(sh, g, p, t, thread, [&](const Map& own, float initial) {
      return look_back(w, p, t, job.ticket, thread, own, initial);
    });
    __syncthreads();
  } else {
    no_scan_phase(sh, Place<Geo>(p, t, thread));
  }
  Place<Geo> at(p, t, thread);
  float decay[Geo::Vector];
  load_decay(decay, g.decay[t.stream], at);
  mix_phase(sh, x, Geo::L3 ? m : nullptr, decay, g.y[t.stream], at);
}

template <class Geo>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(RouteFuseArgs g, Plan p, Workspace w) {
  __shared__ BackwardShared<Geo> sh;
  __shared__ Job job;
  int thread = threadIdx.x;
  take(job, w, p, true);
  const Tile& t = job.tile;
  Raw x[Geo::Steps], grad[Geo::Steps];
  {
    Place<Geo> at(p, t, thread);
    load_slots(grad, g.grad_y[t.stream], g.grad_strides, t, at);
    load_slots(x, g.x[t.stream], g.x_strides, t, at);
  }
  gate_phase(sh, g, t, thread);
  __syncthreads();
  if (g.decay[0] != nullptr) {
    {
      Place<Geo> at(p, t, thread);
      float decay[Geo::Vector];
      load_decay(decay, g.decay[t.stream], at);
      map_phase(sh, x, decay, at);
      adjoint_phase(sh, grad, decay, at);
    }
    __syncthreads();
    if (thread < Geo::Width) backward_column(sh, g, p, t, thread, [&](const Map& own, float initial) {
      return look_back(w, p, t, job.ticket, thread, own, initial);
    });
    __syncthreads();
  } else {
    no_scan_phase(sh, Place<Geo>(p, t, thread));
  }
  {
    Place<Geo> at(p, t, thread);
    float decay[Geo::Vector], slope[Geo::Vector];
    load_decay(decay, g.decay[t.stream], at);
    auto keep = [&](int slot, float dot2, float dot3) {
#pragma unroll
      for (int by = Geo::Lanes / 2; by > 0; by /= 2) {
        dot2 += __shfl_xor_sync(0xffffffffu, dot2, by);
        if (Geo::L3) dot3 += __shfl_xor_sync(0xffffffffu, dot3, by);
      }
      if (at.lane == 0) keep_dots(sh, at.row * Geo::Steps + slot, dot2, dot3);
    };
    product_phase(sh, x, grad, Geo::L3 ? g.long_term[t.stream] : nullptr, decay, at, slope, keep);
    keep_slope(sh, slope, at);
  }
  __syncthreads();
  {
    Place<Geo> at(p, t, thread);
    float decay[Geo::Vector];
    load_decay(decay, g.decay[t.stream], at);
    gradient_phase(sh, grad, decay, g.grad_x[t.stream], Geo::L3 ? g.grad_long_term[t.stream] : nullptr, at);
  }
  partials_phase(sh, g, p, t, w.parts, thread);
}

__global__ void __launch_bounds__(kThreads) gate_kernel(RouteFuseArgs g, Plan p, Partials parts) {
  __shared__ float sums[kThreads];
  int64_t which = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  sums[threadIdx.x] = which < routes_of(g) ? gate_gradient(g, p, parts, which) : 0.0f;
  for (int by = kThreads / 2; by > 0; by /= 2) {
    __syncthreads();
    if (threadIdx.x < by) sums[threadIdx.x] += sums[threadIdx.x + by];
  }
  if (threadIdx.x == 0) parts.beta[blockIdx.x] = sums[0];
}

// Block (column * width / 32 + i): 32 channels of the decay's gradient; the last block: beta's.
__global__ void __launch_bounds__(kFinish) finish_kernel(RouteFuseArgs g, Plan p, Partials parts) {
  __shared__ float sums[kFinish];
  int thread = threadIdx.x;
  Finish f = finish_at(blockIdx.x == slope_blocks(g, p), p, blockIdx.x, thread);
  sums[thread] = finish_part(g, p, parts, f);
  for (int by = kFinish / 2; by >= f.least; by /= 2) {
    __syncthreads();
    if (thread < by) sums[thread] += sums[thread + by];
  }
  __syncthreads();
  if (thread < f.least) finish_store(g, p, f, sums[thread]);
}

template <class Geo>
int run_forward(const RouteFuseArgs& g, const Plan& p, cudaStream_t stream) {
  Workspace w = workspace_of(g, p, false);
  MKA_TRY(cudaMemsetAsync(w.counter, 0, w.cleared, stream));
  dim3 grid(static_cast<unsigned>(p.tiles));
  forward_kernel<Geo><<<grid, kThreads, 0, stream>>>(g, p, w);
  return launched();
}

template <class Geo>
int run_backward(const RouteFuseArgs& g, const Plan& p, cudaStream_t stream) {
  Workspace w = workspace_of(g, p, true);
  MKA_TRY(cudaMemsetAsync(w.counter, 0, w.cleared, stream));
  dim3 grid(static_cast<unsigned>(p.tiles));
  backward_kernel<Geo><<<grid, kThreads, 0, stream>>>(g, p, w);
  gate_kernel<<<static_cast<unsigned>(gate_blocks(g)), kThreads, 0, stream>>>(g, p, w.parts);
  finish_kernel<<<static_cast<unsigned>(finish_blocks(g, p)), kFinish, 0, stream>>>(g, p, w.parts);
  return launched();
}

}  // namespace
}  // namespace route_fuse
}  // namespace mka

using namespace mka::route_fuse;

int mka_route_fuse_forward(const RouteFuseArgs* args, void* stream) {
  if (!supported(*args, false)) return MKA_REFUSED;
  MKA_ROUTE_FUSE_DISPATCH(*args, run_forward, static_cast<cudaStream_t>(stream));
}

int mka_route_fuse_backward(const RouteFuseArgs* args, void* stream) {
  if (!supported(*args, true)) return MKA_REFUSED;
  MKA_ROUTE_FUSE_DISPATCH(*args, run_backward, static_cast<cudaStream_t>(stream));
}
