// The forward of block_attention on the tensor cores through mma.sync.
//
// A block has 128 packed query rows of a (row, KV head, chunk) and goes through the chunk's list of key tiles, which it
// resolves 128 at a time; keys and values come through cp.async while the tile before them is multiplied. Where shared
// memory has room for one tile only, two blocks a processor assumed, the values come while the keys are multiplied.
#include <memory>

#include "mka/block_launch.cuh"
#include "mka/block_tile.cuh"

namespace mka {
namespace block {
namespace forward {

constexpr int WARPS = QUERY_ROWS / WARP_ROWS;
constexpr int THREADS = WARPS * 32;
constexpr int BATCH = THREADS;  // tiles that are resolved at a time, one per thread
template <int D>
constexpr int BLOCKS = D == 64 ? 3 : 2;  // of a processor, as far as registers go

// What a block does.
struct Task {
  QueryTile at;
  int64_t tokens;
  KeyList<KEY_ROWS> list;

  Task() = default;
  MKA_HD Task(const MkaBlockAttentionArgs& a, const Plan& p, int64_t block) {
    at = query_tile(a, block);
    tokens = query_tokens(a, p, at.row, at.chunk);
    list = key_list<KEY_ROWS>(a, p, at.row, at.group, at.chunk);
  }
};

// A block's shared memory; of the stages, the last member, the first may be the only one.
template <typename T, int D>
struct Shared {
  alignas(256) T q[QUERY_ROWS * D];
  float bias[LEVELS * QUERY_ROWS];
  Found found[BATCH];
  Task task;
  struct Stage {
    alignas(256) T k[KEY_ROWS * D];
    alignas(256) T v[KEY_ROWS * D];
  } stages[2];

  static constexpr int bytes(int stages) { return sizeof(Shared) - (2 - stages) * sizeof(Stage); }
};

// Where a warp's rows stand in their chunk: from slot `slot` on.
struct WarpRows {
  int slot;  // so far before the chunk that they see nothing where all are padding

  MKA_HD WarpRows(const MkaBlockAttentionArgs& a, const Task& task, int first) {
    slot = first & (static_cast<int>(a.size) - 1);
    if (slot >= task.tokens || task.at.first + first >= a.heads / a.groups * a.size) slot = -KEY_ROWS - WARP_ROWS;
  }
  MKA_HD bool misses(const Found& f) const { return f.from > slot + WARP_ROWS - 1; }
  MKA_HD bool partly(const Found& f) const { return ~f.seen || f.from + KEY_ROWS - 1 > slot; }
};

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, BLOCKS<D>)
    forward_kernel(const MkaBlockAttentionArgs a, const Plan p, const int stages) {
  extern __shared__ __align__(256) unsigned char dynamic[];
  Shared<T, D>& sh = *reinterpret_cast<Shared<T, D>*>(dynamic);
  const Task& task = sh.task;
  if (threadIdx.x == 0) sh.task = Task(a, p, blockIdx.x);
  __syncthreads();
  const auto first = [] { return opaque(threadIdx.x) / WARP_ROWS * WARP_ROWS; };
  const WarpRows mine(a, task, first());
  const float scale = static_cast<float>(a.scale) * LOG2E;
  const auto copy_k = [&](const Found& f, int stage) {
    copy_keys<T, D, THREADS>(sh.stages[stage].k, f.k, f.k_stride, f.seen, threadIdx.x);
  };
  const auto copy_v = [&](const Found& f, int stage) {
    copy_keys<T, D, THREADS>(sh.stages[stage].v, f.v, f.v_stride, f.seen, threadIdx.x);
  };

  copy_queries<T, D>(sh.q, a.q, a.q_strides, a, task.at, task.tokens, threadIdx.x, THREADS);
  commit();
  copy_bias(sh.bias, a, task.at, task.tokens, threadIdx.x, THREADS);
  State<D, 1> state;
  clear(state);
  int stage = 0;
  for (int from = 0; from < task.list.tiles; from += BATCH) {
    const int count = static_cast<int>(min64(BATCH, task.list.tiles - from));
    __syncthreads();
    if (threadIdx.x < count) sh.found[threadIdx.x] = find<T>(a, p, task.at, task.list, from + threadIdx.x);
    __syncthreads();
    int t = next_tile(sh.found, 0, count), ahead = next_tile(sh.found, t + 1, count);
    if (t < count) {
      copy_k(sh.found[t], stage);
      if (stages > 1) copy_v(sh.found[t], stage);
      commit();
    }
    while (t < count) {
      const int later = stages > 1 ? stage ^ 1 : stage;
      const Found& f = sh.found[t];
      wait<0>();
      __syncthreads();
      if (stages == 1) {
        copy_v(f, stage);
      } else if (ahead < count) {
        copy_k(sh.found[ahead], later);
        copy_v(sh.found[ahead], later);
      }
      commit();
      const bool misses = mine.misses(f);
      float s[2][KEY_ROWS / 8][1][4];
      if (!misses) multiply<T, D, 1>(s, sh.q, sh.stages[stage].k, first());
      const int after = next_tile(sh.found, ahead + 1, count);
      if (stages == 1) {
        wait<0>();
        __syncthreads();
        if (ahead < count) copy_k(sh.found[ahead], stage);
        commit();
      }
      if (!misses) {
        if (mine.partly(f)) hide<1>(s, f.seen, f.from, mine.slot);
        accumulate<T, D, 1>(state, s, sh.stages[stage].v, sh.bias + f.level * QUERY_ROWS + first(), scale);
      }
      t = ahead, ahead = after, stage = later;
    }
  }
  wait<0>();
  __syncthreads();
  keep<T, D, 1>(state, sh.q, a, task.at, task.tokens, first());
}

// forward_kernel, a block after the other, between barriers a warp after the other; blocks with one stage and with two
// by turns.
template <typename T, int D>
void run_on_host(const MkaBlockAttentionArgs& a, const Plan& p) {
  struct Warp {
    State<D, 32> state;
    Scores<32> s;
  };
  const std::unique_ptr<Shared<T, D>> memory(new Shared<T, D>);
  Shared<T, D>& sh = *memory;
  const std::unique_ptr<Warp[]> warps(new Warp[WARPS]);
  const float scale = static_cast<float>(a.scale) * LOG2E;
  for (int64_t block = 0; block < query_blocks(a); ++block) {
    const int stages = 1 + block % 2;
    const Task task = sh.task = Task(a, p, block);
    const auto copy_k = [&](const Found& f, int stage) {
      for (int thread = 0; thread < THREADS; ++thread)
        copy_keys<T, D, THREADS>(sh.stages[stage].k, f.k, f.k_stride, f.seen, thread);
    };
    const auto copy_v = [&](const Found& f, int stage) {
      for (int thread = 0; thread < THREADS; ++thread)
        copy_keys<T, D, THREADS>(sh.stages[stage].v, f.v, f.v_stride, f.seen, thread);
    };
    for (int thread = 0; thread < THREADS; ++thread) {
      copy_queries<T, D>(sh.q, a.q, a.q_strides, a, task.at, task.tokens, thread, THREADS);
      copy_bias(sh.bias, a, task.at, task.tokens, thread, THREADS);
    }
    for (int warp = 0; warp < WARPS; ++warp) clear(warps[warp].state);
    int stage = 0;
    for (int64_t from = 0; from < task.list.tiles; from += BATCH) {
      const int count = static_cast<int>(min64(BATCH, task.list.tiles - from));
      for (int thread = 0; thread < count; ++thread) sh.found[thread] = find<T>(a, p, task.at, task.list, from + thread);
      int t = next_tile(sh.found, 0, count);
      if (t < count) {
        copy_k(sh.found[t], stage);
        if (stages > 1) copy_v(sh.found[t], stage);
      }
      while (t < count) {
        const int ahead = next_tile(sh.found, t + 1, count), later = stages > 1 ? stage ^ 1 : stage;
        const Found& f = sh.found[t];
        if (stages == 1) {
          copy_v(f, stage);
        } else if (ahead < count) {
          copy_k(sh.found[ahead], later);
          copy_v(sh.found[ahead], later);
        }
        for (int warp = 0; warp < WARPS; ++warp) {
          const WarpRows mine(a, task, warp * WARP_ROWS);
          if (!mine.misses(f)) multiply<T, D, 32>(warps[warp].s, sh.q, sh.stages[stage].k, warp * WARP_ROWS);
        }
        if (stages == 1 && ahead < count) copy_k(sh.found[ahead], stage);
        for (int warp = 0; warp < WARPS; ++warp) {
          const WarpRows mine(a, task, warp * WARP_ROWS);
          if (mine.misses(f)) continue;
          if (mine.partly(f)) hide<32>(warps[warp].s, f.seen, f.from, mine.slot);
          accumulate<T, D, 32>(warps[warp].state, warps[warp].s, sh.stages[stage].v,
                               sh.bias + f.level * QUERY_ROWS + warp * WARP_ROWS, scale);
        }
        t = ahead, stage = later;
      }
    }
    for (int warp = 0; warp < WARPS; ++warp)
      keep<T, D, 32>(warps[warp].state, sh.q, a, task.at, task.tokens, warp * WARP_ROWS);
  }
}

template <typename T, int D>
int launch(const MkaBlockAttentionArgs& a, cudaStream_t stream) {
  int device, room, most;
  MKA_TRY(cudaGetDevice(&device));
  MKA_TRY(cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  MKA_TRY(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const int stages = 2 * (Shared<T, D>::bytes(2) + 1024) <= room ? 2 : 1;  // a block takes 1 KB more than it asks for
  const int bytes = Shared<T, D>::bytes(stages);
  if (bytes > most || query_blocks(a) > INT32_MAX) return MKA_REFUSED;
  MKA_TRY(cudaFuncSetAttribute(forward_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  MKA_TRY(cudaFuncSetAttribute(forward_kernel<T, D>, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared));
  const unsigned blocks = static_cast<unsigned>(query_blocks(a));
  forward_kernel<T, D><<<blocks, THREADS, bytes, stream>>>(a, plan_view(a, false), stages);
  return launched();
}

}  // namespace forward

int forward_mma(const MkaBlockAttentionArgs& a, cudaStream_t stream) {
  using forward::launch;
  if (a.dtype == MKA_BF16)
    return a.channels == 64 ? launch<__nv_bfloat16, 64>(a, stream) : launch<__nv_bfloat16, 128>(a, stream);
  return a.channels == 64 ? launch<__half, 64>(a, stream) : launch<__half, 128>(a, stream);
}

}  // namespace block
}  // namespace mka

int mka_block_attention_forward(const MkaBlockAttentionArgs* args, void* stream) {
  const MkaBlockAttentionArgs& a = *args;
  if (!mka::block::possible(a)) return MKA_REFUSED;
  const bool hopper = a.kernel != 1 && mka::block::hopper_forward_possible(a);
  if (a.kernel == 2 && !hopper) return MKA_REFUSED;
  if (a.batch == 0 || a.slots == 0) return 0;
  const cudaStream_t at = static_cast<cudaStream_t>(stream);
  const int failed = mka::block::enqueue_plan(a, false, at);
  if (failed) return failed;
  return hopper ? mka::block::forward_hopper(a, at) : mka::block::forward_mma(a, at);
}

int mka_host_block_attention_forward(const MkaBlockAttentionArgs* args) {
  using namespace mka::block;
  using forward::run_on_host;
  const MkaBlockAttentionArgs& a = *args;
  if (!possible(a)) return MKA_REFUSED;
  if (a.batch == 0 || a.slots == 0) return 0;
  if (a.kernel == 2) return forward_hopper_on_host(a);
  plan_on_host(a, false);
  const Plan p = plan_view(a, false);
  if (a.dtype == MKA_BF16)
    a.channels == 64 ? run_on_host<__nv_bfloat16, 64>(a, p) : run_on_host<__nv_bfloat16, 128>(a, p);
  else
    a.channels == 64 ? run_on_host<__half, 64>(a, p) : run_on_host<__half, 128>(a, p);
  return 0;
}
