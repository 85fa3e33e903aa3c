// The plan of block_attention in the workspace: the spans of the documents, the inverse of the recall, the items.
// What threads do is in mka/block_plan.cuh; here they are put together into kernels, and into loops on the CPU.
#include "mka/block_launch.cuh"

#include <math.h>
#include <string.h>

namespace mka {
namespace block {
namespace {

constexpr int THREADS = 256;

// The inclusive scan of buffer[0] over the block's threads; returns where it lies.
template <typename X>
__device__ const X* scan(X (&buffer)[2][THREADS]) {
  int now = 0;
  for (int distance = 1; distance < THREADS; distance *= 2, now ^= 1) {
    __syncthreads();
    scan_step(buffer[now], buffer[now ^ 1], threadIdx.x, distance);
  }
  __syncthreads();
  return buffer[now];
}

template <typename X>
const X* scan_on_host(X (&buffer)[2][THREADS]) {
  int now = 0;
  for (int distance = 1; distance < THREADS; distance *= 2, now ^= 1)
    for (int thread = 0; thread < THREADS; ++thread) scan_step(buffer[now], buffer[now ^ 1], thread, distance);
  return buffer[now];
}

__global__ void __launch_bounds__(THREADS) spans_kernel(const MkaBlockAttentionArgs a, const Plan p) {
  __shared__ Reach buffer[2][THREADS];
  const int64_t row = blockIdx.x;
  const bool back = blockIdx.y;
  buffer[0][threadIdx.x] = reach_fold(a, row, threadIdx.x, THREADS, back);
  const Reach* all = scan(buffer);
  reach_write(a, p, row, threadIdx.x, THREADS, back, threadIdx.x ? all[threadIdx.x - 1] : Reach{-1, 0});
}

void spans_on_host(const MkaBlockAttentionArgs& a, const Plan& p) {
  Reach buffer[2][THREADS];
  for (int64_t row = 0; row < a.batch; ++row)
    for (const bool back : {false, true}) {
      for (int thread = 0; thread < THREADS; ++thread) buffer[0][thread] = reach_fold(a, row, thread, THREADS, back);
      const Reach* all = scan_on_host(buffer);
      for (int thread = 0; thread < THREADS; ++thread)
        reach_write(a, p, row, thread, THREADS, back, thread ? all[thread - 1] : Reach{-1, 0});
    }
}

int64_t recall_entries(const MkaBlockAttentionArgs& a) {
  return a.batch * chunks_at_hand(a) * a.groups * a.recalled;
}
int64_t target_count(const MkaBlockAttentionArgs& a, const Plan& p) { return a.batch * a.groups * p.targets; }

__global__ void mark_kernel(const MkaBlockAttentionArgs a, const Plan p, int64_t entries) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (e >= entries) return;
  const Recall r = recall(a, p, e);
  if (r.place < 0) return;
  atomicOr(reinterpret_cast<unsigned long long*>(recall_bits(p, r.pair, r.place) + r.chunk / 64),
           1ull << r.chunk % 64);
}

MKA_HD void count_recalls(const MkaBlockAttentionArgs& a, const Plan& p, int64_t at) {
  const int64_t pair = at / p.targets, target = at % p.targets;
  const bool any = a.recalled && target < p.places;
  p.recalls[at] = any ? static_cast<int32_t>(recalls_before(p, pair, target, chunks_at_hand(a))) : 0;
}

__global__ void count_kernel(const MkaBlockAttentionArgs a, const Plan p, int64_t targets) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (at < targets) count_recalls(a, p, at);
}

// The targets' items, THREADS targets at a time: once for the number of heavy ones, once to write them.
__global__ void __launch_bounds__(THREADS) items_kernel(const MkaBlockAttentionArgs a, const Plan p, int64_t targets) {
  __shared__ Tally buffer[2][THREADS];
  const int thread = threadIdx.x;
  Tally before{};
  int32_t heavy = 0;
  for (int write = 0; write < 2; ++write) {
    before = Tally{};
    for (int64_t first = 0; first < targets; first += THREADS) {
      const int64_t at = first + thread, pair = at / p.targets, target = at % p.targets;
      const Visits v = at < targets ? visits(a, p, pair, target) : Visits{};
      const Tally own = at < targets ? tally(p, v) : Tally{};
      __syncthreads();
      buffer[0][thread] = own;
      const Tally* all = scan(buffer);
      if (write && at < targets)
        write_items(p, pair, target, v, thread ? join(before, all[thread - 1]) : before, heavy);
      before = join(before, all[THREADS - 1]);
    }
    heavy = before.heavy;
  }
  clear_items(p, before, thread, THREADS);
}

void items_on_host(const MkaBlockAttentionArgs& a, const Plan& p, int64_t targets) {
  Tally buffer[2][THREADS];
  Visits found[THREADS];
  Tally before{};
  int32_t heavy = 0;
  for (int write = 0; write < 2; ++write) {
    before = Tally{};
    for (int64_t first = 0; first < targets; first += THREADS) {
      for (int thread = 0; thread < THREADS; ++thread) {
        const int64_t at = first + thread;
        found[thread] = at < targets ? visits(a, p, at / p.targets, at % p.targets) : Visits{};
        buffer[0][thread] = at < targets ? tally(p, found[thread]) : Tally{};
      }
      const Tally* all = scan_on_host(buffer);
      for (int thread = 0; write && thread < THREADS && first + thread < targets; ++thread)
        write_items(p, (first + thread) / p.targets, (first + thread) % p.targets, found[thread],
                    thread ? join(before, all[thread - 1]) : before, heavy);
      before = join(before, all[THREADS - 1]);
    }
    heavy = before.heavy;
  }
  for (int thread = 0; thread < THREADS; ++thread) clear_items(p, before, thread, THREADS);
}

// Puts the chunk of an entry where it belongs among those that recall its place.
MKA_HD void fill_query(const MkaBlockAttentionArgs& a, const Plan& p, int64_t e) {
  const Recall r = recall(a, p, e);
  if (r.place < 0) return;
  const int64_t rank = recalls_before(p, r.pair, r.place, r.chunk);
  p.queries[p.inverse[r.pair * p.targets + r.place] + rank] = static_cast<int32_t>(r.chunk);
}

__global__ void fill_kernel(const MkaBlockAttentionArgs a, const Plan p, int64_t entries) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (e < entries) fill_query(a, p, e);
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>(ceil_div(threads, THREADS)); }

size_t bits_bytes(const MkaBlockAttentionArgs& a, const Plan& p) {
  return static_cast<size_t>(a.batch * a.groups * p.places * p.words * 8);
}

bool whole(const int64_t (&strides)[3]) {
  return strides[0] % 8 == 0 && strides[1] % 8 == 0 && strides[2] % 8 == 0 && strides[1] >= 0 && strides[1] <= INT32_MAX;
}

// Also that no count of the plan is too large for 32 bits.
bool sizes_fit(const MkaBlockAttentionArgs& a) {
  if (a.batch < 0 || a.slots < 0 || a.groups < 1 || a.heads < a.groups || a.heads % a.groups || a.first < 0) return false;
  if ((a.channels != 64 && a.channels != 128) || (a.size != 64 && a.size != 128)) return false;
  if (a.window < 1 || a.recalled < 0 || a.pages < 0 || a.summaries < 0 || a.kernel < 0 || a.kernel > 2) return false;
  if (a.chunks < a.first + chunks_at_hand(a) || a.batch > 65535) return false;
  const int64_t most = INT32_MAX - THREADS, places = halo(a) + chunks_at_hand(a) + a.pages;
  return a.slots <= most && a.batch * a.chunks <= most && query_blocks(a) <= most && most_visits(a) <= most &&
         a.pages * a.size <= most && a.batch * a.groups * (places + a.summaries) <= most / 2;
}

}  // namespace

bool possible(const MkaBlockAttentionArgs& a) {
  if ((a.dtype != MKA_BF16 && a.dtype != MKA_FP16) || !sizes_fit(a)) return false;
  // the largest score is looked for before it is scaled
  if (!(a.scale > 0 && a.scale < INFINITY)) return false;
  if ((a.summary_k == nullptr) != (a.summary_v == nullptr) || (a.summary_k == nullptr) != (a.summaries == 0)) return false;
  if ((a.page_k == nullptr) != (a.pages == 0) || (a.page_v == nullptr) != (a.pages == 0)) return false;
  if ((a.page_lengths == nullptr) != (a.pages == 0) || (a.index == nullptr) != (a.recalled == 0)) return false;
  // those before the window are looked up in the spans
  if (a.summaries && a.summaries < a.first + chunks_at_hand(a) - a.window) return false;
  for (const void* x : {a.q, a.k, a.v, a.summary_k, a.summary_v, a.page_k, a.page_v, a.grad_out,
                        static_cast<const void*>(a.out), static_cast<const void*>(a.workspace)})
    if (!aligned(x, 16)) return false;
  for (const void* x : {a.grad_q, a.grad_k, a.grad_v, a.grad_summary_k, a.grad_summary_v, a.grad_page_k, a.grad_page_v})
    if (!aligned(x, 16)) return false;
  return whole(a.q_strides) && whole(a.k_strides) && whole(a.v_strides) && whole(a.grad_strides) &&
         whole(a.summary_k_strides) && whole(a.summary_v_strides);
}

int64_t plan_bytes(const MkaBlockAttentionArgs& a, bool backward) { return plan_at(a, backward, nullptr).bytes; }

Plan plan_view(const MkaBlockAttentionArgs& a, bool backward) { return plan_at(a, backward, a.workspace); }

int enqueue_plan(const MkaBlockAttentionArgs& a, bool backward, cudaStream_t stream) {
  const Plan p = plan_view(a, backward);
  if (a.batch == 0 || a.chunks == 0) return 0;
  spans_kernel<<<dim3(static_cast<unsigned>(a.batch), 2), THREADS, 0, stream>>>(a, p);
  MKA_TRY(cudaGetLastError());
  if (!backward) return 0;
  const int64_t entries = recall_entries(a), targets = target_count(a, p);
  if (entries) {
    MKA_TRY(cudaMemsetAsync(p.bits, 0, bits_bytes(a, p), stream));
    mark_kernel<<<blocks_for(entries), THREADS, 0, stream>>>(a, p, entries);
  }
  count_kernel<<<blocks_for(targets), THREADS, 0, stream>>>(a, p, targets);
  items_kernel<<<1, THREADS, 0, stream>>>(a, p, targets);
  if (entries) fill_kernel<<<blocks_for(entries), THREADS, 0, stream>>>(a, p, entries);
  return launched();
}

void plan_on_host(const MkaBlockAttentionArgs& a, bool backward) {
  const Plan p = plan_view(a, backward);
  spans_on_host(a, p);
  if (!backward) return;
  const int64_t entries = recall_entries(a), targets = target_count(a, p);
  if (entries) memset(p.bits, 0, bits_bytes(a, p));
  for (int64_t e = 0; e < entries; ++e) {
    const Recall r = recall(a, p, e);
    if (r.place >= 0) recall_bits(p, r.pair, r.place)[r.chunk / 64] |= uint64_t{1} << r.chunk % 64;
  }
  for (int64_t at = 0; at < targets; ++at) count_recalls(a, p, at);
  items_on_host(a, p, targets);
  for (int64_t e = 0; e < entries; ++e) fill_query(a, p, e);
}

}  // namespace block
}  // namespace mka

using namespace mka::block;

int64_t mka_block_attention_workspace_bytes(const MkaBlockAttentionArgs* args, int backward) {
  return sizes_fit(*args) ? plan_bytes(*args, backward != 0) : MKA_REFUSED;
}

int mka_plan_block(const MkaBlockAttentionArgs* args) {
  if (!sizes_fit(*args)) return MKA_REFUSED;
  plan_on_host(*args, true);
  return 0;
}

void mka_plan_block_sizes(const MkaBlockAttentionArgs* args, int64_t sizes[5]) {
  const Plan p = plan_view(*args, true);
  sizes[0] = p.split, sizes[1] = p.targets, sizes[2] = p.item_count, sizes[3] = p.slots, sizes[4] = p.reduction_count;
}

int64_t mka_plan_block_queries(const MkaBlockAttentionArgs* args, int64_t block, int64_t* task) {
  const QueryTile at = query_tile(*args, block);
  task[0] = at.row, task[1] = at.group, task[2] = at.chunk, task[3] = at.first;
  return query_blocks(*args);
}

namespace {

template <int TILE>
void tile_of(
    const MkaBlockAttentionArgs& a, int64_t row, int64_t group, int64_t chunk, int64_t t, int64_t* found) {
  const Plan p = plan_view(a, true);
  const KeyTile tile = key_tile(a, p, key_list<TILE>(a, p, row, group, chunk), t);
  found[0] = tile.level, found[1] = tile.source, found[2] = tile.row, found[3] = tile.chunk_row;
  found[4] = tile.count, found[5] = tile.diagonal;
}

}  // namespace

int64_t mka_plan_block_tiles(
    const MkaBlockAttentionArgs* args, int64_t tile, int64_t row, int64_t group, int64_t chunk) {
  const Plan p = plan_view(*args, true);
  return tile == 64 ? key_list<64>(*args, p, row, group, chunk).tiles
                    : key_list<128>(*args, p, row, group, chunk).tiles;
}

void mka_plan_block_tile(const MkaBlockAttentionArgs* args, int64_t tile, int64_t row, int64_t group, int64_t chunk,
                         int64_t t, int64_t* found) {
  tile == 64 ? tile_of<64>(*args, row, group, chunk, t, found) : tile_of<128>(*args, row, group, chunk, t, found);
}

int mka_plan_block_summary(const MkaBlockAttentionArgs* args, int64_t row, int64_t chunk, int64_t number) {
  const Plan p = plan_view(*args, true);
  const int64_t own = args->first + chunk;
  return sees_summary(*args, p, row, own, origin(*args, p, row, own), number);
}

void mka_plan_block_item(const MkaBlockAttentionArgs* args, int64_t item, int64_t* found) {
  const Item i = plan_view(*args, true).items[item];
  found[0] = i.target, found[1] = i.pair, found[2] = i.begin, found[3] = i.end, found[4] = i.slot;
}

void mka_plan_block_target(const MkaBlockAttentionArgs* args, int64_t item, int64_t* found) {
  const Plan p = plan_view(*args, true);
  const Keys keys = target_keys(*args, p, p.items[item].pair, p.items[item].target);
  found[0] = keys.source, found[1] = keys.row, found[2] = keys.count, found[3] = keys.number;
}

void mka_plan_block_visit(const MkaBlockAttentionArgs* args, int64_t item, int64_t visit, int64_t* found) {
  const Plan p = plan_view(*args, true);
  const Visit v = mka::block::visit(*args, p, p.items[item], visit);
  found[0] = v.chunk, found[1] = v.level, found[2] = v.diagonal;
}

void mka_plan_block_reduction(const MkaBlockAttentionArgs* args, int64_t reduction, int64_t* found) {
  const Reduction r = plan_view(*args, true).reductions[reduction];
  found[0] = r.target, found[1] = r.pair, found[2] = r.slot, found[3] = r.count;
}
