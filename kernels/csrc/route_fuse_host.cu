// The fusion's blocks and threads one after the other on the host, by the kernels' own phases, plan and look-back: what
// can be shown of them without a GPU. Also the plan's and the scalar functions' doors for tests.
#include <vector>

#include "mka/route_fuse_launch.cuh"

namespace mka {
namespace route_fuse {
namespace {

constexpr int kBlock = kThreads;

// A block begins with whatever shared memory holds: all bits set, which is NaN.
template <class S>
void poison(S& shared) {
  memset(static_cast<void*>(&shared), 0xff, sizeof shared);
}

// The look-back over links that an earlier tile has left; NaN where none has, so that a wrong order shows.
struct Links {
  std::vector<Map> at;
  const Plan& p;
  explicit Links(const Plan& plan) : at(plan.tiles * plan.width, Map{NAN, NAN}), p(plan) {}

  float look_back(const Tile& t, int ticket, int c, const Map& own, float initial) {
    bool gives = publishes(p, t.order), state = publishes_state(t.order);
    if (gives && !state) at[static_cast<int64_t>(ticket) * p.width + c] = own;
    int begin = link_begin(t.order);
    Map m{1.0f, 0.0f};
    for (int order = begin; order < t.order; ++order) m = then(m, at[ticket_of(p, t, order) * p.width + c]);
    float s = begin > 0 ? at[ticket_of(p, t, begin - 1) * p.width + c].b : initial;
    s = apply(m, s);
    if (gives && state) at[static_cast<int64_t>(ticket) * p.width + c] = {0.0f, apply(own, s)};
    return s;
  }
};

template <class Geo>
struct Thread {
  Raw x[Geo::Steps], other[Geo::Steps];
  float decay[Geo::Vector], dot2[Geo::Steps], dot3[Geo::Steps], slope[Geo::Vector];
};

template <class Geo>
int run_forward(const RouteFuseArgs& g, const Plan& p) {
  Links links(p);
  std::vector<Thread<Geo>> threads(kBlock);
  std::vector<Shared<Geo>> shared(1);
  Shared<Geo>& sh = shared[0];
  bool l3 = g.long_term[0] != nullptr;
  for (int ticket = 0; ticket < p.tiles; ++ticket) {
    Tile t = tile_of(p, ticket, false);
    poison(sh);
    for (int i = 0; i < kBlock; ++i) {
      Place<Geo> at(p, t, i);
      load_slots(threads[i].x, g.x[t.stream], g.x_strides, t, at);
      if (l3) load_slots(threads[i].other, g.long_term[t.stream], at);
      load_decay(threads[i].decay, g.decay[t.stream], at);
      gate_phase(sh, g, t, i);
    }
    if (g.decay[0] == nullptr) {
      for (int i = 0; i < kBlock; ++i) no_scan_phase(sh, Place<Geo>(p, t, i));
    } else {
      for (int i = 0; i < kBlock; ++i) map_phase(sh, threads[i].x, threads[i].decay, Place<Geo>(p, t, i));
      for (int c = 0; c < Geo::Width; ++c) {
        forward_column(sh, g, p, t, c, [&](const Map& own, float initial) {
          return links.look_back(t, ticket, c, own, initial);
        });
      }
    }
    for (int i = 0; i < kBlock; ++i)
      mix_phase(sh, threads[i].x, l3 ? threads[i].other : nullptr, threads[i].decay, g.y[t.stream], Place<Geo>(p, t, i));
  }
  return 0;
}

template <class Geo>
int run_backward(const RouteFuseArgs& g, const Plan& p) {
  Links links(p);
  std::vector<char> memory(workspace_of(g, p, true).bytes, static_cast<char>(0xff));
  RouteFuseArgs here = g;
  here.workspace = memory.data();
  Partials parts = workspace_of(here, p, true).parts;
  std::vector<Thread<Geo>> threads(kBlock);
  std::vector<BackwardShared<Geo>> shared(1);
  BackwardShared<Geo>& sh = shared[0];
  bool l3 = g.long_term[0] != nullptr;
  for (int ticket = 0; ticket < p.tiles; ++ticket) {
    Tile t = tile_of(p, ticket, true);
    poison(sh);
    for (int i = 0; i < kBlock; ++i) {
      Place<Geo> at(p, t, i);
      load_slots(threads[i].other, g.grad_y[t.stream], g.grad_strides, t, at);
      load_slots(threads[i].x, g.x[t.stream], g.x_strides, t, at);
      load_decay(threads[i].decay, g.decay[t.stream], at);
      gate_phase<Geo>(sh, g, t, i);
    }
    if (g.decay[0] == nullptr) {
      for (int i = 0; i < kBlock; ++i) no_scan_phase(sh, Place<Geo>(p, t, i));
    } else {
      for (int i = 0; i < kBlock; ++i) {
        Place<Geo> at(p, t, i);
        map_phase<Geo>(sh, threads[i].x, threads[i].decay, at);
        adjoint_phase(sh, threads[i].other, threads[i].decay, at);
      }
      for (int c = 0; c < Geo::Width; ++c) {
        backward_column(sh, g, p, t, c, [&](const Map& own, float initial) {
          return links.look_back(t, ticket, c, own, initial);
        });
      }
    }
    for (int i = 0; i < kBlock; ++i) {
      Thread<Geo>& me = threads[i];
      Place<Geo> at(p, t, i);
      product_phase(sh, me.x, me.other, l3 ? g.long_term[t.stream] : nullptr, me.decay, at, me.slope,
                    [&](int slot, float dot2, float dot3) {
                      me.dot2[slot] = dot2;
                      me.dot3[slot] = dot3;
                    });
      keep_slope(sh, me.slope, at);
    }
    // the butterfly of a row's lanes
    for (int by = Geo::Lanes / 2; by > 0; by /= 2) {
      std::vector<Thread<Geo>> before = threads;
      for (int i = 0; i < kBlock; ++i) {
        for (int slot = 0; slot < Geo::Steps; ++slot) {
          threads[i].dot2[slot] += before[i ^ by].dot2[slot];
          threads[i].dot3[slot] += before[i ^ by].dot3[slot];
        }
      }
    }
    for (int i = 0; i < kBlock; ++i) {
      Place<Geo> at(p, t, i);
      for (int slot = 0; slot < Geo::Steps && at.lane == 0; ++slot)
        keep_dots(sh, at.row * Geo::Steps + slot, threads[i].dot2[slot], threads[i].dot3[slot]);
      gradient_phase(sh, threads[i].other, threads[i].decay, g.grad_x[t.stream],
                     l3 ? g.grad_long_term[t.stream] : nullptr, at);
    }
    for (int i = 0; i < kBlock; ++i) partials_phase(sh, g, p, t, parts, i);
  }

  std::vector<float> sums(kFinish);
  for (int64_t block = 0; block < gate_blocks(g); ++block) {
    for (int i = 0; i < kThreads; ++i) {
      int64_t which = block * kThreads + i;
      sums[i] = which < routes_of(g) ? gate_gradient(g, p, parts, which) : 0.0f;
    }
    for (int by = kThreads / 2; by > 0; by /= 2)
      for (int i = 0; i < by; ++i) sums[i] += sums[i + by];
    parts.beta[block] = sums[0];
  }
  for (int64_t block = 0; block < finish_blocks(g, p); ++block) {
    bool beta = block == slope_blocks(g, p);
    for (int i = 0; i < kFinish; ++i) sums[i] = finish_part(g, p, parts, finish_at(beta, p, block, i));
    int least = finish_at(beta, p, block, 0).least;
    for (int by = kFinish / 2; by >= least; by /= 2)
      for (int i = 0; i < by; ++i) sums[i] += sums[i + by];
    for (int i = 0; i < least; ++i) finish_store(g, p, finish_at(beta, p, block, i), sums[i]);
  }
  return 0;
}

}  // namespace
}  // namespace route_fuse
}  // namespace mka

using namespace mka::route_fuse;

int mka_host_route_fuse_forward(const RouteFuseArgs* args) {
  if (!supported(*args, false)) return MKA_REFUSED;
  MKA_ROUTE_FUSE_DISPATCH(*args, run_forward);
}

int mka_host_route_fuse_backward(const RouteFuseArgs* args) {
  if (!supported(*args, true)) return MKA_REFUSED;
  MKA_ROUTE_FUSE_DISPATCH(*args, run_backward);
}

int mka_plan_route_fuse(const RouteFuseArgs* args, int64_t plan[4]) {
  Plan p = plan_of(*args);
  plan[0] = p.chunk;
  plan[1] = p.chunks;
  plan[2] = p.width;
  plan[3] = p.tiles;
  return 0;
}

int mka_plan_route_fuse_tile(const RouteFuseArgs* args, int64_t ticket, int reverse, int64_t tile[8]) {
  Tile t = tile_of(plan_of(*args), static_cast<int>(ticket), reverse != 0);
  const int64_t fields[8] = {t.order, t.chunk, t.row, t.column, t.stream, t.head, t.channel, t.first};
  for (int i = 0; i < 8; ++i) tile[i] = fields[i];
  return 0;
}

int mka_host_route(const float logits[3], int mask, int mode, const float grad[3], float result[6]) {
  Levels l{{logits[0], logits[1], logits[2]}};
  Levels w = route(l, mask, mode);
  Levels d = route_gradient(l, mask, mode, {{grad[0], grad[1], grad[2]}});
  for (int i = 0; i < kLevels; ++i) {
    result[i] = w.at[i];
    result[kLevels + i] = d.at[i];
  }
  return 0;
}

int64_t mka_route_fuse_workspace_bytes(const RouteFuseArgs* args, int backward) {
  return workspace_of(*args, plan_of(*args), backward != 0).bytes;
}
