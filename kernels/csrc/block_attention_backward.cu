// The backward of block_attention with mma.sync: dQ and the bias from the queries' side, dK and dV from the keys', each
// written by one block in a fixed order; so equal inputs give equal bits.
#include <vector>

#include "mka/block_backward_keys.cuh"
#include "mka/block_launch.cuh"

namespace mka {
namespace block {
namespace backward {

constexpr int WARPS = QUERY_ROWS / 16;
constexpr int TURNS = 4;   // that a block of the keys looks back and ahead over
constexpr int BATCH = 64;  // tiles, or visits, that a block resolves at a time, one per thread

template <int D>
constexpr int tile_bytes = STEP * D * 2;

// ---- dQ ----

// Two tiles of keys and values are in shared memory: one that is worked on while the next one comes.
template <typename T, int D>
__global__ void __launch_bounds__(WARPS * 32, 1) query_kernel(const MkaBlockAttentionArgs a, const Plan p) {
  extern __shared__ __align__(256) unsigned char dynamic[];
  __shared__ Found found[BATCH];
  __shared__ QueryRows kept[WARPS];
  __shared__ Queries queries[WARPS];
  __shared__ KeyList<STEP> list;
  const int warp = threadIdx.x / 32;
  {
    const QueryTile tile = query_tile(a, blockIdx.x);
    if (threadIdx.x == 0) list = key_list<STEP>(a, p, tile.row, tile.group, tile.chunk);
    if (threadIdx.x % 32 == 0) queries[warp] = queries_of(a, p, tile, warp);
  }
  __syncthreads();
  const Queries& q = queries[warp];
  QueryState<D, 1> state;
  begin_queries<T>(state, kept[warp], a, p, q);
  const float scale = static_cast<float>(a.scale) * TO_BASE_2;
  const auto k_of = [&](int t) { return reinterpret_cast<T*>(dynamic + t % 2 * 2 * tile_bytes<D>); };
  const auto v_of = [&](int t) { return reinterpret_cast<T*>(dynamic + (t % 2 * 2 + 1) * tile_bytes<D>); };
  for (int64_t from = 0; from < list.tiles; from += BATCH) {
    const int count = static_cast<int>(min64(BATCH, list.tiles - from));
    __syncthreads();
    if (threadIdx.x < count) found[threadIdx.x] = find<T>(a, p, list, from + threadIdx.x);
    __syncthreads();
    copy_keys<T, D>(k_of(0), v_of(0), found[0], threadIdx.x, WARPS * 32);
    commit();
    for (int t = 0; t < count; ++t) {
      wait<0>();
      __syncthreads();
      query_step<T>(state, kept[warp], k_of(t), v_of(t), found[t], q, scale, [&] {
        if (t + 1 < count && found[t + 1].seen) copy_keys<T, D>(k_of(t + 1), v_of(t + 1), found[t + 1], threadIdx.x, WARPS * 32);
        commit();
      });
    }
  }
  end_queries<T>(state, kept[warp], a, q);
}

template <typename T, int D>
void queries_on_host(const MkaBlockAttentionArgs& a, const Plan& p) {
  std::vector<T> k(STEP * D), v(STEP * D);
  const float scale = static_cast<float>(a.scale) * TO_BASE_2;
  for (int64_t block = 0; block < query_blocks(a); ++block) {
    const QueryTile tile = query_tile(a, block);
    const KeyList<STEP> list = key_list<STEP>(a, p, tile.row, tile.group, tile.chunk);
    std::vector<QueryState<D, 32>> states(WARPS);
    std::vector<QueryRows> kept(WARPS);
    for (int warp = 0; warp < WARPS; ++warp)
      begin_queries<T>(states[warp], kept[warp], a, p, queries_of(a, p, tile, warp));
    for (int64_t t = 0; t < list.tiles; ++t) {
      const Found f = find<T>(a, p, list, t);
      for (int thread = 0; thread < D; ++thread) copy_keys<T, D>(k.data(), v.data(), f, thread, D);
      for (int warp = 0; warp < WARPS; ++warp) {
        const Queries q = queries_of(a, p, tile, warp);
        query_step<T>(states[warp], kept[warp], k.data(), v.data(), f, q, scale, [] {});
      }
    }
    for (int warp = 0; warp < WARPS; ++warp) end_queries<T>(states[warp], kept[warp], a, queries_of(a, p, tile, warp));
  }
}

// ---- dK and dV ----

MKA_HD int32_t key_origin(const MkaBlockAttentionArgs& a, const Plan& p, const Item& item, const Keys& keys, int row) {
  const int64_t number = keys.number + row;
  if (keys.source != SUMMARIES || row >= keys.count || number >= a.chunks) return -1;
  return static_cast<int32_t>(origin(a, p, item.pair / a.groups, number));
}

// A barrier of a warp that hands over and the one that takes.
__device__ __forceinline__ void hand_over(int pair) { asm volatile("bar.arrive %0, 64;" ::"r"(pair + 1) : "memory"); }
__device__ __forceinline__ void take_over(int pair) { asm volatile("bar.sync %0, 64;" ::"r"(pair + 1) : "memory"); }

// C / 16 warps: the first half for dV, the others for dK of the same rows. Two stages are in shared memory: one that is
// worked on while the next one comes.
template <typename T, int D>
__global__ void __launch_bounds__(WARPS * 32, 1) key_kernel(const MkaBlockAttentionArgs args, const Plan plan) {
  extern __shared__ __align__(256) unsigned char dynamic[];
  __shared__ float rows[2][3 * STEP];
  __shared__ Visitor visitors[BATCH];
  __shared__ Turn turns[TURNS];
  __shared__ int32_t origins[16 * WARPS];
  // in shared memory, so that no register is spent on them
  __shared__ MkaBlockAttentionArgs a;
  __shared__ Plan p;
  __shared__ Item item;
  __shared__ Keys keys;
  __shared__ int members, count;
  __shared__ float scale;
  if (plan.items[blockIdx.x].target < 0) return;
  if (threadIdx.x == 0) {
    a = args, p = plan, item = p.items[blockIdx.x];
    keys = target_keys(a, p, item.pair, item.target);
    members = static_cast<int>(a.heads / a.groups);
    scale = static_cast<float>(a.scale) * TO_BASE_2;
  }
  __syncthreads();
  // the 32 rows that a warp has, and its role
  const auto part = [] { return opaque(static_cast<int>(threadIdx.x)) / 32 & (static_cast<int>(blockDim.x) / 64 - 1); };
  const auto values = [] { return threadIdx.x < blockDim.x / 2; };
  if (threadIdx.x < a.size) origins[threadIdx.x] = key_origin(a, p, item, keys, threadIdx.x);
  const auto k_tile = [&](int row) { return reinterpret_cast<T*>(dynamic + 4 * tile_bytes<D>) + row * D; };
  const auto v_tile = [&](int row) { return k_tile(row + static_cast<int>(a.size)); };
  const auto share = [&](int pair) {
    return reinterpret_cast<uint32_t*>(k_tile(2 * static_cast<int>(a.size))) + pair * SHARE;
  };
  {
    const Rows<T> all = rows_of<T>(a, item.pair, keys.source, keys.row);
    copy_rows<T, D>(k_tile(0), all.k, all.k_stride, a.size, keys.count, threadIdx.x, blockDim.x);
    copy_rows<T, D>(v_tile(0), all.v, all.v_stride, a.size, keys.count, threadIdx.x, blockDim.x);
  }
  KeyState<D, 1> state;
  clear(state.grad[0]);
  clear(state.grad[1]);
  const auto stage = [&](int t) {
    return Stage<T>{reinterpret_cast<T*>(dynamic + t % 2 * 2 * tile_bytes<D>), rows[t % 2]};
  };
  const auto copy = [&](int t) { copy_turn<T, D>(stage(t), a, turns[t % TURNS], threadIdx.x, blockDim.x); };
  while (item.begin < item.end) {
    const int thread = threadIdx.x;
    if (thread < BATCH && item.begin + thread < item.end) visitors[thread] = visitor_of<T>(a, p, item, item.begin + thread);
    __syncthreads();
    if (thread == 0) {
      count = static_cast<int>(min64(BATCH, item.end - item.begin));
      item.begin += count;
      turns[0] = turn_from<T>(a, visitors, count, 0, 0, 0);
      turns[1] = turn_after<T>(a, visitors, count, members, turns[0]);
    }
    __syncthreads();
    if (turns[0].tokens > 0) copy(0);
    commit();
    for (int t = 0; turns[t % TURNS].tokens > 0; ++t) {
      wait<0>();
      __syncthreads();
      const auto look_ahead = [&] {
        if (turns[(t + 1) % TURNS].tokens > 0) copy(t + 1);
        commit();
        // four warps take turns in looking two ahead
        if (threadIdx.x == t % 4 * 32)
          turns[(t + 2) % TURNS] = turn_after<T>(a, visitors, count, members, turns[(t + 1) % TURNS]);
      };
      const Turn& now = turns[t % TURNS];
      const int pair = part(), row = 32 * pair;
      if (behind(now, visitors, row))
        look_ahead();
      else if (values())
        value_step<T>(state, share(pair), k_tile(row), stage(t), now, visitors, keys, origins, row, scale,
                      look_ahead, [&] { hand_over(pair); });
      else
        key_step<T>(state, share(pair), v_tile(row), stage(t), look_ahead, [&] { take_over(pair); });
    }
    __syncthreads();
  }
  end_keys<T>(state, a, p, item, keys, 32 * part(), values());
}

template <typename T, int D>
void keys_on_host(const MkaBlockAttentionArgs& a, const Plan& p) {
  std::vector<T> tiles(2 * STEP * D), k(a.size * D), v(a.size * D);
  std::vector<uint32_t> share(SHARE);
  const int pairs = static_cast<int>(a.size / 32), members = static_cast<int>(a.heads / a.groups);
  const float scale = static_cast<float>(a.scale) * TO_BASE_2;
  float rows[3 * STEP];
  int32_t origins[16 * WARPS];
  const Stage<T> stage{tiles.data(), rows};
  const auto nothing = [] {};
  for (int64_t i = 0; i < p.item_count; ++i) {
    const Item item = p.items[i];
    if (item.target < 0) continue;
    const Keys keys = target_keys(a, p, item.pair, item.target);
    for (int row = 0; row < a.size; ++row) origins[row] = key_origin(a, p, item, keys, row);
    std::vector<KeyState<D, 32>> values(pairs), others(pairs);  // zeros
    const Rows<T> all = rows_of<T>(a, item.pair, keys.source, keys.row);
    for (int thread = 0; thread < D; ++thread) {
      copy_rows<T, D>(k.data(), all.k, all.k_stride, a.size, keys.count, thread, D);
      copy_rows<T, D>(v.data(), all.v, all.v_stride, a.size, keys.count, thread, D);
    }
    for (int64_t at = item.begin; at < item.end; ++at) {
      const Visitor visitor = visitor_of<T>(a, p, item, at);
      for (Turn t = turn_from<T>(a, &visitor, 1, 0, 0, 0); t.tokens > 0; t = turn_after<T>(a, &visitor, 1, members, t)) {
        for (int thread = 0; thread < D; ++thread) copy_turn<T, D>(stage, a, t, thread, D);
        for (int pair = 0; pair < pairs; ++pair) {
          const int row = 32 * pair;
          if (behind(t, &visitor, row)) continue;
          value_step<T>(values[pair], share.data(), k.data() + row * D, stage, t, &visitor, keys, origins, row, scale,
                        nothing, nothing);
          key_step<T>(others[pair], share.data(), v.data() + row * D, stage, nothing, nothing);
        }
      }
    }
    for (int pair = 0; pair < pairs; ++pair) {
      end_keys<T>(values[pair], a, p, item, keys, 32 * pair, true);
      end_keys<T>(others[pair], a, p, item, keys, 32 * pair, false);
    }
  }
}

// ---- targets that were split ----

constexpr int REDUCE_THREADS = 256;

MKA_HD int64_t reduce_units(const MkaBlockAttentionArgs& a) { return 2 * a.size * a.channels / 4; }

template <typename T>
__global__ void __launch_bounds__(REDUCE_THREADS) reduce_kernel(const MkaBlockAttentionArgs a, const Plan p) {
  const Reduction r = p.reductions[blockIdx.x];
  if (r.target >= 0) reduce_unit<T>(a, p, r, blockIdx.y * REDUCE_THREADS + threadIdx.x);
}

// ---- all of it ----

template <typename T, int D>
int launch(const MkaBlockAttentionArgs& a, const Plan& p, cudaStream_t stream) {
  const int bytes = 4 * tile_bytes<D>, key_bytes = bytes + static_cast<int>(a.size) * (D + STEP / 4) * 4;
  MKA_TRY(cudaFuncSetAttribute(query_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  MKA_TRY(cudaFuncSetAttribute(key_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, key_bytes));
  query_kernel<T, D><<<static_cast<unsigned>(query_blocks(a)), WARPS * 32, bytes, stream>>>(a, p);
  key_kernel<T, D><<<static_cast<unsigned>(p.item_count), static_cast<unsigned>(a.size * 2), key_bytes, stream>>>(a, p);
  return launched();
}

template <typename T>
int launch_reduce(const MkaBlockAttentionArgs& a, const Plan& p, cudaStream_t stream) {
  if (p.reduction_count) {
    const dim3 grid(static_cast<unsigned>(p.reduction_count), static_cast<unsigned>(reduce_units(a) / REDUCE_THREADS));
    reduce_kernel<T><<<grid, REDUCE_THREADS, 0, stream>>>(a, p);
  }
  return launched();
}

template <typename T, int D>
int on_host(const MkaBlockAttentionArgs& a, const Plan& p) {
  queries_on_host<T, D>(a, p);
  keys_on_host<T, D>(a, p);
  return 0;
}

template <typename T>
int reduce_on_host(const MkaBlockAttentionArgs& a, const Plan& p) {
  for (int64_t i = 0; i < p.reduction_count && p.reductions[i].target >= 0; ++i)
    for (int64_t unit = 0; unit < reduce_units(a); ++unit) reduce_unit<T>(a, p, p.reductions[i], unit);
  return 0;
}

#define MKA_BLOCK_DISPATCH(a, call)                           \
  do {                                                        \
    if ((a).dtype == MKA_BF16) {                              \
      using T = __nv_bfloat16;                                \
      if ((a).channels == 64) return call(64);                \
      if ((a).channels == 128) return call(128);              \
    } else if ((a).dtype == MKA_FP16) {                       \
      using T = __half;                                       \
      if ((a).channels == 64) return call(64);                \
      if ((a).channels == 128) return call(128);              \
    }                                                         \
    return MKA_REFUSED;                                       \
  } while (false)

}  // namespace backward

int backward_mma(const MkaBlockAttentionArgs& a, cudaStream_t stream) {
  const Plan p = plan_view(a, true);
#define MKA_CALL(D) backward::launch<T, D>(a, p, stream)
  MKA_BLOCK_DISPATCH(a, MKA_CALL);
#undef MKA_CALL
}

int backward_reduce(const MkaBlockAttentionArgs& a, cudaStream_t stream) {
  const Plan p = plan_view(a, true);
  return a.dtype == MKA_BF16 ? backward::launch_reduce<__nv_bfloat16>(a, p, stream)
                             : backward::launch_reduce<__half>(a, p, stream);
}

}  // namespace block
}  // namespace mka

int mka_block_attention_backward(const MkaBlockAttentionArgs* args, void* stream) {
  using namespace mka::block;
  const MkaBlockAttentionArgs& a = *args;
  if (!possible(a)) return MKA_REFUSED;
  const bool hopper = a.kernel != 1 && hopper_backward_possible(a);
  if (a.kernel == 2 && !hopper) return MKA_REFUSED;
  if (a.batch == 0 || a.slots == 0) return 0;
  const cudaStream_t at = static_cast<cudaStream_t>(stream);
  int failed = enqueue_plan(a, true, at);
  if (!failed) failed = hopper ? backward_hopper(a, at) : backward_mma(a, at);
  return failed ? failed : backward_reduce(a, at);
}

int mka_host_block_attention_backward(const MkaBlockAttentionArgs* args) {
  using namespace mka::block;
  const MkaBlockAttentionArgs& a = *args;
  if (!possible(a)) return MKA_REFUSED;
  plan_on_host(a, true);
  const Plan p = plan_view(a, true);
  const auto products = [&]() -> int {
    if (a.kernel == 2) return backward_hopper_on_host(a);
#define MKA_CALL(D) backward::on_host<T, D>(a, p)
    MKA_BLOCK_DISPATCH(a, MKA_CALL);
#undef MKA_CALL
  };
  if (const int failed = products()) return failed;
  return a.dtype == MKA_BF16 ? backward::reduce_on_host<__nv_bfloat16>(a, p) : backward::reduce_on_host<__half>(a, p);
}
