// The fusion's work on one tile, in phases between which the block synchronises. Every phase is a function of one
// thread, so that the kernels (route_fuse.cu) and the host (route_fuse_host.cu) run the same code.
#pragma once

#include <string.h>

#include "mka/route_fuse.cuh"

namespace mka {
namespace route_fuse {

template <typename Element, int Lanes_, bool L3_>
struct Geometry {
  using T = Element;
  static constexpr int Vector = 16 / sizeof(T);
  static constexpr int Lanes = Lanes_;
  static constexpr bool L3 = L3_;
  static constexpr int Steps = L3 ? kStepsWithL3 : kSteps;
  static constexpr int Rows = kThreads / Lanes;  // of threads, one after the other over the tokens
  static constexpr int Chunk = Rows * Steps;
  static constexpr int Width = Lanes * Vector;
};

// 16 bytes of elements, as they lie in memory.
struct alignas(16) Raw {
  uint32_t word[4];
};

MKA_HD Raw load(const void* from) {
#ifdef __CUDA_ARCH__
  uint4 u = *static_cast<const uint4*>(from);
  return {{u.x, u.y, u.z, u.w}};
#else
  Raw raw;
  memcpy(&raw, from, sizeof raw);
  return raw;
#endif
}
MKA_HD void store(void* to, const Raw& raw) {
#ifdef __CUDA_ARCH__
  __stwb(static_cast<uint4*>(to), make_uint4(raw.word[0], raw.word[1], raw.word[2], raw.word[3]));
#else
  memcpy(to, &raw, sizeof raw);
#endif
}

template <typename T>
struct Codec;
template <>
struct Codec<float> {
  static MKA_HD float get(const Raw& raw, int v) {
    float f;
    memcpy(&f, &raw.word[v], 4);
    return f;
  }
  static MKA_HD void put(Raw& raw, const float (&x)[4]) {
#pragma unroll
    for (int v = 0; v < 4; ++v) memcpy(&raw.word[v], &x[v], 4);
  }
};
template <>
struct Codec<__nv_bfloat16> {
  static MKA_HD float get(const Raw& raw, int v) {
    uint32_t bits = v & 1 ? raw.word[v / 2] & 0xffff0000u : raw.word[v / 2] << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  static MKA_HD void put(Raw& raw, const float (&x)[8]) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * v], x[2 * v + 1]);
      memcpy(&raw.word[v], &pair, 4);
    }
  }
};
template <>
struct Codec<__half> {
  static MKA_HD float get(const Raw& raw, int v) {
    __half_raw half;
    half.x = static_cast<unsigned short>(v & 1 ? raw.word[v / 2] >> 16 : raw.word[v / 2] & 0xffffu);
    return __half2float(__half(half));
  }
  static MKA_HD void put(Raw& raw, const float (&x)[8]) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      __half2 pair = __floats2half2_rn(x[2 * v], x[2 * v + 1]);
      memcpy(&raw.word[v], &pair, 4);
    }
  }
};

// ---- what a block shares

template <class Geo>
struct Shared {
  alignas(16) float a[Geo::Rows][Geo::Width];  // of the map of a thread's slots; then (backward) its part of the decay's gradient
  alignas(16) float b[Geo::Rows][Geo::Width];  // then the state in front of the thread's slots
  float share2[Geo::Chunk], share3[Geo::Chunk];
  uint8_t kind[Geo::Chunk];
};
template <class Geo>
struct BackwardShared : Shared<Geo> {
  alignas(16) float q[Geo::Rows][Geo::Width];  // of the adjoint's map; then what arrives behind the thread's slots
  float dot2[Geo::Chunk], dot3[Geo::Chunk];
};

// A thread's channels of a row, four at a time: alone they would lie in the same banks as its neighbours'.
template <int Vector>
MKA_HD void put_row(float* to, const float (&x)[Vector]) {
#pragma unroll
  for (int v = 0; v < Vector; v += 4) *reinterpret_cast<float4*>(to + v) = make_float4(x[v], x[v + 1], x[v + 2], x[v + 3]);
}
template <int Vector>
MKA_HD void get_row(float (&x)[Vector], const float* from) {
#pragma unroll
  for (int v = 0; v < Vector; v += 4) {
    float4 f = *reinterpret_cast<const float4*>(from + v);
    x[v] = f.x;
    x[v + 1] = f.y;
    x[v + 2] = f.z;
    x[v + 3] = f.w;
  }
}

// ---- where a thread stands

template <class Geo>
struct Place {
  int row, lane, valid;  // valid: of its slots, those within the sequence; 0 also beyond the head's channels
  int64_t at;            // its first element
  int stride;            // elements from one slot to the next
  int64_t channel;       // its first one, of [groups * channels]
  bool inside;           // its channels exist

  MKA_HD Place(const Plan& p, const Tile& t, int thread) {
    row = thread / Geo::Lanes;
    lane = thread % Geo::Lanes;
    int64_t c = t.channel + lane * Geo::Vector, slot = t.first + row * Geo::Steps;
    inside = c < p.channels;
    int64_t left = max64(0, min64(Geo::Steps, p.sequence - slot));
    valid = inside ? static_cast<int>(left) : 0;
    channel = t.head * p.channels + c;
    stride = static_cast<int>(p.groups * p.channels);
    at = (t.row * p.sequence + slot) * (p.groups * p.channels) + channel;
  }
};

// Where the channel `c` of a tile's width lies in [groups * channels]; -1: it does not exist.
MKA_HD int64_t channel_of(const Plan& p, const Tile& t, int c) {
  return t.channel + c < p.channels ? t.head * p.channels + t.channel + c : -1;
}

// The vectors of a contiguous tensor, 0 where there is none.
template <class Geo>
MKA_HD void load_slots(Raw (&to)[Geo::Steps], const void* tensor, const Place<Geo>& at) {
  const typename Geo::T* from = static_cast<const typename Geo::T*>(tensor) + at.at;
#pragma unroll
  for (int i = 0; i < Geo::Steps; ++i, from += at.stride) to[i] = i < at.valid ? load(from) : Raw{{0, 0, 0, 0}};
}

// The same of one that lies within a larger one: `strides` of the tile's stream are those of rows, slots and heads.
template <class Geo>
MKA_HD void load_slots(Raw (&to)[Geo::Steps], const void* tensor, const int64_t (&strides)[6], const Tile& t, const Place<Geo>& at) {
  const int64_t* by = strides + 3 * t.stream;
  const typename Geo::T* from = static_cast<const typename Geo::T*>(tensor) + t.row * by[0] +
                                (t.first + at.row * Geo::Steps) * by[1] + t.head * by[2] + t.channel + at.lane * Geo::Vector;
#pragma unroll
  for (int i = 0; i < Geo::Steps; ++i, from += by[1]) to[i] = i < at.valid ? load(from) : Raw{{0, 0, 0, 0}};
}

// Read anew after a barrier: registers are scarcer than the cache's bandwidth.
template <class Geo>
MKA_HD void load_decay(float (&decay)[Geo::Vector], const float* from, const Place<Geo>& at) {
#pragma unroll
  for (int v = 0; v < Geo::Vector; v += 4) {
    Raw raw = from != nullptr && at.inside ? load(from + at.channel + v) : Raw{{0, 0, 0, 0}};
#pragma unroll
    for (int u = 0; u < 4; ++u) decay[v + u] = Codec<float>::get(raw, u);
  }
}

// ---- phases

// A slot's kind and shares; slots past the sequence hold and have none, and without L2 no state passes any. One thread
// for each slot of the chunk.
template <class Geo>
MKA_HD void gate_phase(Shared<Geo>& sh, const RouteFuseArgs& g, const Tile& t, int thread) {
  if (thread >= Geo::Chunk) return;
  int64_t slot = t.first + thread;
  float share2 = 0.0f, share3 = 0.0f;
  int kind = kHold;
  if (slot < g.sequence) {
    int64_t at = t.row * g.sequence + slot;
    uint8_t packed = g.slots[at];
    bool l2 = g.decay[0] != nullptr, l3 = g.long_term[0] != nullptr;
    int64_t which = g.routes == 1 ? at : at * g.routes + t.head;
    Levels logits = load_logits(g.logits + which * g.levels, g.levels);
    Levels w = route(logits, levels_of(packed), static_cast<int>(g.mode));
    float beta = *g.beta;
    share2 = beta * pick(w, index_l2(l2));
    share3 = beta * pick(w, index_l3(l2, l3));
    kind = l2 ? kind_of(packed) : kFresh;
  }
  sh.kind[thread] = static_cast<uint8_t>(kind);
  sh.share2[thread] = share2;
  sh.share3[thread] = share3;
}

// The map of a thread's slots.
template <class Geo>
MKA_HD void map_phase(Shared<Geo>& sh, const Raw (&x)[Geo::Steps], const float (&decay)[Geo::Vector], const Place<Geo>& at) {
  float b[Geo::Vector];
#pragma unroll
  for (int v = 0; v < Geo::Vector; ++v) b[v] = 0.0f;
#pragma unroll
  for (int i = 0; i < Geo::Steps; ++i) {
    int kind = sh.kind[at.row * Geo::Steps + i];
#pragma unroll
    for (int v = 0; v < Geo::Vector; ++v) b[v] = step(kind, decay[v], Codec<typename Geo::T>::get(x[i], v), b[v]);
  }
  put_row(&sh.b[at.row][at.lane * Geo::Vector], b);
  float a[Geo::Vector];
#pragma unroll
  for (int v = 0; v < Geo::Vector; ++v) a[v] = 1.0f;
#pragma unroll
  for (int i = 0; i < Geo::Steps; ++i) {
    int kind = sh.kind[at.row * Geo::Steps + i];
#pragma unroll
    for (int v = 0; v < Geo::Vector; ++v) a[v] = factor(kind, decay[v], a[v]);
  }
  put_row(&sh.a[at.row][at.lane * Geo::Vector], a);
}

// Without L2: what the other phases read of the scan.
template <class Geo>
MKA_HD void no_scan_phase(Shared<Geo>& sh, const Place<Geo>& at) {
#pragma unroll
  for (int v = 0; v < Geo::Vector; ++v) sh.b[at.row][at.lane * Geo::Vector + v] = 0.0f;
}
template <class Geo>
MKA_HD void no_scan_phase(BackwardShared<Geo>& sh, const Place<Geo>& at) {
  no_scan_phase(static_cast<Shared<Geo>&>(sh), at);
#pragma unroll
  for (int v = 0; v < Geo::Vector; ++v) sh.q[at.row][at.lane * Geo::Vector + v] = 0.0f;
}

// The map of the whole chunk for a channel.
template <class Geo>
MKA_HD Map total(const Shared<Geo>& sh, int c) {
  Map m{1.0f, 0.0f};
#pragma unroll 4
  for (int row = 0; row < Geo::Rows; ++row) m = then(m, {sh.a[row][c], sh.b[row][c]});
  return m;
}

// The state in front of every thread's slots, from the one in front of the chunk; returns the one behind it.
template <class Geo>
MKA_HD float spread(Shared<Geo>& sh, int c, float s) {
#pragma unroll 4
  for (int row = 0; row < Geo::Rows; ++row) {
    Map m{sh.a[row][c], sh.b[row][c]};
    sh.b[row][c] = s;
    s = apply(m, s);
  }
  return s;
}

template <class Geo>
MKA_HD void mix_phase(const Shared<Geo>& sh, const Raw (&x)[Geo::Steps], const Raw* m, const float (&decay)[Geo::Vector],
                      void* y, const Place<Geo>& at) {
  using C = Codec<typename Geo::T>;
  float s[Geo::Vector];
  get_row(s, &sh.b[at.row][at.lane * Geo::Vector]);
  typename Geo::T* to = static_cast<typename Geo::T*>(y) + at.at;
#pragma unroll
  for (int i = 0; i < Geo::Steps; ++i) {
    int slot = at.row * Geo::Steps + i, kind = sh.kind[slot];
    float share2 = sh.share2[slot], share3 = sh.share3[slot], out[Geo::Vector];
#pragma unroll
    for (int v = 0; v < Geo::Vector; ++v) {
      float token = C::get(x[i], v);
      s[v] = step(kind, decay[v], token, s[v]);
      out[v] = mix(token, share2, s[v], share3, m == nullptr ? 0.0f : C::get(m[i], v));
    }
    Raw raw;
    C::put(raw, out);
    if (i < at.valid) store(to, raw);
    to += at.stride;
  }
}

// The adjoint's map of a thread's slots, from the last to the first; its factor is that of the forward map.
template <class Geo>
MKA_HD void adjoint_phase(BackwardShared<Geo>& sh, const Raw (&grad)[Geo::Steps], const float (&decay)[Geo::Vector],
                          const Place<Geo>& at) {
  float q[Geo::Vector];
#pragma unroll
  for (int v = 0; v < Geo::Vector; ++v) q[v] = 0.0f;
#pragma unroll
  for (int i = Geo::Steps - 1; i >= 0; --i) {
    int slot = at.row * Geo::Steps + i, kind = sh.kind[slot];
    float share2 = sh.share2[slot];
#pragma unroll
    for (int v = 0; v < Geo::Vector; ++v)
      q[v] = handed(kind, decay[v], fmaf(share2, Codec<typename Geo::T>::get(grad[i], v), q[v]));
  }
  put_row(&sh.q[at.row][at.lane * Geo::Vector], q);
}

template <class Geo>
MKA_HD Map adjoint_total(const BackwardShared<Geo>& sh, int c) {
  Map m{1.0f, 0.0f};
#pragma unroll 4
  for (int row = Geo::Rows - 1; row >= 0; --row) m = then(m, {sh.a[row][c], sh.q[row][c]});
  return m;
}

// What arrives behind every thread's slots, from what arrives behind the chunk; returns what leaves in front of it.
template <class Geo>
MKA_HD float adjoint_spread(BackwardShared<Geo>& sh, int c, float q) {
#pragma unroll 4
  for (int row = Geo::Rows - 1; row >= 0; --row) {
    Map m{sh.a[row][c], sh.q[row][c]};
    sh.q[row][c] = q;
    q = apply(m, q);
  }
  return q;
}

// The thread's part of every slot's products grad . (level - x), given to `keep(slot of the thread, L2's, L3's)`, and of
// the decay's gradient.
template <class Geo, class Keep>
MKA_HD void product_phase(const BackwardShared<Geo>& sh, const Raw (&x)[Geo::Steps], const Raw (&grad)[Geo::Steps],
                          const void* long_term, const float (&decay)[Geo::Vector], const Place<Geo>& at,
                          float (&slope)[Geo::Vector], const Keep& keep) {
  using C = Codec<typename Geo::T>;
  float s[Geo::Vector], e[Geo::Vector];
  get_row(s, &sh.b[at.row][at.lane * Geo::Vector]);
#pragma unroll
  for (int v = 0; v < Geo::Vector; ++v) e[v] = slope[v] = 0.0f;
  const typename Geo::T* from = static_cast<const typename Geo::T*>(long_term) + at.at;
#pragma unroll
  for (int i = 0; i < Geo::Steps; ++i) {
    int slot = at.row * Geo::Steps + i, kind = sh.kind[slot];
    float share2 = sh.share2[slot];
    Raw m = long_term != nullptr && i < at.valid ? load(from) : Raw{{0, 0, 0, 0}};
    float dot2 = 0.0f, dot3 = 0.0f;
#pragma unroll
    for (int v = 0; v < Geo::Vector; ++v) {
      float token = C::get(x[i], v), dy = C::get(grad[i], v);
      e[v] = tangent(kind, decay[v], token, s[v], e[v]);
      s[v] = step(kind, decay[v], token, s[v]);
      slope[v] = fmaf(share2 * dy, e[v], slope[v]);
      dot2 = fmaf(dy, s[v] - token, dot2);
      if (long_term != nullptr) dot3 = fmaf(dy, C::get(m, v) - token, dot3);
    }
    keep(i, dot2, dot3);
    from += at.stride;
  }
  // the tangent at the end meets what arrives from behind
  float q[Geo::Vector];
  get_row(q, &sh.q[at.row][at.lane * Geo::Vector]);
#pragma unroll
  for (int v = 0; v < Geo::Vector; ++v) slope[v] = fmaf(q[v], e[v], slope[v]);
}

// The gradients of x and of the long-term vectors, from the last slot to the first.
template <class Geo>
MKA_HD void gradient_phase(const BackwardShared<Geo>& sh, const Raw (&grad)[Geo::Steps], const float (&decay)[Geo::Vector],
                           void* grad_x, void* grad_long_term, const Place<Geo>& at) {
  using C = Codec<typename Geo::T>;
  float q[Geo::Vector];
  get_row(q, &sh.q[at.row][at.lane * Geo::Vector]);
  typename Geo::T* to_x = static_cast<typename Geo::T*>(grad_x) + at.at + (Geo::Steps - 1) * static_cast<int64_t>(at.stride);
  typename Geo::T* to_m = static_cast<typename Geo::T*>(grad_long_term) + at.at + (Geo::Steps - 1) * static_cast<int64_t>(at.stride);
#pragma unroll
  for (int i = Geo::Steps - 1; i >= 0; --i) {
    int slot = at.row * Geo::Steps + i, kind = sh.kind[slot];
    float share2 = sh.share2[slot], share3 = sh.share3[slot], dx[Geo::Vector], dm[Geo::Vector];
    float own = 1.0f - share2 - share3;
#pragma unroll
    for (int v = 0; v < Geo::Vector; ++v) {
      float dy = C::get(grad[i], v);
      float arriving = fmaf(share2, dy, q[v]);
      dx[v] = fmaf(own, dy, taken(kind, decay[v], arriving));
      dm[v] = share3 * dy;
      q[v] = handed(kind, decay[v], arriving);
    }
    Raw raw;
    C::put(raw, dx);
    if (i < at.valid) store(to_x, raw);
    if (grad_long_term != nullptr) {
      C::put(raw, dm);
      if (i < at.valid) store(to_m, raw);
      to_m -= at.stride;
    }
    to_x -= at.stride;
  }
}

// ---- what remains after the tiles

// Partial results of the backward's tiles.
struct Partials {
  float* dot2;   // [columns, batch * sequence]
  float* dot3;
  float* slope;  // [columns, batch, chunks, width]
  float* beta;   // [blocks of the gate's gradient]
};

// The gradient of one route's logits; returns its part of beta's.
MKA_HD float gate_gradient(const RouteFuseArgs& g, const Plan& p, const Partials& parts, int64_t which) {
  int64_t at = which / g.routes, head = which % g.routes, per_stream = p.columns / p.streams;
  int64_t begin = g.routes == 1 ? 0 : head * p.slices, count = g.routes == 1 ? per_stream : p.slices;
  int64_t slots = g.batch * g.sequence;
  bool l2 = g.decay[0] != nullptr, l3 = g.long_term[0] != nullptr;
  float dot2 = 0.0f, dot3 = 0.0f;
  for (int64_t stream = 0; stream < p.streams; ++stream) {
    for (int64_t i = 0; i < count; ++i) {
      int64_t from = (stream * per_stream + begin + i) * slots + at;
      dot2 += parts.dot2[from];
      if (l3) dot3 += parts.dot3[from];
    }
  }
  Levels logits = load_logits(g.logits + which * g.levels, g.levels);
  int mask = levels_of(g.slots[at]), mode = static_cast<int>(g.mode), i2 = index_l2(l2), i3 = index_l3(l2, l3);
  Levels w = route(logits, mask, mode);
  float beta = *g.beta;
  Levels grad{{0.0f, i2 == 1 ? beta * dot2 : i3 == 1 ? beta * dot3 : 0.0f, i3 == 2 ? beta * dot3 : 0.0f}};
  Levels result = route_gradient(logits, mask, mode, grad);
  float* to = g.grad_logits + which * g.levels;
  to[0] = result.at[0];
  to[1] = result.at[1];
  if (g.levels > 2) to[2] = result.at[2];
  return (l2 ? pick(w, i2) * dot2 : 0.0f) + (l3 ? pick(w, i3) * dot3 : 0.0f);
}

// Every `of`-th of the tiles' parts of a channel's decay gradient, from `thread` on.
MKA_HD float slope_sum(const Plan& p, const Partials& parts, int64_t column, int64_t c, int thread, int of) {
  const float* from = parts.slope + column * p.batch * p.chunks * p.width + c;
  float sum = 0.0f;
  for (int64_t i = thread; i < p.batch * p.chunks; i += of) sum += from[i * p.width];
  return sum;
}

}  // namespace route_fuse
}  // namespace mka
