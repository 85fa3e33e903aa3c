// The decode's update path: fusing a token's keys and values, appending it, closing chunks.
#include <memory>

#include "mka/decode_update.cuh"

namespace mka {
namespace decode {

template <typename T>
__global__ void __launch_bounds__(THREADS) fuse_kernel(const MkaDecodeFuseArgs a) {
  const bool values = blockIdx.y == 1;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if ((values ? a.x_v : a.x_k) && i < a.batch * a.groups * a.channels) fuse_element<T>(a, values, i);
}

template <typename T>
__global__ void __launch_bounds__(THREADS) append_kernel(const MkaDecodeAppendArgs a) {
  const int64_t b = blockIdx.x;
  const Slot slot = open_slot(a, b);
  if (slot.at < 0) return;
  for (int64_t i = threadIdx.x; i < a.groups * a.channels; i += THREADS) append_element<T>(a, b, slot, i);
  __syncthreads();
  if (threadIdx.x == 0) append_end(a, b, slot);
}

template <typename T, int D>
__global__ void __launch_bounds__(THREADS) close_kernel(const MkaDecodeCloseArgs a) {
  __shared__ CloseShared s;
  const int64_t g = blockIdx.x, b = blockIdx.y;
  const int thread = threadIdx.x;
  const int64_t tokens = closing(a, b);
  if (!tokens) return;
  close_summary<T>(a, b, g, tokens, thread, s);
  __syncthreads();
  if (a.planes) close_sides<D>(a, thread, s);
  __syncthreads();
  close_code(a, b, g, thread, s);
  if (!a.planes) return;
  __syncthreads();
  close_sides<D>(a, thread, s);
  __syncthreads();
  close_query(a, thread, s);
  __syncthreads();
  int64_t before = -1;
  for (int64_t round = 0; round < a.recalled_chunks; ++round) {
    select_own(a, b, g, before, thread, s);
    __syncthreads();
    select_some(thread, s);
    __syncthreads();
    before = select_best(round, thread, s);
  }
  __syncthreads();
  select_write(a, b, g, thread, s);
}

// After close_kernel, whose blocks all read the number of the open chunk.
__global__ void advance_kernel(const MkaDecodeCloseArgs a) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (b < a.batch && closing(a, b)) a.chunk[b] += 1;
}

template <typename T, int D>
void close_host(const MkaDecodeCloseArgs& a) {
  auto s = std::make_unique<CloseShared>();
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t tokens = closing(a, b);
    if (!tokens) continue;
    for (int64_t g = 0; g < a.groups; ++g) {
      for (int t = 0; t < THREADS; ++t) close_summary<T>(a, b, g, tokens, t, *s);
      for (int t = 0; a.planes && t < THREADS; ++t) close_sides<D>(a, t, *s);
      for (int t = 0; t < THREADS; ++t) close_code(a, b, g, t, *s);
      if (!a.planes) continue;
      for (int t = 0; t < THREADS; ++t) close_sides<D>(a, t, *s);
      for (int t = 0; t < THREADS; ++t) close_query(a, t, *s);
      int64_t before = -1, next = -1;
      for (int64_t round = 0; round < a.recalled_chunks; ++round, before = next) {
        for (int t = 0; t < THREADS; ++t) select_own(a, b, g, before, t, *s);
        for (int t = 0; t < THREADS; ++t) select_some(t, *s);
        for (int t = 0; t < THREADS; ++t) next = select_best(round, t, *s);
      }
      for (int t = 0; t < THREADS; ++t) select_write(a, b, g, t, *s);
    }
    a.chunk[b] += 1;
  }
}

template <typename T, int D>
void close(const MkaDecodeCloseArgs& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(a.groups), static_cast<unsigned>(a.batch));
  close_kernel<T, D><<<grid, THREADS, 0, stream>>>(a);
  advance_kernel<<<static_cast<unsigned>(ceil_div(a.batch, THREADS)), THREADS, 0, stream>>>(a);
}

bool possible(const MkaDecodeFuseArgs& a) { return a.share_groups >= 1 && a.levels >= 1; }

bool possible(const MkaDecodeAppendArgs& a) {
  return a.groups > 0 && a.heads % a.groups == 0 && (a.code_sum == nullptr) == (a.queries == nullptr);
}

bool possible(const MkaDecodeCloseArgs& a) {
  if (a.batch > 65535 || a.rotated % 2 || a.rotated > a.channels || a.window < 1) return false;
  if (!a.planes) return true;
  return a.words > 0 && a.words <= MAX_WORDS && a.tables > 0 && a.words % a.tables == 0 &&
         a.recalled_chunks <= MAX_RECALLED && aligned(a.planes, 16);
}

}  // namespace decode
}  // namespace mka

int mka_decode_fuse(const MkaDecodeFuseArgs* args, void* stream) {
  using namespace mka;
  const MkaDecodeFuseArgs& a = *args;
  if (!decode::possible(a)) return MKA_REFUSED;
  const int64_t count = a.batch * a.groups * a.channels;
  if (count == 0) return 0;
  const dim3 grid(static_cast<unsigned>(ceil_div(count, decode::THREADS)), 2);
  MKA_DISPATCH_DTYPE(a.dtype, T, decode::fuse_kernel<T><<<grid, decode::THREADS, 0, static_cast<cudaStream_t>(stream)>>>(a));
  return launched();
}

int mka_host_decode_fuse(const MkaDecodeFuseArgs* args) {
  using namespace mka;
  const MkaDecodeFuseArgs& a = *args;
  if (!decode::possible(a)) return MKA_REFUSED;
  for (int64_t i = 0; i < 2 * a.batch * a.groups * a.channels; ++i) {
    const bool values = i % 2;
    if (!(values ? a.x_v : a.x_k)) continue;
    MKA_DISPATCH_DTYPE(a.dtype, T, decode::fuse_element<T>(a, values, i / 2));
  }
  return 0;
}

int mka_decode_append(const MkaDecodeAppendArgs* args, void* stream) {
  using namespace mka;
  const MkaDecodeAppendArgs& a = *args;
  if (!decode::possible(a)) return MKA_REFUSED;
  if (a.batch == 0) return 0;
  const unsigned blocks = static_cast<unsigned>(a.batch);
  MKA_DISPATCH_DTYPE(a.dtype, T, decode::append_kernel<T><<<blocks, decode::THREADS, 0, static_cast<cudaStream_t>(stream)>>>(a));
  return launched();
}

int mka_host_decode_append(const MkaDecodeAppendArgs* args) {
  using namespace mka;
  const MkaDecodeAppendArgs& a = *args;
  if (!decode::possible(a)) return MKA_REFUSED;
  for (int64_t b = 0; b < a.batch; ++b) {
    const decode::Slot slot = decode::open_slot(a, b);
    if (slot.at < 0) continue;
    for (int64_t i = 0; i < a.groups * a.channels; ++i)
      MKA_DISPATCH_DTYPE(a.dtype, T, decode::append_element<T>(a, b, slot, i));
    decode::append_end(a, b, slot);
  }
  return 0;
}

int mka_decode_close(const MkaDecodeCloseArgs* args, void* stream) {
  using namespace mka;
  const MkaDecodeCloseArgs& a = *args;
  if (!decode::possible(a)) return MKA_REFUSED;
  if (a.batch == 0) return 0;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (a.channels == 64) {
    MKA_DISPATCH_DTYPE(a.dtype, T, (decode::close<T, 64>(a, on)));
  } else if (a.channels == 128) {
    MKA_DISPATCH_DTYPE(a.dtype, T, (decode::close<T, 128>(a, on)));
  } else if (a.channels == 256) {
    MKA_DISPATCH_DTYPE(a.dtype, T, (decode::close<T, 256>(a, on)));
  } else {
    return MKA_REFUSED;
  }
  return launched();
}

int mka_host_decode_close(const MkaDecodeCloseArgs* args) {
  using namespace mka;
  const MkaDecodeCloseArgs& a = *args;
  if (!decode::possible(a)) return MKA_REFUSED;
  if (a.channels == 64) {
    MKA_DISPATCH_DTYPE(a.dtype, T, (decode::close_host<T, 64>(a)));
  } else if (a.channels == 128) {
    MKA_DISPATCH_DTYPE(a.dtype, T, (decode::close_host<T, 128>(a)));
  } else if (a.channels == 256) {
    MKA_DISPATCH_DTYPE(a.dtype, T, (decode::close_host<T, 256>(a)));
  } else {
    return MKA_REFUSED;
  }
  return 0;
}
