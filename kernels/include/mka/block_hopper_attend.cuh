// What a warp group does that attends: 64 of a task's queries (mka/block_hopper.cuh).
//
// It computes the scores of a tile while the tile before is multiplied with its values; the softmax of the one group
// runs while the other has the tensor cores (Shah et al., FlashAttention-3).
#pragma once

#include "mka/block_hopper.cuh"

namespace mka {
namespace block {
namespace wgmma {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// On the GPU to 1 ulp.
MKA_HD float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.f, x);
#else
  return 1.f / x;
#endif
}

// Registers of 64 queries: a thread has rows row(0) and row(1) of them, and of a tile's keys c_column of each eight.
template <int D, int THREADS>
struct Attending {
  float scores[64][THREADS];       // then weights: eight keys after the other, four elements each
  uint32_t weights[8][4][THREADS]; // rounded: sixteen keys after the other
  float out[D / 2][THREADS];       // eight channels after the other, unnormalised
  float largest[2][THREADS];       // score, in powers of two
  float sum[2][THREADS];           // this thread's part of the row's weights
  float shrink[2][THREADS];        // what the last tile made of the weights before
  float bias[3][2][THREADS];       // of the levels, times log2 e
};

MKA_HD int query_row(int thread, int r) { return thread / 32 * 16 + thread % 32 / 4 + 8 * r; }

// Hides what is not seen of a tile; `first` is the group's first query among the task's 128.
#pragma nv_exec_check_disable
template <int THREADS, typename M>
MKA_HD void hide(M& machine, float (&scores)[64][THREADS], const Tile& tile, int first) {
MKA_UNROLL
  for (int l = 0; l < THREADS; ++l) {
    const int thread = machine.thread(l), column = c_column(thread % 32, 0);
    if (tile.kind & PARTIAL)
MKA_UNROLL
      for (int i = 0; i < 64; ++i)
        if (!(tile.seen[i / 16] >> column >> (i / 4 % 4 * 8 + i % 2) & 1)) scores[i][l] = -INFINITY;
    if (tile.kind & DIAGONAL)
MKA_UNROLL
      for (int i = 0; i < 64; ++i)
        if (i / 4 * 8 + column + i % 2 > first + query_row(thread, i / 2 % 2)) scores[i][l] = -INFINITY;
  }
}

// Scores to weights, beside the largest score so far.
template <int D, int THREADS>
MKA_HD void weigh(Attending<D, THREADS>& x, float scale, int level) {
MKA_UNROLL
  for (int r = 0; r < 2; ++r) {
    float most[THREADS];
MKA_UNROLL
    for (int l = 0; l < THREADS; ++l) {
      most[l] = -INFINITY;
MKA_UNROLL
      for (int i = 2 * r; i < 64; i += 4) most[l] = fmaxf(most[l], fmaxf(x.scores[i][l], x.scores[i + 1][l]));
    }
    row_max<THREADS>(most);
MKA_UNROLL
    for (int l = 0; l < THREADS; ++l) {
      const float bias = level == WINDOW ? x.bias[0][r][l] : level == SUMMARY ? x.bias[1][r][l] : x.bias[2][r][l];
      const float largest = fmaxf(x.largest[r][l], fmaf(most[l], scale, bias));
      const float base = largest == -INFINITY ? 0.f : largest;
      float sum = 0.f;
MKA_UNROLL
      for (int i = 2 * r; i < 64; i += 4)
MKA_UNROLL
        for (int e = i; e < i + 2; ++e) {
          x.scores[e][l] = exp2_of(fmaf(x.scores[e][l], scale, bias - base));
          sum += x.scores[e][l];
        }
      x.shrink[r][l] = exp2_of(x.largest[r][l] - base);
      x.sum[r][l] = fmaf(x.sum[r][l], x.shrink[r][l], sum);
      x.largest[r][l] = largest;
    }
  }
}

template <typename T, int D, int THREADS>
MKA_HD void round_weights(Attending<D, THREADS>& x) {
MKA_UNROLL
  for (int i = 0; i < 32; ++i)
MKA_UNROLL
    for (int l = 0; l < THREADS; ++l)
      x.weights[i / 4][i % 4][l] = pack<T>(x.scores[2 * i][l], x.scores[2 * i + 1][l]);
}

// A row's results, times their thread's factor, to `to` [B, S, H, d]: 16 bytes by each of the row's four threads. A
// factor of 0 makes 0 of anything.
#pragma nv_exec_check_disable
template <typename T, int D, typename M>
MKA_HD void store_row(M& machine, T* to, const MkaBlockAttentionArgs& a, const Task& at, int index, int r,
                      const float (&x)[D / 2][M::THREADS], const float (&factor)[M::THREADS]) {
  constexpr int THREADS = M::THREADS;
MKA_UNROLL
  for (int c = 0; c < D / 32; ++c) {
    // of four times eight channels: a thread has two of each, and gets all of one
    uint32_t words[4][THREADS];
MKA_UNROLL
    for (int i = 0; i < 4; ++i)
MKA_UNROLL
      for (int l = 0; l < THREADS; ++l) {
        const int e = 16 * c + 4 * i + 2 * r;
        words[i][l] = factor[l] == 0.f ? 0u : pack<T>(x[e][l] * factor[l], x[e + 1][l] * factor[l]);
      }
MKA_UNROLL
    for (int bit = 1; bit < 4; bit *= 2)
MKA_UNROLL
      for (int i = 0; i < 4; ++i)
        if (!(i & bit)) {
          uint32_t other[THREADS];
MKA_UNROLL
          for (int l = 0; l < THREADS; ++l) other[l] = machine.thread(l) & bit ? words[i][l] : words[i | bit][l];
          machine.exchange(other, bit);
MKA_UNROLL
          for (int l = 0; l < THREADS; ++l) (machine.thread(l) & bit ? words[i][l] : words[i | bit][l]) = other[l];
        }
MKA_UNROLL
    for (int l = 0; l < THREADS; ++l) {
      const int thread = machine.thread(l);
      const int64_t slot = int64_t{at.chunk} * TILE_ROWS + 64 * index + query_row(thread, r);
      if (slot < a.slots)
        store_vec(reinterpret_cast<uint32_t*>(to + ((at.row * a.slots + slot) * a.heads + at.head) * D + 32 * c +
                                              8 * (thread % 4)),
                  Vec<uint32_t, 4>{{words[0][l], words[1][l], words[2][l], words[3][l]}});
    }
  }
}

template <typename T, int D, typename M>
struct Attender {
  using Shared = Layout<D>;
  static constexpr int THREADS = M::THREADS;
  M& machine;
  const MkaBlockAttentionArgs& a;
  Shared shared;
  int index;  // 0 or 1
  Attending<D, THREADS>& x;
  int tasks = 0, keys = 0, values = 0;

  // Begins the scores of the tile in a stage.
#pragma nv_exec_check_disable
  MKA_HD void score(int stage) {
    const uint64_t q = hopper::rows_descriptor(machine.address(shared.q()) + index * 64 * hopper::ROW_BYTES);
    const uint64_t k = hopper::rows_descriptor(machine.address(shared.k(stage)));
MKA_UNROLL
    for (int channel = 0; channel < D; channel += 16) {
      const int on = (channel / 64 * Shared::HALF + channel % 64 * 2) / 16;
      machine.template product<T>(x.scores, q + on, k + on, channel > 0);
    }
    machine.commit();
  }

  // Begins to add the weighted values of the tile in a stage.
#pragma nv_exec_check_disable
  MKA_HD void add(int stage) {
    const uint64_t v = hopper::columns_descriptor(machine.address(shared.v(stage)), Shared::HALF);
MKA_UNROLL
    for (int i = 0; i < 8; ++i)
      machine.template product<T>(x.out, x.weights[i], v + i * (16 * hopper::ROW_BYTES / 16));
    machine.commit();
  }

#pragma nv_exec_check_disable
  MKA_HD void begin(const Task& at) {
MKA_UNROLL
    for (int l = 0; l < THREADS; ++l)
MKA_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int64_t slot = int64_t{at.chunk} * TILE_ROWS + 64 * index + query_row(machine.thread(l), r);
        const float* from = a.bias && slot < a.slots ? a.bias + at.row * a.bias_strides[0] +
                                                           slot * a.bias_strides[1] + at.group * a.bias_strides[2]
                                                     : nullptr;
MKA_UNROLL
        for (int level = 0; level < 3; ++level) x.bias[level][r][l] = from ? from[level] * LOG2E : 0.f;
        x.largest[r][l] = -INFINITY, x.sum[r][l] = 0.f;
      }
MKA_UNROLL
    for (int i = 0; i < D / 2; ++i)
MKA_UNROLL
      for (int l = 0; l < THREADS; ++l) x.out[i][l] = 0.f;
  }

  // Outputs and logarithms of sums.
#pragma nv_exec_check_disable
  MKA_HD void end(const Task& at) {
MKA_UNROLL
    for (int r = 0; r < 2; ++r) {
      row_sum<THREADS>(x.sum[r]);
      float factor[THREADS];
MKA_UNROLL
      for (int l = 0; l < THREADS; ++l) {
        const int thread = machine.thread(l), row = 64 * index + query_row(thread, r);
        const int64_t slot = int64_t{at.chunk} * TILE_ROWS + row;
        const bool something = row < at.tokens && x.sum[r][l] > 0.f;
        factor[l] = something ? reciprocal(x.sum[r][l]) : 0.f;
        if (thread % 4 == 0 && slot < a.slots)
          a.lse[(at.row * a.heads + at.head) * a.slots + slot] =
              something ? (x.largest[r][l] + log2f(x.sum[r][l])) * LN2 : INFINITY;
      }
      store_row<T, D>(machine, static_cast<T*>(a.out), a, at, index, r, x.out, factor);
    }
  }

#pragma nv_exec_check_disable
  MKA_HD void run(int block, int blocks, int all) {
    constexpr int BOTH = GROUPS * hopper::GROUP;
    auto& rest = shared.rest();
    const float scale = static_cast<float>(a.scale) * LOG2E;
    // the groups take turns at the tensor cores, the first one first: named barrier 1 + index lets one in
    if (index == 1) machine.signal(1, BOTH);
    for (int number = block; number < all; number += blocks, ++tasks) {
      machine.wait(&rest.q_full, tasks & 1);
      const Task& at = rest.task[tasks & 1];
      begin(at);
      Turn<Shared::STAGES> turn(keys);
      machine.wait(&rest.k_full[turn.stage], turn.parity);
      Tile tile = rest.tile[keys % Shared::TILES];
      const bool some = !(tile.kind & END);
      if (some) {
        machine.settle(x.scores);
        machine.fence();
        score(turn.stage);
        machine.template wait_products<0>();
        machine.settle(x.scores);
        machine.release(&rest.k_empty[turn.stage]);
        if (tile.kind) hide<THREADS>(machine, x.scores, tile, 64 * index);
        weigh<D, THREADS>(x, scale, tile.level);
        round_weights<T, D, THREADS>(x);
        while (true) {
          turn = Turn<Shared::STAGES>(++keys);
          machine.wait(&rest.k_full[turn.stage], turn.parity);
          tile = rest.tile[keys % Shared::TILES];
          if (tile.kind & END) break;
          const Turn<Shared::STAGES> before(values++);
          machine.sync(1 + index, BOTH);
          machine.settle(x.scores);
          machine.settle(x.out);
          machine.fence();
          score(turn.stage);
          machine.wait(&rest.v_full[before.stage], before.parity);
          machine.fence();
          add(before.stage);
          machine.signal(2 - index, BOTH);
          machine.template wait_products<1>();
          machine.settle(x.scores);
          machine.release(&rest.k_empty[turn.stage]);
          if (tile.kind) hide<THREADS>(machine, x.scores, tile, 64 * index);
          weigh<D, THREADS>(x, scale, tile.level);
          machine.template wait_products<0>();
          machine.settle(x.out);
MKA_UNROLL
          for (int i = 0; i < 8; ++i) machine.settle(x.weights[i]);
          machine.release(&rest.v_empty[before.stage]);
MKA_UNROLL
          for (int i = 0; i < D / 2; ++i)
MKA_UNROLL
            for (int l = 0; l < THREADS; ++l) x.out[i][l] *= x.shrink[i / 2 % 2][l];
          round_weights<T, D, THREADS>(x);
        }
      }
      // the mark, and that nothing reads the queries any more
      machine.release(&rest.k_empty[turn.stage]);
      machine.release(&rest.q_empty);
      ++keys;
      if (some) {
        const Turn<Shared::STAGES> last(values++);
        machine.wait(&rest.v_full[last.stage], last.parity);
        machine.settle(x.out);
        machine.fence();
        add(last.stage);
        machine.template wait_products<0>();
        machine.settle(x.out);
        machine.release(&rest.v_empty[last.stage]);
      }
      end(at);
    }
  }
};

}  // namespace wgmma
}  // namespace block
}  // namespace mka
