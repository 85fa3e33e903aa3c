// dK and dV on Hopper, over a machine (mka/hopper.cuh): a warp that plans the visits of a target, a warp that fetches
// their queries and two warp groups that each have 64 of the target's keys. The arithmetic is that of
// mka/block_backward_keys.cuh.
#pragma once

#include "mka/block_backward_keys.cuh"
#include "mka/block_hopper_attend.cuh"

namespace mka {
namespace block {
namespace wgmma {

constexpr int STEP_ROWS = 64;  // queries that are taken at a time

// An item: 128 rows of a source, and where their gradients go.
struct alignas(16) Target {
  uint16_t* grad_k;       // two bytes an element, `stride` elements from row to row
  uint16_t* grad_v;
  int64_t stride;
  int32_t rows;           // that there are
  int32_t row, group;     // of the batch, of KV heads
  int32_t source, first;  // its first row in the source
  int32_t count;          // leading rows with keys
  int32_t number;         // of the first summary
  int32_t slot;           // of the partials, or -1
  int32_t over;           // no item: all are done
};

// Queries of a chunk that see something of it.
struct alignas(32) Guest {
  int32_t chunk, tokens;
  int32_t level;
  int32_t kind;            // DIAGONAL or WHOLE; END: there are no more
  int32_t origin;          // of its document
  int32_t last;            // the last row that it sees of summaries
  int32_t first;           // slot of the first of STEP_ROWS queries
};

struct alignas(32) Guests {
  Target target;
  int32_t count, last;
  Guest guest[PLANNED + 1];
};

// Shared memory: the target's keys and values, stages of queries and gradients of their outputs.
template <int D>
struct KeysLayout {
  static constexpr int STAGES = 4;
  static constexpr int TILE = Layout<D>::TILE;               // bytes of keys or values
  static constexpr int HALF = Layout<D>::HALF;
  static constexpr int STEP_TILE = STEP_ROWS * D * 2;        // of queries
  static constexpr int STEP_HALF = STEP_ROWS * hopper::ROW_BYTES;
  static constexpr int REST = 2 * TILE + STAGES * 2 * STEP_TILE;

  struct Rest {
    Guests guests[PLANS];
    Guest guest[STAGES];
    Target target[2];
    Item item;      // the planner's,
    Target next;    // and what it says of it
    float constant[STAGES][STEP_ROWS];  // (bias - lse) log2 e
    float delta[STAGES][STEP_ROWS];
    int32_t origin[2][GROUPS * hopper::GROUP];  // of the documents of a thread's two rows, where they are summaries
    uint64_t planned[PLANS], used[PLANS];
    uint64_t k_full, k_empty, full[STAGES], empty[STAGES];
    uint64_t landed;
    float scale;  // of the scores, times log2 e
  };
  static constexpr int BYTES = REST + static_cast<int>(sizeof(Rest));

  unsigned char* base;

  MKA_HD unsigned char* k() const { return base; }
  MKA_HD unsigned char* v() const { return base + TILE; }
  MKA_HD unsigned char* q(int stage) const { return base + 2 * TILE + 2 * stage * STEP_TILE; }
  MKA_HD unsigned char* grad_out(int stage) const { return q(stage) + STEP_TILE; }
  MKA_HD Rest& rest() const { return *reinterpret_cast<Rest*>(base + REST); }
};

// The forward's; then of q and grad_out in boxes of STEP_ROWS.
template <typename Map>
struct KeysMaps {
  Maps<Map> forward;
  Map q, grad_out;
};

#pragma nv_exec_check_disable
template <int D, typename M>
MKA_HD void prepare(M& machine, const KeysLayout<D>& shared, double scale) {
  auto& rest = shared.rest();
  rest.scale = static_cast<float>(scale) * LOG2E;
  machine.check_tile(shared.base);
  constexpr int warps = GROUPS * hopper::GROUP / 32;
  for (int s = 0; s < PLANS; ++s) {
    machine.init(&rest.planned[s], 1);
    machine.init(&rest.used[s], 1);
  }
  machine.init(&rest.k_full, 1);
  machine.init(&rest.k_empty, warps);
  machine.init(&rest.landed, 1);
  for (int s = 0; s < KeysLayout<D>::STAGES; ++s) {
    machine.init(&rest.full[s], 2);  // the copies, and the constants
    machine.init(&rest.empty[s], warps);
  }
  machine.initialised();
}

// The warp that plans: the guests of every item.
template <int D, typename M>
struct KeysPlanner {
  M& machine;
  const MkaBlockAttentionArgs& a;
  const Plan& p;
  KeysLayout<D> shared;
  int batches = 0;

#pragma nv_exec_check_disable
  MKA_HD void fill(Guests& guests, const Item& item, int row, int number, int first) {
    const int count = min(PLANNED, item.end - first);
    int kept = 0;
MKA_UNROLL
    for (int l = 0; l < M::LANES; ++l) {
      const int lane = machine.lane(l);
      guests.guest[lane].tokens = 0;
      if (lane >= count) continue;
      const Visit at = visit(a, p, item, first + lane);
      if (at.level == NOTHING) continue;
      const int64_t own = a.first + at.chunk;
      guests.guest[lane] = {static_cast<int32_t>(at.chunk), static_cast<int32_t>(query_tokens(a, p, row, at.chunk)), at.level,
                            at.diagonal ? DIAGONAL : WHOLE, static_cast<int32_t>(origin(a, p, row, own)),
                            static_cast<int32_t>(own - a.window) - number, 0};
    }
    machine.sync_warp();
    for (int i = 0; i < count; ++i) {
      const Guest guest = guests.guest[i];
      machine.sync_warp();
      if (guest.tokens == 0) continue;
      if (machine.first_lane()) guests.guest[kept] = guest;
      ++kept;
    }
    const bool last = first + PLANNED >= item.end;
    if (machine.first_lane()) {
      if (last) guests.guest[kept] = {0, 1, 0, END, 0, 0, 0};
      guests.count = kept + last, guests.last = last;
    }
  }

#pragma nv_exec_check_disable
  MKA_HD void begin(int64_t number) {
    auto& rest = shared.rest();
    Item item{};
    item.target = -1;
    if (number < p.item_count) item = p.items[number];
    rest.item = item;
    rest.next = Target{};
    rest.next.over = item.target < 0;
    if (rest.next.over) return;
    const Keys keys = target_keys(a, p, item.pair, item.target);
    const auto to = backward::grads_of<uint16_t>(a, item.pair, keys);
    const int groups = static_cast<int>(a.groups), row = item.pair / groups;
    rest.next = {to.k,       to.v,
                 to.stride,  static_cast<int32_t>(to.rows),
                 row,        item.pair - row * groups,
                 keys.source, static_cast<int32_t>(keys.row),
                 static_cast<int32_t>(keys.count), static_cast<int32_t>(keys.number),
                 item.slot,  0};
  }

#pragma nv_exec_check_disable
  MKA_HD void run(int block, int blocks) {
    auto& rest = shared.rest();
    for (int64_t number = block;; number += blocks) {
      machine.sync_warp();
      if (machine.first_lane()) begin(number);
      machine.sync_warp();
      // an unused item has no visits
      int first = rest.item.begin;
      do {
        const Turn<PLANS> turn(batches++);
        Guests& guests = rest.guests[turn.stage];
        machine.wait(&rest.used[turn.stage], turn.parity ^ 1);
        fill(guests, rest.item, rest.next.row, rest.next.number, first);
        if (machine.first_lane()) {
          guests.target = rest.next;
          machine.arrive(&rest.planned[turn.stage]);
        }
        machine.sync_warp();
        first += PLANNED;
      } while (first < rest.item.end);
      if (rest.next.over) return;
    }
  }
};

// The warp that fetches.
template <int D, typename M>
struct KeysFetcher {
  using Shared = KeysLayout<D>;
  M& machine;
  const MkaBlockAttentionArgs& a;
  const Plan& p;
  const KeysMaps<typename M::Map>& maps;
  Shared shared;
  int items = 0, batches = 0, steps = 0, landings = 0;

  // Two tensors' rows to tiles that follow one another. By one lane.
#pragma nv_exec_check_disable
  MKA_HD void copy(const typename M::Map* one, const typename M::Map* other, unsigned char* to, uint64_t* barrier,
                   int tile, int row, int head, int batch) {
    machine.expect(barrier, 2 * tile);
MKA_UNROLL
    for (int half = 0; half < D / 64; ++half) {
      machine.load(one, to + half * (tile / (D / 64)), barrier, 64 * half, row, head, batch);
      machine.load(other, to + tile + half * (tile / (D / 64)), barrier, 64 * half, row, head, batch);
    }
  }

  // STEP_ROWS queries of a head; those that are no tokens become zeros with a weight of 0.
#pragma nv_exec_check_disable
  MKA_HD void fetch(Guest guest, int first, int head, int group, int batch) {
    auto& rest = shared.rest();
    const Turn<Shared::STAGES> turn(steps++);
    uint64_t* const full = &rest.full[turn.stage];
    const bool end = guest.kind & END;
    const int tokens = guest.tokens - first;
    const bool partial = !end && tokens < STEP_ROWS;
    guest.first = first;
    machine.wait(&rest.empty[turn.stage], turn.parity ^ 1);
    if (machine.first_lane()) {
      rest.guest[turn.stage] = guest;
      if (end)
        machine.arrive(full);
      else
        copy(&maps.q, &maps.grad_out, shared.q(turn.stage), partial ? &rest.landed : full, Shared::STEP_TILE,
             guest.chunk * TILE_ROWS + first, head, batch);
    }
    if (!end) {
MKA_UNROLL
      for (int l = 0; l < M::LANES; ++l)
MKA_UNROLL
        for (int i = 0; i < STEP_ROWS; i += 32) {
          const int at = i + machine.lane(l);
          const int64_t slot = int64_t{guest.chunk} * TILE_ROWS + first + at;
          float constant = -INFINITY, delta = 0.f;
          if (at < tokens) {
            const int64_t flat = (int64_t{batch} * a.heads + head) * a.slots + slot;
            const float bias = a.bias ? a.bias[batch * a.bias_strides[0] + slot * a.bias_strides[1] +
                                               group * a.bias_strides[2] + guest.level]
                                      : 0.f;
            constant = (bias - a.lse[flat]) * LOG2E;
            delta = p.delta[flat];
          }
          rest.constant[turn.stage][at] = constant;
          rest.delta[turn.stage][at] = delta;
        }
    }
    if (partial) {
      machine.wait(&rest.landed, landings++ & 1);
MKA_UNROLL
      for (int l = 0; l < M::LANES; ++l)
MKA_ROLLED
        for (int unit = machine.lane(l); unit < 2 * Shared::STEP_TILE / 16; unit += 32)
          if (unit / 8 % STEP_ROWS >= tokens) machine.zero_unit(shared.q(turn.stage) + 16 * unit);
      machine.fence_async();
    }
    machine.sync_warp();
    if (machine.first_lane()) {
      machine.arrive(full);
      if (partial) machine.arrive(full);
    }
  }

#pragma nv_exec_check_disable
  MKA_HD void run() {
    auto& rest = shared.rest();
    const int fan = static_cast<int>(a.heads) / static_cast<int>(a.groups);
    for (;; ++items) {
      for (bool begun = false, last = false; !last; begun = true) {
        const Turn<PLANS> turn(batches++);
        machine.wait(&rest.planned[turn.stage], turn.parity);
        const Guests& guests = rest.guests[turn.stage];
        const Target& target = guests.target;
        const int group = target.group, batch = target.row;
        const bool over = target.over;
        last = guests.last;
        if (!begun) {
          machine.wait(&rest.k_empty, (items & 1) ^ 1);
          if (machine.first_lane()) {
            rest.target[items & 1] = target;
            if (over)
              machine.arrive(&rest.k_full);
            else
              copy(maps.forward.k(target.source), maps.forward.v(target.source), shared.k(), &rest.k_full, Shared::TILE,
                   target.first, group, batch);
          }
          if (over) return;
        }
        for (int i = 0; i < guests.count; ++i) {
          const Guest& guest = guests.guest[i];
          const int members = guest.kind & END ? 1 : fan;
          for (int first = 0; first < guest.tokens; first += STEP_ROWS)
            for (int member = 0; member < members; ++member)
              fetch(guest, first, group * fan + member, group, batch);
        }
        machine.sync_warp();
        if (machine.first_lane()) machine.arrive(&rest.used[turn.stage]);
      }
    }
  }
};

// Registers of 64 keys: a thread has rows query_row(0) and query_row(1) of them, and of the queries c_column of each 8.
template <int D, int THREADS>
struct Summing {
  float weights[32][THREADS];       // scores, then weights, transposed
  float grads[32][THREADS];         // of the weights, then of the scores
  uint32_t rounded[2][4][4][THREADS];
  float grad_k[D / 2][THREADS], grad_v[D / 2][THREADS];
};

template <typename T, int D, typename M>
struct Summer {
  using Shared = KeysLayout<D>;
  static constexpr int THREADS = M::THREADS;
  M& machine;
  const MkaBlockAttentionArgs& a;
  const Plan& p;
  Shared shared;
  int index;  // 0 or 1
  Summing<D, THREADS>& x;
  int at = 0;  // items % 2 * CYCLE + steps % CYCLE: all that counts, in one register
  static constexpr int CYCLE = 2 * Shared::STAGES;

  // c = the group's 64 rows of a tile times the transposed queries' tile.
#pragma nv_exec_check_disable
  MKA_HD void multiply(float (&c)[32][THREADS], const unsigned char* left, const unsigned char* right) {
    const uint64_t one = hopper::rows_descriptor(machine.address(left) + index * 64 * hopper::ROW_BYTES);
    const uint64_t other = hopper::rows_descriptor(machine.address(right));
MKA_UNROLL
    for (int channel = 0; channel < D; channel += 16)
      machine.template product<T>(c, one + (channel / 64 * Shared::HALF + channel % 64 * 2) / 16,
                                  other + (channel / 64 * Shared::STEP_HALF + channel % 64 * 2) / 16, channel > 0);
    machine.commit();
  }

  static MKA_HD void round(uint32_t (&rounded)[4][4][THREADS], const float (&from)[32][THREADS]) {
MKA_UNROLL
    for (int i = 0; i < 16; ++i)
MKA_UNROLL
      for (int l = 0; l < THREADS; ++l) rounded[i / 4][i % 4][l] = pack<T>(from[2 * i][l], from[2 * i + 1][l]);
  }

  // c += what was rounded times the queries' tile.
#pragma nv_exec_check_disable
  MKA_HD void add(float (&c)[D / 2][THREADS], const uint32_t (&rounded)[4][4][THREADS], const unsigned char* right) {
    const uint64_t tile = hopper::columns_descriptor(machine.address(right), Shared::STEP_HALF);
MKA_UNROLL
    for (int i = 0; i < 4; ++i) machine.template product<T>(c, rounded[i], tile + i * (16 * hopper::ROW_BYTES / 16));
    machine.commit();
  }

  // Sets what a guest's queries do not see to 0.
#pragma nv_exec_check_disable
  MKA_HD void blank(float (&c)[32][THREADS], const Guest& guest) {
MKA_UNROLL
    for (int r = 0; r < 2; ++r)
MKA_UNROLL
      for (int l = 0; l < THREADS; ++l) {
        const int thread = machine.thread(l), row = 64 * index + query_row(thread, r);
        int from = 0;  // the first slot that sees it
        if (guest.kind & DIAGONAL) from = row;
        if (guest.level == SUMMARY && !(shared.rest().origin[r][index * hopper::GROUP + thread] == guest.origin && row <= guest.last)) from = TILE_ROWS;
        from -= guest.first + c_column(thread % 32, 0);
MKA_UNROLL
        for (int i = 2 * r; i < 32; i += 4)
MKA_UNROLL
          for (int e = 0; e < 2; ++e)
            if (i / 4 * 8 + e < from) c[i + e][l] = 0.f;
      }
  }

#pragma nv_exec_check_disable
  MKA_HD void store(const Target& target) {
    const float scale = static_cast<float>(a.scale);
    float* const part = p.partials + int64_t{target.slot} * 2 * TILE_ROWS * D;
MKA_UNROLL
    for (int r = 0; r < 2; ++r)
MKA_UNROLL
      for (int l = 0; l < THREADS; ++l) {
        const int thread = machine.thread(l), row = 64 * index + query_row(thread, r), column = c_column(thread % 32, 0);
        const bool kept = row < target.count;
MKA_UNROLL
        for (int i = 2 * r; i < D / 2; i += 4) {
          const int channel = i / 4 * 8 + column;
          const Vec<float, 2> k{{kept ? x.grad_k[i][l] * scale : 0.f, kept ? x.grad_k[i + 1][l] * scale : 0.f}};
          const Vec<float, 2> v{{kept ? x.grad_v[i][l] : 0.f, kept ? x.grad_v[i + 1][l] : 0.f}};
          if (target.slot >= 0) {
            store_vec(part + row * D + channel, k);
            store_vec(part + (TILE_ROWS + row) * D + channel, v);
          } else if (row < target.rows) {
            *reinterpret_cast<uint32_t*>(target.grad_k + row * target.stride + channel) = pack<T>(k.at[0], k.at[1]);
            *reinterpret_cast<uint32_t*>(target.grad_v + row * target.stride + channel) = pack<T>(v.at[0], v.at[1]);
          }
        }
      }
  }

#pragma nv_exec_check_disable
  MKA_HD void step(const Guest& guest, int stage) {
    auto& rest = shared.rest();
    const bool hidden = guest.level == SUMMARY || guest.kind & DIAGONAL;
    machine.settle(x.weights);
    machine.settle(x.grads);
    machine.fence();
    multiply(x.weights, shared.k(), shared.q(stage));
    multiply(x.grads, shared.v(), shared.grad_out(stage));
    machine.template wait_products<1>();
    machine.settle(x.weights);
    const float scale = rest.scale;
MKA_UNROLL
    for (int l = 0; l < THREADS; ++l)
MKA_UNROLL
      for (int i = 0; i < 32; i += 4) {
        const auto constant =
            load_vec<float, 2>(rest.constant[stage] + i / 4 * 8 + c_column(machine.thread(l) % 32, 0));
MKA_UNROLL
        for (int e = 0; e < 4; ++e) x.weights[i + e][l] = exp2_of(fmaf(x.weights[i + e][l], scale, constant.at[e % 2]));
      }
    if (hidden) blank(x.weights, guest);
    machine.template wait_products<0>();
    machine.settle(x.grads);
    if (hidden) blank(x.grads, guest);
MKA_UNROLL
    for (int l = 0; l < THREADS; ++l)
MKA_UNROLL
      for (int i = 0; i < 32; i += 4) {
        const auto delta = load_vec<float, 2>(rest.delta[stage] + i / 4 * 8 + c_column(machine.thread(l) % 32, 0));
MKA_UNROLL
        for (int e = 0; e < 4; ++e) x.grads[i + e][l] = x.weights[i + e][l] * (x.grads[i + e][l] - delta.at[e % 2]);
      }
    round(x.rounded[0], x.weights);
    round(x.rounded[1], x.grads);
    machine.settle(x.grad_v);
    machine.settle(x.grad_k);
    machine.fence();
    add(x.grad_v, x.rounded[0], shared.grad_out(stage));
    add(x.grad_k, x.rounded[1], shared.q(stage));
    machine.template wait_products<0>();
    machine.settle(x.grad_v);
    machine.settle(x.grad_k);
MKA_UNROLL
    for (int i = 0; i < 4; ++i) machine.settle(x.rounded[0][i]), machine.settle(x.rounded[1][i]);
  }

#pragma nv_exec_check_disable
  MKA_HD void run() {
    auto& rest = shared.rest();
    for (;; at ^= CYCLE) {
      machine.wait(&rest.k_full, at / CYCLE);
      const Target& target = rest.target[at / CYCLE];
      if (target.over) return;
MKA_UNROLL
      for (int r = 0; r < 2; ++r)
MKA_UNROLL
        for (int l = 0; l < THREADS; ++l) {
          const int row = 64 * index + query_row(machine.thread(l), r);
          const bool known = target.source == SUMMARIES && row < target.count && target.number + row < a.chunks;
          rest.origin[r][index * hopper::GROUP + machine.thread(l)] = known ? p.begin[target.row * a.chunks + target.number + row] : -1;
        }
MKA_UNROLL
      for (int i = 0; i < D / 2; ++i)
MKA_UNROLL
        for (int l = 0; l < THREADS; ++l) x.grad_k[i][l] = x.grad_v[i][l] = 0.f;
      while (true) {
        const Turn<Shared::STAGES> turn(at);
        at = (at & CYCLE) | ((at + 1) & (CYCLE - 1));
        machine.wait(&rest.full[turn.stage], turn.parity);
        const Guest& guest = rest.guest[turn.stage];
        const bool end = guest.kind & END;
        // keys behind all of the queries: nothing to do
        const bool behind = guest.kind & DIAGONAL && 64 * index > guest.first + STEP_ROWS - 1;
        if (!end && !behind) step(guest, turn.stage);
        machine.release(&rest.empty[turn.stage]);
        if (end) break;
      }
      machine.release(&rest.k_empty);
      store(target);
    }
  }
};

}  // namespace wgmma
}  // namespace block
}  // namespace mka
