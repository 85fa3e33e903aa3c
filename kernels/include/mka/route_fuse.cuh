// The fusion's plan and scalar arithmetic, the same on the host and on the device.
//
// A tile is a chunk of tokens by up to 256 channels of one head of one stream; a block of 256 threads works on it. A
// thread has `Vector` neighbouring channels (16 bytes) of up to 8 consecutive tokens; `Lanes` threads lie beside each
// other over the channels, the others one after the other over the tokens.
//
// The scan's state goes from tile to tile of a row by a look-back of fixed order, so that its rounding never depends
// on timing: tiles are counted in the scan's direction (`order`) and grouped by kLink. The last tile of a group
// publishes the state behind it, the others publish their own map of the state. A tile composes the maps of its group
// before it, then applies them to the state that the group before published. So the chain that has to be waited for
// is a kLink-th of the tiles long, and x is read once.
#pragma once

#include <math.h>

#include "mka/common.cuh"

namespace mka {
namespace route_fuse {

constexpr int kThreads = 256;
// Tokens of a thread: as many as its registers hold.
constexpr int kSteps = 8, kStepsWithL3 = 4;
constexpr int kLink = 16;   // tiles of a group of the look-back
constexpr int kLevels = 3;

// The kinds of slots and their packing: ops/route_fuse/slots.py.
enum Kind { kStep = 0, kFresh = 1, kHold = 2 };
enum Mode { kSoft = 0, kFixed = 1, kTop1 = 2, kTop2 = 3 };
MKA_HD int kind_of(uint8_t slot) { return slot & 3; }
MKA_HD int levels_of(uint8_t slot) { return slot >> 2; }

// ---- plan

// Counts are 32 bits wide, offsets of elements 64.
struct Plan {
  int64_t batch, sequence, groups, channels, streams;
  int lanes, vector, steps;
  int chunk;        // tokens of a tile
  int width;        // channels of a tile
  int64_t chunks;   // of a row
  int64_t slices;   // tiles that a head's channels take
  int64_t columns;  // streams * groups * slices
  int64_t tiles;    // at most 2^31 - 1 where there are kernels
};

// Sizes are positive; `vector` divides `channels`.
MKA_HD Plan plan_of(int64_t batch, int64_t sequence, int64_t groups, int64_t channels, int64_t streams, int vector,
                    int steps) {
  Plan p{batch, sequence, groups, channels, streams};
  p.vector = vector;
  p.steps = steps;
  p.lanes = channels <= 8 * vector ? 8 : channels <= 16 * vector ? 16 : 32;
  p.chunk = kThreads / p.lanes * steps;
  p.chunks = ceil_div(sequence, p.chunk);
  p.width = p.lanes * vector;
  p.slices = ceil_div(channels, p.width);
  p.columns = streams * groups * p.slices;
  p.tiles = p.chunks * batch * p.columns;
  return p;
}

struct Tile {
  int order;  // in the scan's direction
  int chunk, row, column, stream, head;
  int channel;    // first channel, of the head
  int64_t first;  // slot
};

// Tiles in the order in which blocks take them: what a tile waits for comes before it.
MKA_HD Tile tile_of(const Plan& p, int ticket, bool reverse) {
  int batch = static_cast<int>(p.batch), columns = static_cast<int>(p.columns);
  int groups = static_cast<int>(p.groups), slices = static_cast<int>(p.slices);
  Tile t;
  t.column = ticket % columns;
  t.row = ticket / columns % batch;
  t.order = ticket / columns / batch;
  t.chunk = reverse ? static_cast<int>(p.chunks) - 1 - t.order : t.order;
  t.stream = t.column / slices / groups;
  t.head = t.column / slices % groups;
  t.channel = t.column % slices * p.width;
  t.first = static_cast<int64_t>(t.chunk) * p.chunk;
  return t;
}

// The number of the tile of the same row and column at another order.
MKA_HD int64_t ticket_of(const Plan& p, const Tile& t, int order) {
  return (order * p.batch + t.row) * p.columns + t.column;
}

// Orders [begin, own) publish maps to compose; begin - 1, where there is one, publishes the state to apply them to.
MKA_HD int link_begin(int order) { return order / kLink * kLink; }
MKA_HD bool publishes_state(int order) { return order % kLink == kLink - 1; }
MKA_HD bool publishes(const Plan& p, int order) { return order + 1 < p.chunks; }

// ---- the scan

// The map s -> a s + b of some slots. a = 0 takes nothing from before, be it NaN.
struct Map {
  float a, b;
};
MKA_HD float apply(const Map& m, float s) { return m.a == 0.0f ? m.b : fmaf(m.a, s, m.b); }
MKA_HD Map then(const Map& first, const Map& second) { return {second.a * first.a, apply(second, first.b)}; }

// One slot: s = a s + b x with (a, b) = (decay, 1 - decay), (0, 1) or (1, 0).
MKA_HD float step(int kind, float decay, float x, float s) {
  return kind == kStep ? fmaf(decay, s - x, x) : kind == kFresh ? x : s;
}
// The factor of the slots' map.
MKA_HD float factor(int kind, float decay, float a) {
  return kind == kStep ? decay * a : kind == kFresh ? 0.0f : a;
}

// The adjoint: `arriving` is the gradient of a slot's state, from its own use and from the slot after it. What it
// hands to the slot before, and what x gets of it.
MKA_HD float handed(int kind, float decay, float arriving) {
  return kind == kStep ? decay * arriving : kind == kFresh ? 0.0f : arriving;
}
MKA_HD float taken(int kind, float decay, float arriving) {
  return kind == kStep ? fmaf(-decay, arriving, arriving) : kind == kFresh ? arriving : 0.0f;
}

// d state / d decay, of the state before and its own derivative; with it the decay's gradient needs no stored states.
MKA_HD float tangent(int kind, float decay, float x, float s_before, float e) {
  return kind == kStep ? fmaf(decay, e, s_before - x) : kind == kFresh ? 0.0f : e;
}

// ---- the route

struct Levels {
  float at[kLevels];
};

// Softmax of the logits whose bit is set; at least one is.
MKA_HD Levels softmax(const Levels& logits, int mask) {
  float top = -INFINITY, sum = 0.0f;
  Levels w;
#pragma unroll
  for (int l = 0; l < kLevels; ++l)
    if (mask >> l & 1) top = fmaxf(top, logits.at[l]);
#pragma unroll
  for (int l = 0; l < kLevels; ++l) {
    w.at[l] = mask >> l & 1 ? expf(logits.at[l] - top) : 0.0f;
    sum += w.at[l];
  }
#pragma unroll
  for (int l = 0; l < kLevels; ++l) w.at[l] = w.at[l] / sum;
  return w;
}

// The bits of the `count` highest logits of those in `mask`; ties go to the lower level.
MKA_HD int highest(const Levels& logits, int mask, int count) {
  int chosen = 0;
#pragma unroll
  for (int pick = 0; pick < 2; ++pick) {
    int best = -1;
    float top = -INFINITY;
#pragma unroll
    for (int l = 0; l < kLevels; ++l) {
      bool open = (mask & ~chosen) >> l & 1;
      if (open && (best < 0 || logits.at[l] > top)) {
        best = l;
        top = logits.at[l];
      }
    }
    if (pick < count && best >= 0) chosen |= 1 << best;
  }
  return chosen;
}

// The weights that the forward pass uses.
MKA_HD Levels route(const Levels& logits, int mask, int mode) {
  if (mode == kFixed) return softmax({{0.0f, 0.0f, 0.0f}}, mask);
  if (mode == kTop1 || mode == kTop2) mask = highest(logits, mask, mode == kTop1 ? 1 : 2);
  return softmax(logits, mask);
}

// Gradient of the logits from that of the weights: straight through to the soft ones, none for fixed.
MKA_HD Levels route_gradient(const Levels& logits, int mask, int mode, const Levels& grad) {
  if (mode == kFixed) return {{0.0f, 0.0f, 0.0f}};
  Levels soft = softmax(logits, mask), result;
  float mean = 0.0f;
#pragma unroll
  for (int l = 0; l < kLevels; ++l) mean = fmaf(soft.at[l], grad.at[l], mean);
#pragma unroll
  for (int l = 0; l < kLevels; ++l) result.at[l] = soft.at[l] * (grad.at[l] - mean);
  return result;
}

// Where L2 and L3 lie in the order of the logits; -1: absent.
MKA_HD int index_l2(bool l2) { return l2 ? 1 : -1; }
MKA_HD int index_l3(bool l2, bool l3) { return l3 ? (l2 ? 2 : 1) : -1; }
MKA_HD float pick(const Levels& w, int index) { return index == 1 ? w.at[1] : index == 2 ? w.at[2] : 0.0f; }

MKA_HD Levels load_logits(const float* from, int64_t levels) {
  return {{from[0], from[1], levels > 2 ? from[2] : 0.0f}};
}

// ---- the mix

// y = x + beta (w2 (s - x) + w3 (m - x)), with the shares beta * w. A level without a share is not read.
MKA_HD float mix(float x, float share2, float s, float share3, float m) {
  float y = x;
  if (share2 != 0.0f) y = fmaf(share2, s - x, y);
  if (share3 != 0.0f) y = fmaf(share3, m - x, y);
  return y;
}

}  // namespace route_fuse
}  // namespace mka
