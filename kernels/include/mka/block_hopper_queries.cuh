// dQ and the gradient of the bias on Hopper, over a machine (mka/hopper.cuh): the forward's planner, a warp that fetches
// and two warp groups that each differentiate 64 of a task's queries. The arithmetic is that of mka/block_backward.cuh.
#pragma once

#include "mka/block_hopper_attend.cuh"

namespace mka {
namespace block {
namespace wgmma {

constexpr int LEVELS = 3;

// Shared memory: queries, the gradients of their outputs, stages of keys and values.
template <int D>
struct QueriesLayout {
  static constexpr int STAGES = Layout<D>::STAGES;
  static constexpr int TILE = Layout<D>::TILE;
  static constexpr int HALF = Layout<D>::HALF;
  static constexpr int TILES = 2 * STAGES;
  static constexpr int REST = (2 + 2 * STAGES) * TILE;

  struct Rest {
    Batch batch[PLANS];
    Tile tile[TILES];
    Task task[2];
    uint64_t planned[PLANS], used[PLANS];
    uint64_t q_full, q_empty, full[STAGES], empty[STAGES];
    uint64_t landed;
    // of a thread's two rows, in its own words
    float constant[LEVELS][2][GROUPS * hopper::GROUP];  // of the levels: (bias - lse) log2 e
    float delta[2][GROUPS * hopper::GROUP];             // rowsum of grad_out * out
    float bias[LEVELS][2][GROUPS * hopper::GROUP];      // its part of the gradient of the levels' bias
  };
  static constexpr int BYTES = REST + static_cast<int>(sizeof(Rest));

  unsigned char* base;

  MKA_HD unsigned char* q() const { return base; }
  MKA_HD unsigned char* grad_out() const { return base + TILE; }
  MKA_HD unsigned char* k(int stage) const { return base + (2 + 2 * stage) * TILE; }
  MKA_HD unsigned char* v(int stage) const { return k(stage) + TILE; }
  MKA_HD Rest& rest() const { return *reinterpret_cast<Rest*>(base + REST); }
};

// The forward's, then of grad_out.
template <typename Map>
struct QueriesMaps {
  Maps<Map> forward;
  Map grad_out;
};

#pragma nv_exec_check_disable
template <int D, typename M>
MKA_HD void prepare(M& machine, const QueriesLayout<D>& shared) {
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
  for (int s = 0; s < QueriesLayout<D>::STAGES; ++s) {
    machine.init(&rest.full[s], 1);
    machine.init(&rest.empty[s], warps);
  }
  machine.initialised();
}

template <int D, typename M>
struct QueriesFetcher {
  using Shared = QueriesLayout<D>;
  M& machine;
  const QueriesMaps<typename M::Map>& maps;
  Shared shared;
  int tasks = 0, batches = 0, keys = 0, landings = 0;

  // Copies 128 rows of each of two tensors to tiles that follow one another. By one lane.
#pragma nv_exec_check_disable
  MKA_HD void copy(const typename M::Map* one, const typename M::Map* other, unsigned char* tile, uint64_t* barrier,
                   int row, int head, int batch) {
    machine.expect(barrier, 2 * Shared::TILE);
MKA_UNROLL
    for (int half = 0; half < D / 64; ++half) {
      machine.load(one, tile + half * Shared::HALF, barrier, 64 * half, row, head, batch);
      machine.load(other, tile + Shared::TILE + half * Shared::HALF, barrier, 64 * half, row, head, batch);
    }
  }

  // Fetches a tile, or says that the task is over. Rows that are not seen become zeros, as in the forward.
#pragma nv_exec_check_disable
  MKA_HD void fetch(const Tile& tile, int group, int batch) {
    auto& rest = shared.rest();
    const Turn<Shared::STAGES> turn(keys);
    uint64_t* const full = &rest.full[turn.stage];
    unsigned char* const to = shared.k(turn.stage);
    machine.wait(&rest.empty[turn.stage], turn.parity ^ 1);
    if (machine.first_lane()) {
      rest.tile[keys % Shared::TILES] = tile;
      if (tile.kind & END)
        machine.arrive(full);
      else
        copy(maps.forward.k(tile.source), maps.forward.v(tile.source), to, tile.kind & PARTIAL ? &rest.landed : full,
             tile.row, group, batch);
    }
    ++keys;
    if (!(tile.kind & PARTIAL)) return;
    machine.wait(&rest.landed, landings++ & 1);
MKA_UNROLL
    for (int l = 0; l < M::LANES; ++l)
MKA_ROLLED
      for (int unit = machine.lane(l); unit < 2 * Shared::TILE / 16; unit += 32) {
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
    for (int number = block; number < all; number += blocks, ++tasks) {
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
            copy(maps.forward.q(), &maps.grad_out, shared.q(), &rest.q_full, task.chunk * TILE_ROWS, task.head, task.row);
          }
        }
        for (int i = 0; i < batch.count; ++i) fetch(batch.tile[i], task.group, task.row);
        machine.sync_warp();
        if (machine.first_lane()) machine.arrive(&rest.used[turn.stage]);
      }
      fetch({{0, 0, 0, 0}, 0, END, 0, 0}, 0, 0);
    }
  }
};

// Registers of 64 queries, as Attending.
template <int D, int THREADS>
struct Differentiating {
  float weights[64][THREADS];      // scores, then weights
  float grads[64][THREADS];        // of the weights, then of the scores
  uint32_t rounded[8][4][THREADS]; // the latter
  float out[D / 2][THREADS];       // dQ / scale
};

template <typename T, int D, typename M>
struct Differentiator {
  using Shared = QueriesLayout<D>;
  static constexpr int THREADS = M::THREADS;
  M& machine;
  const MkaBlockAttentionArgs& a;
  const Plan& p;
  Shared shared;
  int index;  // 0 or 1
  Differentiating<D, THREADS>& x;
  int tasks = 0, keys = 0;

  // Where a thread's own words are.
#pragma nv_exec_check_disable
  MKA_HD int own(int l) const { return index * hopper::GROUP + machine.thread(l); }

  // c = rows of the group's 64 in the tile `left`, times the transposed tile `right`.
#pragma nv_exec_check_disable
  MKA_HD void multiply(float (&c)[64][THREADS], const unsigned char* left, const unsigned char* right) {
    const uint64_t one = hopper::rows_descriptor(machine.address(left) + index * 64 * hopper::ROW_BYTES);
    const uint64_t other = hopper::rows_descriptor(machine.address(right));
MKA_UNROLL
    for (int channel = 0; channel < D; channel += 16) {
      const int on = (channel / 64 * Shared::HALF + channel % 64 * 2) / 16;
      machine.template product<T>(c, one + on, other + on, channel > 0);
    }
    machine.commit();
  }

#pragma nv_exec_check_disable
  MKA_HD void begin(const Task& at) {
MKA_UNROLL
    for (int r = 0; r < 2; ++r) {
      float delta[THREADS];
MKA_UNROLL
      for (int l = 0; l < THREADS; ++l) {
        const int thread = machine.thread(l), row = 64 * index + query_row(thread, r);
        const int64_t slot = int64_t{at.chunk} * TILE_ROWS + row;
        const bool token = row < at.tokens;
        delta[l] = 0.f;
        if (token) {
          const T* grads = static_cast<const T*>(a.grad_out) + at.row * a.grad_strides[0] + slot * a.grad_strides[1] +
                           at.head * a.grad_strides[2];
          const T* outs = static_cast<const T*>(a.out) + ((at.row * a.slots + slot) * a.heads + at.head) * D;
MKA_UNROLL
          for (int channel = thread % 4 * 8; channel < D; channel += 32) {
            const auto grad = load_vec<T, 8>(grads + channel), out = load_vec<T, 8>(outs + channel);
MKA_UNROLL
            for (int e = 0; e < 8; ++e) delta[l] += to_float(grad.at[e]) * to_float(out.at[e]);
          }
        }
        const float lse = token ? a.lse[(at.row * a.heads + at.head) * a.slots + slot] : INFINITY;
        const float* from = a.bias && token ? a.bias + at.row * a.bias_strides[0] + slot * a.bias_strides[1] +
                                                  at.group * a.bias_strides[2]
                                            : nullptr;
MKA_UNROLL
        for (int level = 0; level < LEVELS; ++level) {
          shared.rest().constant[level][r][own(l)] = ((from ? from[level] : 0.f) - lse) * LOG2E;
          shared.rest().bias[level][r][own(l)] = 0.f;
        }
      }
      row_sum<THREADS>(delta);
MKA_UNROLL
      for (int l = 0; l < THREADS; ++l) {
        const int thread = machine.thread(l);
        const int64_t slot = int64_t{at.chunk} * TILE_ROWS + 64 * index + query_row(thread, r);
        shared.rest().delta[r][own(l)] = delta[l];
        if (thread % 4 == 0 && slot < a.slots) p.delta[(at.row * a.heads + at.head) * a.slots + slot] = delta[l];
      }
    }
MKA_UNROLL
    for (int i = 0; i < D / 2; ++i)
MKA_UNROLL
      for (int l = 0; l < THREADS; ++l) x.out[i][l] = 0.f;
  }

#pragma nv_exec_check_disable
  MKA_HD void end(const Task& at) {
MKA_UNROLL
    for (int r = 0; r < 2; ++r) {
      float factor[THREADS];
MKA_UNROLL
      for (int l = 0; l < THREADS; ++l)
        factor[l] = 64 * index + query_row(machine.thread(l), r) < at.tokens ? static_cast<float>(a.scale) : 0.f;
      store_row<T, D>(machine, static_cast<T*>(a.grad_q), a, at, index, r, x.out, factor);
      if (!a.grad_bias) continue;
MKA_UNROLL
      for (int level = 0; level < LEVELS; ++level) {
        float sum[THREADS];
MKA_UNROLL
        for (int l = 0; l < THREADS; ++l) sum[l] = shared.rest().bias[level][r][own(l)];
        row_sum<THREADS>(sum);
MKA_UNROLL
        for (int l = 0; l < THREADS; ++l) {
          const int thread = machine.thread(l);
          const int64_t slot = int64_t{at.chunk} * TILE_ROWS + 64 * index + query_row(thread, r);
          if (thread % 4 == 0 && slot < a.slots)
            a.grad_bias[((at.row * a.slots + slot) * a.heads + at.head) * 3 + level] =
                factor[l] == 0.f ? 0.f : sum[l];
        }
      }
    }
  }

  // Scores to weights.
#pragma nv_exec_check_disable
  MKA_HD void weigh(float scale, int level) {
MKA_UNROLL
    for (int r = 0; r < 2; ++r)
MKA_UNROLL
      for (int l = 0; l < THREADS; ++l) {
        const float constant = shared.rest().constant[level][r][own(l)];
MKA_UNROLL
        for (int i = 2 * r; i < 64; i += 4)
MKA_UNROLL
          for (int e = i; e < i + 2; ++e) x.weights[e][l] = exp2_of(fmaf(x.weights[e][l], scale, constant));
      }
  }

  // The weights' gradients to those of the scores, and to the level's bias.
#pragma nv_exec_check_disable
  MKA_HD void differentiate(int level) {
MKA_UNROLL
    for (int r = 0; r < 2; ++r)
MKA_UNROLL
      for (int l = 0; l < THREADS; ++l) {
        const float delta = shared.rest().delta[r][own(l)];
        float sum = 0.f;
MKA_UNROLL
        for (int i = 2 * r; i < 64; i += 4)
MKA_UNROLL
          for (int e = i; e < i + 2; ++e) {
            x.grads[e][l] = x.weights[e][l] * (x.grads[e][l] - delta);
            sum += x.grads[e][l];
          }
        shared.rest().bias[level][r][own(l)] += sum;
      }
MKA_UNROLL
    for (int i = 0; i < 32; ++i)
MKA_UNROLL
      for (int l = 0; l < THREADS; ++l)
        x.rounded[i / 4][i % 4][l] = pack<T>(x.grads[2 * i][l], x.grads[2 * i + 1][l]);
  }

#pragma nv_exec_check_disable
  MKA_HD void run(int block, int blocks, int all) {
    auto& rest = shared.rest();
    const float scale = static_cast<float>(a.scale) * LOG2E;
    for (int number = block; number < all; number += blocks, ++tasks) {
      machine.wait(&rest.q_full, tasks & 1);
      const Task& at = rest.task[tasks & 1];
      begin(at);
      while (true) {
        const Turn<Shared::STAGES> turn(keys);
        machine.wait(&rest.full[turn.stage], turn.parity);
        const Tile tile = rest.tile[keys % Shared::TILES];
        ++keys;
        if (tile.kind & END) {
          machine.release(&rest.empty[turn.stage]);
          break;
        }
        machine.settle(x.weights);
        machine.settle(x.grads);
        machine.fence();
        multiply(x.weights, shared.q(), shared.k(turn.stage));
        multiply(x.grads, shared.grad_out(), shared.v(turn.stage));
        machine.template wait_products<1>();
        machine.settle(x.weights);
        if (tile.kind) hide<THREADS>(machine, x.weights, tile, 64 * index);
        weigh(scale, tile.level);
        machine.template wait_products<0>();
        machine.settle(x.grads);
        differentiate(tile.level);
        machine.settle(x.out);
        machine.fence();
        const uint64_t k = hopper::columns_descriptor(machine.address(shared.k(turn.stage)), Shared::HALF);
MKA_UNROLL
        for (int i = 0; i < 8; ++i)
          machine.template product<T>(x.out, x.rounded[i], k + i * (16 * hopper::ROW_BYTES / 16));
        machine.commit();
        machine.template wait_products<0>();
        machine.settle(x.out);
MKA_UNROLL
        for (int i = 0; i < 8; ++i) machine.settle(x.rounded[i]);
        machine.release(&rest.empty[turn.stage]);
      }
      machine.release(&rest.q_empty);
      end(at);
    }
  }
};

}  // namespace wgmma
}  // namespace block
}  // namespace mka
