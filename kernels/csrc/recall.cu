// The recall's kernels, their twins on the CPU, and the entry points. What threads do is in mka/recall.cuh.
#include "mka/recall.cuh"

#include <memory>
#include <vector>

using namespace mka;
using namespace mka::recall;

namespace {

// The block's code from its total: a warp makes 32 bits at a time.
template <int D>
__device__ __forceinline__ void write_code(
    const int64_t* total, const int8_t* planes, int64_t words, int64_t* code) {
  for (int64_t plane = threadIdx.x; plane < 64 * words; plane += THREADS) {
    const uint32_t bits = __ballot_sync(0xffffffffu, plane_side<D>(total, planes, plane));
    if (plane % WARP == 0) reinterpret_cast<uint32_t*>(code)[plane / WARP] = bits;
  }
}

template <int D>
void host_write_code(const int64_t* total, const int8_t* planes, int64_t words, int64_t* code) {
  for (int64_t plane = 0; plane < 64 * words; plane += WARP) {
    uint32_t bits = 0;
    for (int lane = 0; lane < WARP; ++lane) {
      bits |= static_cast<uint32_t>(plane_side<D>(total, planes, plane + lane)) << lane;
    }
    reinterpret_cast<uint32_t*>(code)[plane / WARP] = bits;
  }
}

MKA_HD int64_t code_offset(const Place& at, int64_t chunks, int64_t groups, int64_t words) {
  return ((at.row * chunks + at.chunk) * groups + at.group) * words;
}

// 16 tokens of a thread need more registers than two blocks on an SM leave.
template <typename T, int D, int C>
__global__ void __launch_bounds__(THREADS, C / Layout<D>::ROWS > 8 ? 1 : 2) pool_kernel(const MkaRecallPoolArgs a) {
  __shared__ PoolShared<D> s;
  const Place at = place_of(blockIdx.x, a.chunks, a.groups);
  pool_rows<T, D, C>(a, at, threadIdx.x, s);
  __syncthreads();
  pool_columns<T, D>(a, at, threadIdx.x, s);
  if (a.planes == nullptr) return;
  __syncthreads();
  write_code<D>(s.total, a.planes, a.words, a.codes + code_offset(at, a.chunks, a.groups, a.words));
}

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 2) queries_kernel(const MkaRecallQueriesArgs a) {
  __shared__ QueriesShared<D> s;
  const Place at = place_of(blockIdx.x, a.chunks, a.groups);
  queries_find<D>(a, at, threadIdx.x, s);
  __syncthreads();
  queries_rows<T, D>(a, at, threadIdx.x, s);
  __syncthreads();
  queries_columns<D>(a, at, threadIdx.x, s);
  if (a.planes == nullptr) return;
  __syncthreads();
  write_code<D>(s.total, a.planes, a.words, a.codes + code_offset(at, a.chunks, a.groups, a.words));
}

__global__ void __launch_bounds__(SELECT_WARPS * WARP) select_kernel(const MkaRecallSelectArgs a) {
  extern __shared__ int histograms[];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int bins = static_cast<int>(64 * a.words / a.tables) + 1;
  int* counts = histograms + warp * bins;
  const Task task = select_task(blockIdx.x, warp, a.batch, a.groups, a.count);
  if (task.item < 0) return;
  const int64_t end = candidate_end(a.first, task.item, a.window, a.stored, a.total);
  const int64_t own = a.documents[task.row * a.total + a.first + task.item];
  for (int bin = lane; bin < bins; bin += WARP) counts[bin] = 0;
  __syncwarp();
#pragma unroll 4
  for (int64_t number = lane; number < end; number += WARP) {
    const int far = candidate_distance(a, task, own, number);
    if (far >= 0) atomicAdd(counts + far, 1);
  }
  __syncwarp();
  const Cut cut = cut_of(counts, bins, a.recalled);
  int64_t* found = a.found + ((task.row * a.count + task.item) * a.groups + task.group) * a.recalled;
  Taken taken = {0, 0};
  for (int64_t begin = 0; begin < end && taken.found < a.recalled; begin += WARP) {
    const int64_t number = begin + lane;
    const int far = number < end ? candidate_distance(a, task, own, number) : -1;
    const uint32_t nearer = __ballot_sync(0xffffffffu, far >= 0 && far < cut.distance);
    const uint32_t equal = __ballot_sync(0xffffffffu, far == cut.distance);
    const int64_t to = place_in_list(taken, cut, nearer, equal, lane);
    if (to >= 0) found[to] = number;
    taken = taken_after(taken, cut, nearer, equal);
  }
  for (int64_t to = taken.found + lane; to < a.recalled; to += WARP) found[to] = -1;
}

template <typename T, int D, int C>
void host_pool(const MkaRecallPoolArgs& a) {
  auto s = std::make_unique<PoolShared<D>>();
  for (int64_t block = 0; block < a.batch * a.chunks * a.groups; ++block) {
    const Place at = place_of(block, a.chunks, a.groups);
    for (int thread = 0; thread < THREADS; ++thread) pool_rows<T, D, C>(a, at, thread, *s);
    for (int thread = 0; thread < THREADS; ++thread) pool_columns<T, D>(a, at, thread, *s);
    if (a.planes == nullptr) continue;
    host_write_code<D>(s->total, a.planes, a.words, a.codes + code_offset(at, a.chunks, a.groups, a.words));
  }
}

template <typename T, int D>
void host_queries(const MkaRecallQueriesArgs& a) {
  auto s = std::make_unique<QueriesShared<D>>();
  for (int64_t block = 0; block < a.batch * a.chunks * a.groups; ++block) {
    const Place at = place_of(block, a.chunks, a.groups);
    for (int thread = 0; thread < THREADS; ++thread) queries_find<D>(a, at, thread, *s);
    for (int thread = 0; thread < THREADS; ++thread) queries_rows<T, D>(a, at, thread, *s);
    for (int thread = 0; thread < THREADS; ++thread) queries_columns<D>(a, at, thread, *s);
    if (a.planes == nullptr) continue;
    host_write_code<D>(s->total, a.planes, a.words, a.codes + code_offset(at, a.chunks, a.groups, a.words));
  }
}

void host_select(const MkaRecallSelectArgs& a, const Task& task) {
  const int bins = static_cast<int>(64 * a.words / a.tables) + 1;
  const int64_t end = candidate_end(a.first, task.item, a.window, a.stored, a.total);
  const int64_t own = a.documents[task.row * a.total + a.first + task.item];
  std::vector<int> counts(bins, 0);
  for (int64_t number = 0; number < end; ++number) {
    const int far = candidate_distance(a, task, own, number);
    if (far >= 0) ++counts[far];
  }
  const Cut cut = cut_of(counts.data(), bins, a.recalled);
  int64_t* found = a.found + ((task.row * a.count + task.item) * a.groups + task.group) * a.recalled;
  Taken taken = {0, 0};
  for (int64_t begin = 0; begin < end && taken.found < a.recalled; begin += WARP) {
    uint32_t nearer = 0, equal = 0;
    for (int lane = 0; lane < WARP && begin + lane < end; ++lane) {
      const int far = candidate_distance(a, task, own, begin + lane);
      nearer |= static_cast<uint32_t>(far >= 0 && far < cut.distance) << lane;
      equal |= static_cast<uint32_t>(far == cut.distance) << lane;
    }
    for (int lane = 0; lane < WARP; ++lane) {
      const int64_t to = place_in_list(taken, cut, nearer, equal, lane);
      if (to >= 0) found[to] = begin + lane;
    }
    taken = taken_after(taken, cut, nearer, equal);
  }
  for (int64_t to = taken.found; to < a.recalled; ++to) found[to] = -1;
}

constexpr int64_t MAX_GRID = 2147483647;

// Strides of whole 16 bytes, that of slots in 31 bits.
bool whole(const int64_t (&strides)[3], int64_t dtype) {
  const int64_t vector = dtype == MKA_FP32 ? 4 : 8;
  return strides[1] >= 0 && strides[1] <= INT32_MAX && strides[0] % vector == 0 && strides[1] % vector == 0 && strides[2] % vector == 0;
}

bool pool_refused(const MkaRecallPoolArgs& a) {
  const bool alone = (a.planes == nullptr) != (a.codes == nullptr) || (a.v == nullptr) != (a.v_mean == nullptr);
  return alone || a.chunks != ceil_div(a.slots, a.size) || !aligned(a.k, 16) || !aligned(a.v, 16) ||
         !whole(a.k_strides, a.dtype) || (a.v != nullptr && !whole(a.v_strides, a.dtype)) || !aligned(a.planes, 16) ||
         a.batch * a.chunks * a.groups > MAX_GRID || a.centre_dtype < MKA_FP32 ||
         a.centre_dtype > MKA_FP16;
}

bool queries_refused(const MkaRecallQueriesArgs& a) {
  return (a.planes == nullptr) != (a.codes == nullptr) || a.chunks != ceil_div(a.slots, a.size) ||
         a.groups < 1 || a.heads % a.groups != 0 || !aligned(a.q, 16) || !whole(a.q_strides, a.dtype) || !aligned(a.planes, 16) ||
         a.batch * a.chunks * a.groups > MAX_GRID;
}

// 1024 bits in a table: 32.8 KB of counts in a block.
bool select_refused(const MkaRecallSelectArgs& a) {
  return a.tables < 1 || a.words < 1 || a.words % a.tables != 0 || a.words / a.tables > 16 || a.window < 1 ||
         a.first < 0 || a.first + a.count > a.total || select_blocks(a.batch, a.groups, a.count) > MAX_GRID;
}

}  // namespace

// Runs the statement with D, and C, as constants.
#define RECALL_CHANNELS(channels, D, ...)    \
  switch (channels) {                        \
    case 64: {                               \
      constexpr int D = 64;                  \
      __VA_ARGS__;                           \
      break;                                 \
    }                                        \
    case 128: {                              \
      constexpr int D = 128;                 \
      __VA_ARGS__;                           \
      break;                                 \
    }                                        \
    case 256: {                              \
      constexpr int D = 256;                 \
      __VA_ARGS__;                           \
      break;                                 \
    }                                        \
    default:                                 \
      return MKA_REFUSED;                    \
  }
#define RECALL_SIZE(size, C, ...)            \
  switch (size) {                            \
    case 64: {                               \
      constexpr int C = 64;                  \
      __VA_ARGS__;                           \
      break;                                 \
    }                                        \
    case 128: {                              \
      constexpr int C = 128;                 \
      __VA_ARGS__;                           \
      break;                                 \
    }                                        \
    default:                                 \
      return MKA_REFUSED;                    \
  }

int mka_recall_pool(const MkaRecallPoolArgs* args, void* stream) {
  const MkaRecallPoolArgs& a = *args;
  if (a.size < 1 || pool_refused(a)) return MKA_REFUSED;
  const int64_t blocks = a.batch * a.chunks * a.groups;
  const auto on = static_cast<cudaStream_t>(stream);
  if (blocks == 0) return 0;
  MKA_DISPATCH_DTYPE(a.dtype, T, RECALL_CHANNELS(a.channels, D, RECALL_SIZE(a.size, C, (pool_kernel<T, D, C>
      <<<static_cast<unsigned>(blocks), THREADS, 0, on>>>(a)))))
  return launched();
}

int mka_recall_queries(const MkaRecallQueriesArgs* args, void* stream) {
  const MkaRecallQueriesArgs& a = *args;
  if (a.size < 1 || queries_refused(a)) return MKA_REFUSED;
  const int64_t blocks = a.batch * a.chunks * a.groups;
  const auto on = static_cast<cudaStream_t>(stream);
  if (blocks == 0) return 0;
  MKA_DISPATCH_DTYPE(a.dtype, T, RECALL_CHANNELS(a.channels, D, (queries_kernel<T, D>
      <<<static_cast<unsigned>(blocks), THREADS, 0, on>>>(a))))
  return launched();
}

int mka_recall_select(const MkaRecallSelectArgs* args, void* stream) {
  const MkaRecallSelectArgs& a = *args;
  if (select_refused(a)) return MKA_REFUSED;
  const int64_t blocks = select_blocks(a.batch, a.groups, a.count);
  if (blocks == 0 || a.recalled < 1) return 0;
  const size_t shared = SELECT_WARPS * (64 * a.words / a.tables + 1) * sizeof(int);
  const auto on = static_cast<cudaStream_t>(stream);
  select_kernel<<<static_cast<unsigned>(blocks), SELECT_WARPS * WARP, shared, on>>>(a);
  return launched();
}

int mka_host_recall_pool(const MkaRecallPoolArgs* args) {
  const MkaRecallPoolArgs& a = *args;
  if (a.size < 1 || pool_refused(a)) return MKA_REFUSED;
  MKA_DISPATCH_DTYPE(a.dtype, T, RECALL_CHANNELS(a.channels, D, RECALL_SIZE(a.size, C, (host_pool<T, D, C>(a)))))
  return 0;
}

int mka_host_recall_queries(const MkaRecallQueriesArgs* args) {
  const MkaRecallQueriesArgs& a = *args;
  if (a.size < 1 || queries_refused(a)) return MKA_REFUSED;
  MKA_DISPATCH_DTYPE(a.dtype, T, RECALL_CHANNELS(a.channels, D, (host_queries<T, D>(a))))
  return 0;
}

int mka_host_recall_select(const MkaRecallSelectArgs* args) {
  const MkaRecallSelectArgs& a = *args;
  if (select_refused(a)) return MKA_REFUSED;
  if (a.recalled < 1) return 0;
  for (int64_t block = 0; block < select_blocks(a.batch, a.groups, a.count); ++block) {
    for (int warp = 0; warp < SELECT_WARPS; ++warp) {
      const Task task = select_task(block, warp, a.batch, a.groups, a.count);
      if (task.item >= 0) host_select(a, task);
    }
  }
  return 0;
}

void mka_host_fixed_point(const float* x, int64_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = fixed_point(x[i]);
}

int64_t mka_plan_recall_task(
    int64_t block, int64_t warp, int64_t batch, int64_t groups, int64_t count, int64_t* task) {
  const Task at = select_task(block, static_cast<int>(warp), batch, groups, count);
  task[0] = at.row;
  task[1] = at.group;
  task[2] = at.item;
  return select_blocks(batch, groups, count);
}

int64_t mka_plan_recall_candidates(int64_t first, int64_t item, int64_t window, int64_t stored, int64_t total) {
  return candidate_end(first, item, window, stored, total);
}

int64_t mka_plan_recall_recent(
    const int64_t* lengths, int64_t chunk, int64_t tokens_before, int64_t size, int64_t slots, int64_t back) {
  return recent_slot(lengths, chunk, tokens_before, size, slots, back);
}
