// The plan of block_attention, the same on the host: which keys a chunk of queries sees, in tiles; which chunks of
// queries see a tile of keys; how the work is divided among blocks.
//
// Forward and dQ go through the keys of a query chunk, whose list follows from its number, its document's span and the
// recall: nothing is stored but the spans. dK and dV go through the queries that visit a tile of keys, its target: the
// inverse of the recall is made on the device, and targets with many visits are split. All sizes are known on the host.
//
// Shapes: B rows, S slots at hand, C chunk size, n chunks at hand, N chunks of the row, h halo chunks, w window in
// chunks, G KV heads, F = H/G, P = h + n + M places, R recalled chunks. `pair` is row * G + KV head, `chunk` the number
// among those at hand, `number` that in the row.
#pragma once

#include "mka/common.cuh"

namespace mka {
namespace block {

constexpr int QUERY_ROWS = 128;    // packed query rows of a tile
constexpr int64_t PARTS = 2048;    // as many parts as targets are split into, about
constexpr int64_t LEAST_PART = 16; // visits that are never split

enum Source { ROWS, SUMMARIES, PAGES };  // k and v; summary_k and summary_v; page_k and page_v
enum Level { WINDOW, SUMMARY, RECALLED, NOTHING = -1 };

// Visits [begin, end) of a target, by one block.
struct alignas(32) Item {
  int32_t target;  // a place, or P and on: C summaries; -1: no item
  int32_t pair;
  int32_t begin, end;
  int32_t slot;    // of the workspace where its part of dK and dV goes; -1: it is the whole
  int32_t from;    // chunk of visit 0,
  int32_t near;    // this many follow one another;
  int32_t inverse; // the rest are Plan::queries from here on
};

// Parts of a target that are to be summed in order.
struct alignas(16) Reduction {
  int32_t target;  // -1: none
  int32_t pair;
  int32_t slot;    // the first
  int32_t count;
};

struct Plan {
  int32_t* begin;    // [B, N] first chunk with tokens of the chunk's document; N for an empty chunk
  int32_t* end;      // [B, N] one past the last chunk with tokens of it; 0 for an empty chunk
  // what only the backward has:
  float* delta;      // [B, H, S]
  uint64_t* bits;    // [B, G, P, words] bit i: chunk i at hand recalls the place
  int32_t* recalls;  // [B, G, targets] by how many chunks; their sum before it lies in Item::inverse
  int32_t* queries;  // [B, G, n, R] at most: the chunks that recall a target, ascending, target by target
  int32_t* inverse;  // [B, G, targets] where a target's begin in `queries`
  Item* items;       // used ones first, those with many visits at the head
  Reduction* reductions;
  float* partials;   // [slots, 2, C, d]: dK and dV of a part
  int64_t places;    // P
  int64_t targets;   // P and the summaries in tiles of C
  int64_t words;     // ceil(n / 64)
  int64_t split;     // visits of a part: a target has max(1, visits / split) of them
  int64_t item_count, slots, reduction_count;  // room
  int64_t bytes;
};

// ---- sizes ----

MKA_HD int64_t chunks_at_hand(const MkaBlockAttentionArgs& a) { return ceil_div(a.slots, a.size); }
MKA_HD int64_t halo(const MkaBlockAttentionArgs& a) { return min64(a.window - 1, a.first); }

// At most so many visits have the targets together.
inline int64_t most_visits(const MkaBlockAttentionArgs& a) {
  const int64_t n = chunks_at_hand(a), h = halo(a), end = a.first + n;
  const int64_t growing = min64(a.window - 1 - h, n);  // chunks with fewer than w in their window, h + 1, h + 2, ...
  int64_t visits = growing * h + growing * (growing + 1) / 2 + (n - growing) * a.window + n * a.recalled;
  for (int64_t first = 0; first < a.summaries; first += a.size)
    visits += max64(0, end - max64(first + a.window, a.first));
  return a.batch * a.groups * visits;
}

// Lays the plan out from `base`, which may be null to learn the sizes.
inline Plan plan_at(const MkaBlockAttentionArgs& a, bool backward, void* base) {
  Plan p{};
  const int64_t n = chunks_at_hand(a), pairs = a.batch * a.groups;
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    void* at = static_cast<char*>(base) + used;
    used += ceil_div(bytes, 256) * 256;
    return at;
  };
  p.places = halo(a) + n + a.pages;
  p.targets = p.places + ceil_div(a.summaries, a.size);
  p.words = ceil_div(n, 64);
  const int64_t visits = most_visits(a);
  p.split = max64(LEAST_PART, ceil_div(visits, PARTS));
  p.slots = visits / p.split;
  p.item_count = pairs * p.targets + p.slots;
  p.reduction_count = p.slots / 2;
  p.begin = static_cast<int32_t*>(take(a.batch * a.chunks * 4));
  p.end = static_cast<int32_t*>(take(a.batch * a.chunks * 4));
  if (backward) {
    p.delta = static_cast<float*>(take(a.batch * a.heads * a.slots * 4));
    p.bits = static_cast<uint64_t*>(take(a.recalled ? pairs * p.places * p.words * 8 : 0));
    p.recalls = static_cast<int32_t*>(take(pairs * p.targets * 4));
    p.queries = static_cast<int32_t*>(take(pairs * n * a.recalled * 4));
    p.inverse = static_cast<int32_t*>(take(pairs * p.targets * 4));
    p.items = static_cast<Item*>(take(p.item_count * static_cast<int64_t>(sizeof(Item))));
    p.reductions = static_cast<Reduction*>(take(p.reduction_count * static_cast<int64_t>(sizeof(Reduction))));
    p.partials = static_cast<float*>(take(p.slots * 2 * a.size * a.channels * 4));
  }
  p.bytes = used;
  return p;
}

// ---- scans: over a block's threads, or over the same numbers on the host ----

// The last document so far and where it begins (or, from the other end, ends).
struct Reach {
  int64_t document;
  int64_t at;
};
MKA_HD Reach join(const Reach& before, const Reach& after) {
  return after.document < 0 || after.document == before.document ? before : after;
}

// One of the log2(threads) steps of an inclusive scan.
template <typename X>
MKA_HD void scan_step(const X* in, X* out, int thread, int distance) {
  out[thread] = thread >= distance ? join(in[thread - distance], in[thread]) : in[thread];
}

// ---- spans ----

MKA_HD bool has_tokens(const MkaBlockAttentionArgs& a, int64_t row, int64_t number) {
  return a.documents[row * a.chunks + number] >= 0 && a.lengths[row * a.chunks + number] > 0;
}

// The row's k-th chunk from the front or, for the ends, from the back.
MKA_HD Reach reach_of(const MkaBlockAttentionArgs& a, int64_t row, int64_t k, bool back) {
  const int64_t number = back ? a.chunks - 1 - k : k;
  const int64_t at = back ? number + 1 : number;
  return {has_tokens(a, row, number) ? a.documents[row * a.chunks + number] : -1, at};
}

// What a thread's part of the row comes to.
MKA_HD Reach reach_fold(const MkaBlockAttentionArgs& a, int64_t row, int thread, int threads, bool back) {
  const int64_t per = ceil_div(a.chunks, threads), stop = min64(a.chunks, (thread + 1) * per);
  Reach all{-1, 0};
  for (int64_t k = thread * per; k < stop; ++k) all = join(all, reach_of(a, row, k, back));
  return all;
}

// `before`: what the threads before it come to.
MKA_HD void reach_write(const MkaBlockAttentionArgs& a, const Plan& p, int64_t row, int thread, int threads, bool back,
                        Reach before) {
  const int64_t per = ceil_div(a.chunks, threads), stop = min64(a.chunks, (thread + 1) * per);
  for (int64_t k = thread * per; k < stop; ++k) {
    const Reach own = reach_of(a, row, k, back);
    before = join(before, own);
    const int64_t number = back ? a.chunks - 1 - k : k, none = back ? 0 : a.chunks;
    (back ? p.end : p.begin)[row * a.chunks + number] = static_cast<int32_t>(own.document < 0 ? none : before.at);
  }
}

MKA_HD bool empty(const MkaBlockAttentionArgs& a, const Plan& p, int64_t row, int64_t number) {
  return p.end[row * a.chunks + number] == 0;
}

// First chunk of the document of a chunk with tokens; N for an empty one.
MKA_HD int64_t origin(const MkaBlockAttentionArgs& a, const Plan& p, int64_t row, int64_t number) {
  return p.begin[row * a.chunks + number];
}

// ---- queries ----

// 128 packed rows of a (row, KV head, chunk): row r is the chunk's slot r % C of the KV head's query head r / C.
struct QueryTile {
  int64_t row, group, chunk;
  int64_t first;  // packed row that it begins with
};

MKA_HD int64_t query_tiles(const MkaBlockAttentionArgs& a) { return ceil_div(a.heads / a.groups * a.size, QUERY_ROWS); }
MKA_HD int64_t query_blocks(const MkaBlockAttentionArgs& a) {
  return chunks_at_hand(a) * a.batch * a.groups * query_tiles(a);
}

// Late chunks see the most and come first; the tiles of a KV head, which read the same keys, are neighbours.
MKA_HD QueryTile query_tile(const MkaBlockAttentionArgs& a, int64_t block) {
  const int64_t tiles = query_tiles(a), pairs = a.batch * a.groups;
  const int64_t rest = block / tiles, pair = rest % pairs;
  return {pair / a.groups, pair % a.groups, chunks_at_hand(a) - 1 - rest / pairs, block % tiles * QUERY_ROWS};
}

// Tokens of a chunk at hand, at its head.
MKA_HD int64_t query_tokens(const MkaBlockAttentionArgs& a, const Plan& p, int64_t row, int64_t chunk) {
  if (empty(a, p, row, a.first + chunk)) return 0;
  return min64(min64(a.lengths[row * a.chunks + a.first + chunk], a.size), a.slots - chunk * a.size);
}

// ---- keys of a place, or of a tile of summaries ----

struct Keys {
  int source;
  int64_t row;     // the first, in the source: of [hC + S], of [U], of [M * C] of the row and KV head
  int64_t count;   // leading rows with keys
  int64_t number;  // of the chunk in its row, or of the first summary; -1: a page
};

// `row`: that of the pair.
MKA_HD Keys place_keys(const MkaBlockAttentionArgs& a, const Plan& p, int64_t row, int64_t pair, int64_t place) {
  const int64_t h = halo(a), held = h + chunks_at_hand(a), at = place * a.size;
  if (place >= held) {
    const int64_t page = place - held;
    return {PAGES, page * a.size, max64(0, min64(a.page_lengths[pair * a.pages + page], a.size)), -1};
  }
  const int64_t number = a.first - h + place;
  if (empty(a, p, row, number)) return {ROWS, at, 0, number};
  const int64_t tokens = min64(a.lengths[row * a.chunks + number], a.size);
  return {ROWS, at, min64(tokens, h * a.size + a.slots - at), number};
}
MKA_HD Keys place_keys(const MkaBlockAttentionArgs& a, const Plan& p, int64_t pair, int64_t place) {
  return place_keys(a, p, pair / a.groups, pair, place);
}

MKA_HD Keys target_keys(const MkaBlockAttentionArgs& a, const Plan& p, int64_t pair, int64_t target) {
  if (target < p.places) return place_keys(a, p, pair, target);
  const int64_t first = (target - p.places) * a.size;
  return {SUMMARIES, first, min64(a.size, a.summaries - first), first};
}

// Whether chunk `own` of the row, of a document that begins at `begin`, sees the summary of chunk `number`.
MKA_HD bool sees_summary(
    const MkaBlockAttentionArgs& a, const Plan& p, int64_t row, int64_t own, int64_t begin, int64_t number) {
  return number <= own - a.window && begin < a.chunks && origin(a, p, row, number) == begin;
}

// ---- the keys of a query chunk, in tiles of TILE rows: the window from its own chunk back, summaries, recalled ----

struct KeyTile {
  int level;
  int source;
  int64_t row;        // the first, in the source
  int64_t chunk_row;  // the slot of its chunk that the first key has; 0 for summaries
  int64_t count;      // leading rows with keys that may be seen; 0: nothing to do
  int64_t number;     // of its chunk, or of the first summary; -1: a page
  bool diagonal;      // key slot s is seen by query slots from s on
};

template <int TILE>
struct KeyList {
  int64_t row, pair, own;  // own: the chunk's number
  int64_t origin;        // its document's first chunk
  int64_t near;          // chunks of the window
  int64_t summary_tile;  // the first tile of summaries, by its place among those of the row,
  int64_t summary_tiles; // and how many there are
  int32_t per_chunk;     // tiles of a chunk
  int64_t tiles;
  const int64_t* recalled;  // [R]
};

template <int TILE>
MKA_HD KeyList<TILE> key_list(
    const MkaBlockAttentionArgs& a, const Plan& p, int64_t row, int64_t group, int64_t chunk) {
  KeyList<TILE> list{};
  list.row = row;
  list.pair = row * a.groups + group;
  list.own = a.first + chunk;
  if (empty(a, p, row, list.own)) return list;
  list.origin = origin(a, p, row, list.own);
  list.near = list.own + 1 - max64(list.origin, list.own - a.window + 1);
  list.per_chunk = static_cast<int32_t>(ceil_div(a.size, TILE));
  const int64_t outside = min64(list.own - a.window + 1, a.summaries);  // summaries before the window
  if (outside > list.origin) {
    list.summary_tile = list.origin / TILE;
    list.summary_tiles = ceil_div(outside, TILE) - list.summary_tile;
  }
  list.tiles = (list.near + a.recalled) * list.per_chunk + list.summary_tiles;
  if (a.recalled) list.recalled = a.index + ((row * chunks_at_hand(a) + chunk) * a.groups + group) * a.recalled;
  return list;
}

// Rows [begin, begin + TILE) of a place.
template <int TILE>
MKA_HD KeyTile place_tile(const MkaBlockAttentionArgs& a, const Plan& p, const KeyList<TILE>& list, int level,
                          int64_t place, int64_t begin) {
  const Keys keys = place_keys(a, p, list.row, list.pair, place);
  const int64_t count = max64(0, min64(keys.count - begin, TILE));
  return {level, keys.source, keys.row + begin, begin, count, keys.number, level == WINDOW && keys.number == list.own};
}

template <int TILE>
MKA_HD KeyTile key_tile(const MkaBlockAttentionArgs& a, const Plan& p, const KeyList<TILE>& list, int64_t t) {
  const int64_t window = list.near * list.per_chunk;
  if (t < window) {
    const int32_t at = static_cast<int32_t>(t);  // divides in 32 bits
    const int64_t number = list.own - at / list.per_chunk;
    return place_tile(a, p, list, WINDOW, number - a.first + halo(a), at % list.per_chunk * TILE);
  }
  t -= window;
  if (t < list.summary_tiles) {
    const int64_t first = (list.summary_tile + t) * TILE;
    const int64_t count = min64(TILE, min64(list.own - a.window + 1, a.summaries) - first);
    return {SUMMARY, SUMMARIES, first, 0, count, first, false};
  }
  t -= list.summary_tiles;
  const int32_t at = static_cast<int32_t>(t);
  const int64_t place = list.recalled[at / list.per_chunk];
  if (place < 0 || place >= p.places) return {RECALLED, ROWS, 0, 0, 0, -1, false};
  return place_tile(a, p, list, RECALLED, place, at % list.per_chunk * TILE);
}

// ---- the queries of a target ----

MKA_HD int bits_set(uint64_t x) {
#ifdef __CUDA_ARCH__
  return __popcll(x);
#else
  return __builtin_popcountll(x);
#endif
}

// The place that entry `e` of index [B, n, G, R] names and the chunk and pair that name it; place -1: nothing to see.
struct Recall {
  int64_t pair, chunk, place;
};

MKA_HD Recall recall(const MkaBlockAttentionArgs& a, const Plan& p, int64_t e) {
  const int64_t group = e / a.recalled % a.groups, at = e / a.recalled / a.groups, n = chunks_at_hand(a);
  Recall r{at / n * a.groups + group, at % n, a.index[e]};
  if (r.place < 0 || r.place >= p.places || empty(a, p, at / n, a.first + r.chunk) ||
      place_keys(a, p, r.pair, r.place).count == 0)
    r.place = -1;
  return r;
}

MKA_HD uint64_t* recall_bits(const Plan& p, int64_t pair, int64_t place) {
  return p.bits + (pair * p.places + place) * p.words;
}

// How many of the first `chunks` chunks at hand recall a place.
MKA_HD int64_t recalls_before(const Plan& p, int64_t pair, int64_t place, int64_t chunks) {
  const uint64_t* bits = recall_bits(p, pair, place);
  int64_t found = 0;
  for (int64_t word = 0; word < chunks / 64; ++word) found += bits_set(bits[word]);
  if (chunks % 64) found += bits_set(bits[chunks / 64] & ((uint64_t{1} << chunks % 64) - 1));
  return found;
}

// Visits 0, 1, ... of a target: chunks from, from + 1, ..., near of them, then those that recall it.
struct Visits {
  int64_t from, near, recalls;
};

MKA_HD Visits visits(const MkaBlockAttentionArgs& a, const Plan& p, int64_t pair, int64_t target) {
  const int64_t row = pair / a.groups, n = chunks_at_hand(a);
  const Keys keys = target_keys(a, p, pair, target);
  const int32_t* ends = p.end + row * a.chunks;
  int64_t begin = 0, end = 0;
  if (keys.source == ROWS && keys.count > 0) {
    begin = keys.number;
    end = min64(keys.number + a.window, ends[keys.number]);
  } else if (keys.source == SUMMARIES) {
    begin = keys.number + a.window;
    for (int64_t c = keys.number; c < min64(keys.number + keys.count, a.chunks); ++c) end = max64(end, ends[c]);
  }
  begin = max64(begin, a.first);
  const int64_t near = max64(0, min64(end, a.first + n) - begin);
  return {near ? begin - a.first : 0, near, p.recalls[pair * p.targets + target]};
}

// What a target adds to the lists; and, summed, what those before it have added.
struct Tally {
  int32_t queries, heavy, light, slots, reductions;
};
MKA_HD Tally join(const Tally& one, const Tally& other) {
  return {one.queries + other.queries, one.heavy + other.heavy, one.light + other.light, one.slots + other.slots,
          one.reductions + other.reductions};
}

MKA_HD int64_t parts(const Plan& p, const Visits& v) { return max64(1, (v.near + v.recalls) / p.split); }

MKA_HD Tally tally(const Plan& p, const Visits& v) {
  const int32_t count = static_cast<int32_t>(parts(p, v)), several = count > 1;
  const int32_t heavy = 2 * (v.near + v.recalls) >= p.split;
  return {static_cast<int32_t>(v.recalls), heavy * count, 1 - heavy, several * count, several};
}

// Writes a target's items. `heavy`: the heavy items of all targets; they come before the light ones.
MKA_HD void write_items(const Plan& p, int64_t pair, int64_t target, const Visits& v, const Tally& before, int32_t heavy) {
  const int64_t all = v.near + v.recalls, count = parts(p, v);
  p.inverse[pair * p.targets + target] = before.queries;
  Item* to = p.items + (tally(p, v).heavy ? before.heavy : heavy + before.light);
  for (int64_t part = 0; part < count; ++part)
    to[part] = {static_cast<int32_t>(target),           static_cast<int32_t>(pair),
                static_cast<int32_t>(all * part / count), static_cast<int32_t>(all * (part + 1) / count),
                count > 1 ? static_cast<int32_t>(before.slots + part) : -1,
                static_cast<int32_t>(v.from),           static_cast<int32_t>(v.near), before.queries};
  if (count > 1)
    p.reductions[before.reductions] = {static_cast<int32_t>(target), static_cast<int32_t>(pair), before.slots,
                                       static_cast<int32_t>(count)};
}

// What is left of the lists behind all items.
MKA_HD void clear_items(const Plan& p, const Tally& all, int thread, int threads) {
  for (int64_t i = all.heavy + all.light + thread; i < p.item_count; i += threads)
    p.items[i] = {-1, 0, 0, 0, -1, 0, 0, 0};
  for (int64_t i = all.reductions + thread; i < p.reduction_count; i += threads) p.reductions[i] = {-1, 0, 0, 0};
}

struct Visit {
  int64_t chunk;
  int level;      // -1: it sees nothing of the target
  bool diagonal;  // key slot s is seen by query slots from s on
};

MKA_HD Visit visit(const MkaBlockAttentionArgs& a, const Plan& p, const Item& item, int64_t v) {
  if (v >= item.near) return {p.queries[item.inverse + v - item.near], RECALLED, false};
  const int64_t chunk = item.from + v, own = a.first + chunk, row = item.pair / a.groups;
  if (empty(a, p, row, own)) return {chunk, NOTHING, false};
  if (item.target < p.places) return {chunk, WINDOW, item.target - halo(a) == chunk};
  const int64_t end = min64((item.target - p.places + 1) * a.size, own - a.window + 1);
  return {chunk, origin(a, p, row, own) < end ? SUMMARY : NOTHING, false};
}

}  // namespace block
}  // namespace mka
