// The fusion's workspace, argument checks, and the parts of its kernels that a thread does for a channel or at the end.
#pragma once

#include <initializer_list>

#include "mka/route_fuse_tile.cuh"

namespace mka {
namespace route_fuse {

constexpr int kFinish = 1024;  // threads of the last kernel's blocks

struct Workspace {
  uint32_t* counter;  // tickets taken
  uint32_t* flags;    // [tiles, width / 32]
  float* links;       // [tiles, width, 2]
  Partials parts;     // backward
  int64_t cleared;    // bytes from `counter` on that are 0 at first
  int64_t bytes;
};

inline Plan plan_of(const RouteFuseArgs& g) {
  return plan_of(g.batch, g.sequence, g.groups, g.channels, g.streams, g.dtype == MKA_FP32 ? 4 : 8,
                 g.long_term[0] != nullptr ? kStepsWithL3 : kSteps);
}

MKA_HD int64_t routes_of(const RouteFuseArgs& g) { return g.batch * g.sequence * g.routes; }
inline int64_t gate_blocks(const RouteFuseArgs& g) { return ceil_div(routes_of(g), kThreads); }
MKA_HD int64_t slope_blocks(const RouteFuseArgs& g, const Plan& p) {
  return g.decay[0] == nullptr ? 0 : p.columns * p.width / 32;
}
MKA_HD int64_t finish_blocks(const RouteFuseArgs& g, const Plan& p) { return slope_blocks(g, p) + 1; }

inline Workspace workspace_of(const RouteFuseArgs& g, const Plan& p, bool backward) {
  char* base = static_cast<char*>(g.workspace);
  int64_t used = 0;
  auto take = [&](int64_t bytes) {
    int64_t at = used;
    used += ceil_div(bytes, 256) * 256;
    return base + at;
  };
  Workspace w{};
  w.counter = reinterpret_cast<uint32_t*>(take(4));
  w.flags = reinterpret_cast<uint32_t*>(take(p.tiles * (p.width / 32) * 4));
  w.cleared = used;
  w.links = reinterpret_cast<float*>(take(p.tiles * p.width * 8));
  if (backward) {
    w.parts.dot2 = reinterpret_cast<float*>(take(p.columns * g.batch * g.sequence * 4));
    w.parts.dot3 = reinterpret_cast<float*>(take(p.columns * g.batch * g.sequence * 4));
    w.parts.slope = reinterpret_cast<float*>(take(p.tiles * p.width * 4));
    w.parts.beta = reinterpret_cast<float*>(take(gate_blocks(g) * 4));
  }
  w.bytes = used;
  return w;
}

// Sizes and alignments that the kernels can do.
inline bool supported(const RouteFuseArgs& g, bool backward) {
  if (g.dtype < MKA_FP32 || g.dtype > MKA_FP16) return false;
  if (g.batch < 1 || g.sequence < 1 || g.groups < 1 || g.channels < 1) return false;
  if (g.streams < 1 || g.streams > 2 || (g.routes != 1 && g.routes != g.groups)) return false;
  if (g.mode < kSoft || g.mode > kTop2) return false;
  const int64_t vector = g.dtype == MKA_FP32 ? 4 : 8;
  if (g.channels % vector != 0) return false;
  bool l2 = g.decay[0] != nullptr, l3 = g.long_term[0] != nullptr;
  if (g.levels != 1 + l2 + l3 || g.levels < 2) return false;
  const int64_t most = INT32_MAX / 2;
  for (int64_t size : {g.batch, g.sequence, g.groups, g.channels})
    if (size > most) return false;
  if (g.groups * g.channels > most || plan_of(g).tiles > most || gate_blocks(g) > most) return false;
  for (int64_t s = 0; s < g.streams; ++s) {
    if ((g.decay[s] != nullptr) != l2 || (g.long_term[s] != nullptr) != l3) return false;
    const void* large[] = {g.x[s], g.long_term[s], g.decay[s], backward ? g.grad_y[s] : g.y[s],
                           backward ? g.grad_x[s] : nullptr, backward ? g.grad_long_term[s] : nullptr};
    for (const void* each : large)
      if (!aligned(each, 16)) return false;
    for (int64_t axis = 3 * s; axis < 3 * s + 3; ++axis)
      if (g.x_strides[axis] % vector != 0 || (backward && g.grad_strides[axis] % vector != 0)) return false;
  }
  return aligned(g.workspace, 16);
}

// ---- a channel of a tile: `arrives` gives what comes in from other tiles, given the tile's own map

template <class Geo, class Arrives>
MKA_HD void forward_column(Shared<Geo>& sh, const RouteFuseArgs& g, const Plan& p, const Tile& t, int c,
                           const Arrives& arrives) {
  int64_t channel = channel_of(p, t, c), all = p.groups * p.channels;
  const float* carry = g.carry[t.stream];
  float initial = carry != nullptr && channel >= 0 ? carry[t.row * all + channel] : 0.0f;
  float s = arrives(total(sh, c), initial);
  if (channel >= 0) g.states[t.stream][(t.row * p.chunks + t.chunk) * all + channel] = s;
  s = spread(sh, c, s);
  if (channel >= 0 && t.chunk == p.chunks - 1) g.last[t.stream][t.row * all + channel] = s;
}

template <class Geo, class Arrives>
MKA_HD void backward_column(BackwardShared<Geo>& sh, const RouteFuseArgs& g, const Plan& p, const Tile& t, int c,
                            const Arrives& arrives) {
  int64_t channel = channel_of(p, t, c), all = p.groups * p.channels;
  const float* last = g.grad_last[t.stream];
  float initial = last != nullptr && channel >= 0 ? last[t.row * all + channel] : 0.0f;
  float q = arrives(adjoint_total(sh, c), initial);
  q = adjoint_spread(sh, c, q);
  if (channel >= 0 && t.chunk == 0 && g.grad_carry[t.stream] != nullptr)
    g.grad_carry[t.stream][t.row * all + channel] = q;
  spread(sh, c, channel >= 0 ? g.states[t.stream][(t.row * p.chunks + t.chunk) * all + channel] : 0.0f);
}

// ---- the backward's parts of a tile

template <class Geo>
MKA_HD void keep_slope(BackwardShared<Geo>& sh, const float (&slope)[Geo::Vector], const Place<Geo>& at) {
  put_row(&sh.a[at.row][at.lane * Geo::Vector], slope);
}
template <class Geo>
MKA_HD void keep_dots(BackwardShared<Geo>& sh, int slot, float dot2, float dot3) {
  sh.dot2[slot] = dot2;
  sh.dot3[slot] = dot3;
}

template <class Geo>
MKA_HD void partials_phase(const BackwardShared<Geo>& sh, const RouteFuseArgs& g, const Plan& p, const Tile& t,
                           const Partials& parts, int thread) {
  if (thread < Geo::Chunk && t.first + thread < g.sequence) {
    int64_t at = (t.column * g.batch + t.row) * g.sequence + t.first + thread;
    parts.dot2[at] = sh.dot2[thread];
    if (g.long_term[0] != nullptr) parts.dot3[at] = sh.dot3[thread];
  }
  if (thread < Geo::Width && g.decay[0] != nullptr) {
    float sum = 0.0f;
    for (int row = 0; row < Geo::Rows; ++row) sum += sh.a[row][thread];
    parts.slope[((t.column * g.batch + t.row) * p.chunks + t.chunk) * p.width + thread] = sum;
  }
}

// ---- the last sums

// What a thread of the last kernel adds up: `least` results per block, each by kFinish / least threads.
struct Finish {
  bool beta;
  int64_t column, c;
  int first, of, least;
};
MKA_HD Finish finish_at(bool beta, const Plan& p, int64_t block, int thread) {
  Finish f;
  f.beta = beta;
  f.least = beta ? 1 : 32;
  f.of = kFinish / f.least;
  f.first = thread / f.least;
  int64_t per_column = p.width / 32;
  f.column = block / per_column;
  f.c = block % per_column * 32 + thread % 32;
  return f;
}
MKA_HD float finish_part(const RouteFuseArgs& g, const Plan& p, const Partials& parts, const Finish& f) {
  if (!f.beta) return slope_sum(p, parts, f.column, f.c, f.first, f.of);
  float sum = 0.0f;
  int64_t count = ceil_div(routes_of(g), kThreads);
  for (int64_t i = f.first; i < count; i += f.of) sum += parts.beta[i];
  return sum;
}
MKA_HD void finish_store(const RouteFuseArgs& g, const Plan& p, const Finish& f, float sum) {
  if (f.beta) {
    *g.grad_beta = sum;
    return;
  }
  int64_t head = f.column / p.slices % p.groups, channel = f.column % p.slices * p.width + f.c;
  if (channel < p.channels) g.grad_decay[f.column / p.slices / p.groups][head * p.channels + channel] = sum;
}

}  // namespace route_fuse
}  // namespace mka

// return run<Geometry<T, Lanes, L3>>(args, plan, ...) for the element type, the plan's lanes and whether there is an L3.
#define MKA_ROUTE_FUSE_LANES(args, run, T, L3, ...)                            \
  switch (plan.lanes) {                                                        \
    case 8:                                                                    \
      return run<Geometry<T, 8, L3>>(args, plan, ##__VA_ARGS__);               \
    case 16:                                                                   \
      return run<Geometry<T, 16, L3>>(args, plan, ##__VA_ARGS__);              \
    default:                                                                   \
      return run<Geometry<T, 32, L3>>(args, plan, ##__VA_ARGS__);              \
  }
#define MKA_ROUTE_FUSE_DISPATCH(args, run, ...)                                \
  Plan plan = plan_of(args);                                                   \
  MKA_DISPATCH_DTYPE((args).dtype, T, {                                        \
    if ((args).long_term[0] != nullptr) {                                      \
      MKA_ROUTE_FUSE_LANES(args, run, T, true, ##__VA_ARGS__)                  \
    }                                                                          \
    MKA_ROUTE_FUSE_LANES(args, run, T, false, ##__VA_ARGS__)                   \
  })                                                                           \
  return MKA_REFUSED
