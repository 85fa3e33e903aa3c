// The forward of block_attention on Hopper, over a machine (mka/hopper.cuh): a warp that plans, a warp that fetches and
// two warp groups that attend (mka/block_hopper_attend.cuh). Chunks have 128 slots.
//
// A task is the 128 queries of a chunk and query head; a block takes every gridDim.x-th. The planner resolves a task's
// list of keys and drops tiles of which nothing is seen. The fetcher copies the others' keys and values, each through a
// ring of stages; behind a task's last keys comes a mark. What is planned, fetched and attended goes on from one task to
// the next without a stop.
#pragma once

#include "mka/block_plan.cuh"
#include "mka/hopper.cuh"

namespace mka {
namespace block {
namespace wgmma {

constexpr int TILE_ROWS = 128;  // queries of a task, keys of a tile
constexpr int GROUPS = 2;       // warp groups that attend
constexpr int PLANNED = 32;     // tiles that are planned at a time, one per lane
constexpr int PLANS = 2;        // such batches

enum Kind { WHOLE = 0, PARTIAL = 1, DIAGONAL = 2, END = 4 };

// For loops that happen seldom.
#ifdef __CUDA_ARCH__
#define MKA_ROLLED _Pragma("unroll 1")
#else
#define MKA_ROLLED
#endif

// A tile of keys of which something is seen.
struct alignas(32) Tile {
  uint32_t seen[4];  // bit i % 32 of word i / 32: key i is seen by some query
  int32_t level;
  int32_t kind;      // flags; END: no keys, the task is over
  int32_t source;
  int32_t row;       // in its source
};

// The queries of a chunk and head.
struct alignas(32) Task {
  int32_t row, group, head, chunk;
  int32_t tokens;  // queries that are none stand behind them
};

// Tiles of a task; the last batch of a task ends it.
struct alignas(32) Batch {
  Task task;
  int32_t count, last;
  Tile tile[PLANNED];
};

template <int D>
struct Layout {
  static constexpr int STAGES = D == 64 ? 4 : 2;
  static constexpr int TILE = TILE_ROWS * D * 2;                 // bytes of queries, keys or values
  static constexpr int HALF = TILE_ROWS * hopper::ROW_BYTES;     // bytes of 64 channels of them
  static constexpr int TILES = 2 * STAGES;                       // more than tiles of keys are under way
  static constexpr int REST = (1 + 2 * STAGES) * TILE;           // where the rest lies

  struct Rest {
    Batch batch[PLANS];
    Tile tile[TILES];                                            // by number of their keys
    Task task[2];
    uint64_t planned[PLANS], used[PLANS];
    uint64_t q_full, q_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    uint64_t landed;                                             // values that are not yet to be read
  };
  static constexpr int BYTES = REST + static_cast<int>(sizeof(Rest));

  unsigned char* base;

  MKA_HD unsigned char* q() const { return base; }
  MKA_HD unsigned char* k(int stage) const { return base + (1 + stage) * TILE; }
  MKA_HD unsigned char* v(int stage) const { return base + (1 + STAGES + stage) * TILE; }
  MKA_HD Rest& rest() const { return *reinterpret_cast<Rest*>(base + REST); }
};

// A ring's position after `count` stages: the stage, and the parity of the phase that fills it.
template <int STAGES>
struct Turn {
  int stage;
  uint32_t parity;
  explicit MKA_HD Turn(int count) : stage(count % STAGES), parity(count / STAGES & 1) {}
};

// Of q, then of the sources' keys and values by turns.
template <typename Map>
struct Maps {
  Map at[7];
  MKA_HD const Map* q() const { return at; }
  MKA_HD const Map* k(int source) const { return at + 1 + 2 * source; }
  MKA_HD const Map* v(int source) const { return at + 2 + 2 * source; }
};

#pragma nv_exec_check_disable
template <int D, typename M>
MKA_HD void prepare(M& machine, const Layout<D>& shared) {
  auto& rest = shared.rest();
  machine.check_tile(shared.base);
  constexpr int warps = GROUPS * hopper::GROUP / 32;
  for (int s = 0; s < PLANS; ++s) {
    machine.init(&rest.planned[s], 1);
    machine.init(&rest.used[s], 1);
  }
  machine.init(&rest.q_full, 1);
  machine.init(&rest.q_empty, warps);
  machine.init(&rest.landed, 1);
  for (int s = 0; s < Layout<D>::STAGES; ++s) {
    machine.init(&rest.k_full[s], 1);
    machine.init(&rest.k_empty[s], warps);
    machine.init(&rest.v_full[s], 1);
    machine.init(&rest.v_empty[s], warps);
  }
  machine.initialised();
}

// The warp that plans, ahead of the one that fetches.
template <typename Shared, typename M>
struct Planner {
  M& machine;
  const MkaBlockAttentionArgs& a;
  const Plan& p;
  Shared shared;
  int batches = 0;

  // As query_tile has it, in 32 bits: the number of tasks fits.
  MKA_HD Task task_at(int number) const {
    const int fan = static_cast<int>(a.heads) / static_cast<int>(a.groups);
    const int groups = static_cast<int>(a.groups), rows = static_cast<int>(a.batch), pair = number / fan;
    const int row = pair / groups % rows, group = pair % groups;
    const int chunk = static_cast<int>(chunks_at_hand(a)) - 1 - pair / groups / rows;
    return {row, group, group * fan + number % fan, chunk, static_cast<int32_t>(query_tokens(a, p, row, chunk))};
  }

  // Fills a batch with tiles [first, first + 32) of the task's list; whether it is the last.
#pragma nv_exec_check_disable
  MKA_HD bool fill(Batch& batch, const Task& at, int64_t first) {
    KeyList<TILE_ROWS> list = key_list<TILE_ROWS>(a, p, at.row, at.group, at.chunk);
    list.per_chunk = 1;  // known here: no divisions
    const int count = static_cast<int>(min64(PLANNED, list.tiles - first));
    // each lane resolves a tile: as a whole at first
MKA_UNROLL
    for (int l = 0; l < M::LANES; ++l) {
      const int lane = machine.lane(l);
      if (lane >= count) continue;
      const KeyTile found = key_tile(a, p, list, first + lane);
      batch.tile[lane] = {{static_cast<uint32_t>(found.count), static_cast<uint32_t>(found.number), 0, 0},
                          found.level, found.diagonal ? DIAGONAL : WHOLE, found.source,
                          static_cast<int32_t>(found.row)};
    }
    machine.sync_warp();
    // all lanes see which of its keys are seen; those that stay move to the front
    const int32_t* const begin = p.begin + at.row * a.chunks;
    const int32_t origin = static_cast<int32_t>(list.origin);
    int kept = 0;
    for (int i = 0; i < count; ++i) {
      Tile tile = batch.tile[i];
      const int keys = static_cast<int>(tile.seen[0]), number = static_cast<int>(tile.seen[1]);
      uint32_t some = 0, every = ~0u;
MKA_UNROLL
      for (int word = 0; word < 4; ++word) {
        bool seen[M::LANES];
MKA_UNROLL
        for (int l = 0; l < M::LANES; ++l) {
          const int key = 32 * word + machine.lane(l);
          seen[l] = key < keys && (tile.level != SUMMARY || begin[number + key] == origin);
        }
        tile.seen[word] = machine.ballot(seen);
        some |= tile.seen[word], every &= tile.seen[word];
      }
      if (every != ~0u) tile.kind |= PARTIAL;
      if (some) {
        if (machine.first_lane()) batch.tile[kept] = tile;
        ++kept;
      }
    }
    const bool last = first + PLANNED >= list.tiles;
    if (machine.first_lane()) {
      batch.task = at;
      batch.count = kept, batch.last = last;
    }
    return last;
  }

#pragma nv_exec_check_disable
  MKA_HD void run(int block, int blocks, int all) {
    auto& rest = shared.rest();
    for (int task = block; task < all; task += blocks) {
      const Task at = task_at(task);
      for (int64_t first = 0;; first += PLANNED) {
        const Turn<PLANS> turn(batches++);
        machine.wait(&rest.used[turn.stage], turn.parity ^ 1);
        const bool last = fill(rest.batch[turn.stage], at, first);
        machine.sync_warp();
        if (machine.first_lane()) machine.arrive(&rest.planned[turn.stage]);
        if (last) break;
      }
    }
  }
};

// The warp that fetches.
template <int D, typename M>
struct Fetcher {
  using Shared = Layout<D>;
  M& machine;
  const Maps<typename M::Map>& maps;
  Shared shared;
  int tasks = 0, batches = 0, keys = 0, values = 0, landings = 0;

  // Copies 128 rows. By one lane.
#pragma nv_exec_check_disable
  MKA_HD void copy(const typename M::Map* map, unsigned char* tile, uint64_t* barrier, int row, int head, int batch) {
    machine.expect(barrier, Shared::TILE);
MKA_UNROLL
    for (int half = 0; half < D / 64; ++half)
      machine.load(map, tile + half * Shared::HALF, barrier, 64 * half, row, head, batch);
  }

  // Waits for a stage of keys and says what comes there.
#pragma nv_exec_check_disable
  MKA_HD int announce(const Tile& tile) {
    auto& rest = shared.rest();
    const Turn<Shared::STAGES> turn(keys);
    machine.wait(&rest.k_empty[turn.stage], turn.parity ^ 1);
    if (machine.first_lane()) rest.tile[keys % Shared::TILES] = tile;
    ++keys;
    return turn.stage;
  }

  // The values of tile `number`. Rows that are not seen may hold anything, and a weight of 0 does not make 0 of that:
  // they become zeros before the groups hear of the tile.
#pragma nv_exec_check_disable
  MKA_HD void fetch_values(int number, int group, int batch) {
    auto& rest = shared.rest();
    const Turn<Shared::STAGES> turn(values++);
    unsigned char* const to = shared.v(turn.stage);
    uint64_t* const full = &rest.v_full[turn.stage];
    const Tile& tile = rest.tile[number % Shared::TILES];
    machine.wait(&rest.v_empty[turn.stage], turn.parity ^ 1);
    const bool partial = tile.kind & PARTIAL;
    if (machine.first_lane()) copy(maps.v(tile.source), to, partial ? &rest.landed : full, tile.row, group, batch);
    if (!partial) return;
    machine.wait(&rest.landed, landings++ & 1);
MKA_UNROLL
    for (int l = 0; l < M::LANES; ++l)
MKA_ROLLED
      for (int unit = machine.lane(l); unit < Shared::TILE / 16; unit += 32) {
        const int row = unit / 8 % TILE_ROWS;
        if (!(tile.seen[row / 32] >> row % 32 & 1)) machine.zero_unit(to + 16 * unit);
      }
    machine.fence_async();
    machine.sync_warp();
    if (machine.first_lane()) machine.arrive(full);
  }

#pragma nv_exec_check_disable
  MKA_HD void run(int block, int blocks, int all) {
    auto& rest = shared.rest();
    if (machine.first_lane()) machine.prefetch(maps.q()), machine.prefetch(maps.k(ROWS)), machine.prefetch(maps.v(ROWS));
    for (int number = block; number < all; number += blocks, ++tasks) {
      int behind = -1;  // the tile whose values are to come: one behind the keys, as the groups want them
      for (bool begun = false, last = false; !last; begun = true) {
        const Turn<PLANS> turn(batches++);
        machine.wait(&rest.planned[turn.stage], turn.parity);
        const Batch& batch = rest.batch[turn.stage];
        const Task& task = batch.task;
        last = batch.last;
        if (!begun) {
          machine.wait(&rest.q_empty, (tasks & 1) ^ 1);
          if (machine.first_lane()) {
            rest.task[tasks & 1] = task;
            copy(maps.q(), shared.q(), &rest.q_full, task.chunk * TILE_ROWS, task.head, task.row);
          }
        }
        for (int i = 0; i < batch.count + last; ++i) {
          const bool more = i < batch.count;
          if (more) {
            const Tile& tile = batch.tile[i];
            const int stage = announce(tile);
            if (machine.first_lane())
              copy(maps.k(tile.source), shared.k(stage), &rest.k_full[stage], tile.row, task.group, task.row);
            machine.sync_warp();
          }
          if (behind >= 0) fetch_values(behind, task.group, task.row);
          behind = more ? keys - 1 : -1;
        }
        machine.sync_warp();
        if (machine.first_lane()) machine.arrive(&rest.used[turn.stage]);
      }
      const int stage = announce({{0, 0, 0, 0}, 0, END, 0, 0});
      if (machine.first_lane()) machine.arrive(&rest.k_full[stage]);
    }
  }
};

}  // namespace wgmma
}  // namespace block
}  // namespace mka
