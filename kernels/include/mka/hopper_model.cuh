// What mka/hopper.cuh does, on the host: for tests of code that is written over a machine.
//
// A block is a Board; each of its roles (a warp or a warp group, all threads at once) is a host thread with a Model.
// What the GPU does behind the program's back happens here at once or, where the board is `late`, as late as the
// program allows: a copy spoils its tile when it begins and fills it when its barrier is waited for; products read
// their operands when they are waited for; plain writes to shared memory reach them after fence_async alone.
#pragma once

#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "mka/hopper.cuh"

namespace mka {
namespace hopper {

// A tensor of 16-bit elements [batch][heads][rows][channels], and the box that is copied from it.
struct Tensor {
  const void* base;
  int64_t channels, rows, heads, batch;
  int64_t row_stride, head_stride, batch_stride;  // elements
  int64_t box = 128;                              // rows; 64 channels
};

struct Board {
  struct Barrier {
    int count = 0, pending = 0;
    int64_t bytes = 0;
    uint32_t phase = 0;
    std::vector<std::function<void()>> copies;
  };
  struct Named {
    int arrived = 0;
    int64_t generation = 0;
  };

  Board(int64_t bytes, bool late) : late(late), room(bytes + TILE_ALIGN) {
    const auto at = reinterpret_cast<uintptr_t>(room.data());
    shared = reinterpret_cast<unsigned char*>((at + TILE_ALIGN - 1) / TILE_ALIGN * TILE_ALIGN);
  }

  bool late;
  std::vector<unsigned char> room;
  unsigned char* shared;
  std::mutex lock;
  std::condition_variable changed;
  std::map<const uint64_t*, Barrier> barriers;
  std::map<int, Named> named;
  bool failed = false;

  // Under the lock.
  void ended(Barrier& b) {
    if (b.pending < 0) fail("more arrivals than a barrier counts");
    if (b.pending || b.bytes) return;
    b.phase ^= 1;
    b.pending = b.count;
    changed.notify_all();
  }
  void fail(const char* why) {
    failed = true;
    changed.notify_all();
    throw std::logic_error(why);
  }
  template <typename Until>
  void wait(std::unique_lock<std::mutex>& held, const Until& until) {
    const bool in_time = changed.wait_for(held, std::chrono::seconds(60), [&] { return failed || until(); });
    if (failed) throw std::logic_error("another role failed");
    if (!in_time) fail("a wait that never ends");
  }
};

struct Model {
  static constexpr int THREADS = GROUP;
  static constexpr int LANES = 32;
  using Map = Tensor;

  explicit Model(Board& board) : board(board) {}

  static int thread(int l) { return l; }
  static int lane(int l) { return l; }
  static bool first_lane() { return true; }
  uint32_t address(const void* shared) const {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - board.shared);
  }

  void check_tile(const void* tile) const {
    if (address(tile) % TILE_ALIGN) throw std::logic_error("a tile is not aligned");
  }
  void init(uint64_t* barrier, int count) {
    Board::Barrier& b = board.barriers[barrier];
    b.count = b.pending = count;
  }
  static void initialised() {}
  void arrive(uint64_t* barrier, int times = 1) {
    const std::lock_guard<std::mutex> held(board.lock);
    Board::Barrier& b = board.barriers.at(barrier);
    b.pending -= times;
    board.ended(b);
  }
  void expect(uint64_t* barrier, int bytes) {
    {
      const std::lock_guard<std::mutex> held(board.lock);
      board.barriers.at(barrier).bytes += bytes;
    }
    arrive(barrier);
  }
  void wait(uint64_t* barrier, uint32_t parity) {
    std::unique_lock<std::mutex> held(board.lock);
    Board::Barrier& b = board.barriers.at(barrier);
    board.wait(held, [&] {
      for (const auto& copy : b.copies) copy();
      if (!b.copies.empty()) b.copies.clear(), board.ended(b);
      return b.phase != parity;
    });
  }
  void release(uint64_t* barrier) { arrive(barrier, GROUP / 32); }

  void signal(int id, int threads) {
    const std::lock_guard<std::mutex> held(board.lock);
    arrived(id, threads);
  }
  void sync(int id, int threads) {
    std::unique_lock<std::mutex> held(board.lock);
    const int64_t now = board.named[id].generation;
    arrived(id, threads);
    board.wait(held, [&] { return board.named[id].generation != now; });
  }
  static void sync_warp() {}
  static uint32_t ballot(const bool (&x)[32]) {
    uint32_t bits = 0;
    for (int l = 0; l < 32; ++l) bits |= static_cast<uint32_t>(x[l]) << l;
    return bits;
  }
  static void exchange(uint32_t (&x)[GROUP], int bit) {
    for (int l = 0; l < GROUP; ++l)
      if (!(l & bit)) std::swap(x[l], x[l ^ bit]);
  }

  static void prefetch(const Map*) {}
  void load(const Map* map, void* tile, uint64_t* barrier, int channel, int row, int head, int batch) {
    check_tile(tile);
    const Tensor t = *map;
    unsigned char* const to = static_cast<unsigned char*>(tile);
    const auto copy = [=] {
      for (int64_t r = 0; r < t.box; ++r)
        for (int64_t c = 0; c < 64; ++c) {
          uint16_t x = 0;
          if (row + r >= 0 && row + r < t.rows && channel + c < t.channels)
            x = static_cast<const uint16_t*>(t.base)[batch * t.batch_stride + head * t.head_stride +
                                                     (row + r) * t.row_stride + channel + c];
          memcpy(to + swizzled_bytes(static_cast<uint32_t>(r * ROW_BYTES + 2 * c)), &x, 2);
        }
    };
    memset(to, 0xff, t.box * ROW_BYTES);
    if (!board.late) copy();
    const std::lock_guard<std::mutex> held(board.lock);
    Board::Barrier& b = board.barriers.at(barrier);
    const auto landed = [&b, copy, late = board.late, bytes = t.box * ROW_BYTES] {
      if (late) copy();
      b.bytes -= bytes;
    };
    if (board.late) {
      b.copies.push_back(landed);
      board.changed.notify_all();
    } else {
      landed();
      board.ended(b);
    }
  }
  void zero_unit(void* shared) {
    if (board.late)
      writes.push_back(shared);
    else
      memset(shared, 0, 16);
  }
  void fence_async() {
    for (void* at : writes) memset(at, 0, 16);
    writes.clear();
  }

  template <int COUNT>
  static void take_registers() {}
  template <int COUNT>
  static void give_registers() {}

  static void fence() {}
  void commit() { groups.push_back(std::move(open)), open.clear(); }
  template <int N>
  void wait_products() {
    while (groups.size() > N) {
      for (const auto& product : groups.front()) product();
      groups.erase(groups.begin());
    }
  }
  template <typename X, int COUNT>
  static void settle(X (&)[COUNT][GROUP]) {}

  template <typename T, int COUNT>
  void product(float (&c)[COUNT][GROUP], uint64_t a, uint64_t b, bool add) {
    later([=, &c] {
      std::vector<float> left(64 * 16), right(2 * COUNT * 16);
      for (int k = 0; k < 16; ++k) {
        for (int row = 0; row < 64; ++row) left[row * 16 + k] = read<T>(a, row, k, false);
        for (int n = 0; n < 2 * COUNT; ++n) right[k * 2 * COUNT + n] = read<T>(b, n, k, false);
      }
      multiply(c, left, right, add);
    });
  }
  template <typename T, int COUNT>
  void product(float (&c)[COUNT][GROUP], const uint32_t (&a)[4][GROUP], uint64_t b) {
    later([=, &c, &a] {
      std::vector<float> left(64 * 16), right(2 * COUNT * 16);
      for (int l = 0; l < GROUP; ++l)
        for (int e = 0; e < 8; ++e) {
          T pair[2];
          memcpy(static_cast<void*>(pair), &a[e / 2][l], 4);
          const int row = 16 * (l / 32) + l % 32 / 4 + 8 * (e / 2 % 2), k = l % 4 * 2 + e % 2 + 8 * (e / 4);
          left[row * 16 + k] = to_float(pair[e % 2]);
        }
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 2 * COUNT; ++n) right[k * 2 * COUNT + n] = read<T>(b, n, k, true);
      multiply(c, left, right, true);
    });
  }

 private:
  Board& board;
  std::vector<std::function<void()>> open;
  std::vector<std::vector<std::function<void()>>> groups;
  std::vector<void*> writes;

  void arrived(int id, int threads) {
    Board::Named& n = board.named[id];
    n.arrived += GROUP;
    if (n.arrived < threads) return;
    n.arrived = 0, ++n.generation;
    board.changed.notify_all();
  }
  void later(std::function<void()> product) {
    if (board.late)
      open.push_back(std::move(product));
    else
      product();
  }
  // 16-byte units of 8 rows of 128 bytes: unit u of row r lies where unit u ^ r would.
  static uint32_t swizzled_bytes(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }
  // Element (n, k) of an operand, n counting rows of A or columns of B; `columns`: n is the dimension that lies together.
  template <typename T>
  float read(uint64_t descriptor, int n, int k, bool columns) const {
    if (descriptor >> 62 != 1 || descriptor >> 49 & 7) throw std::logic_error("a descriptor of another swizzle");
    const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                   stride = (descriptor >> 32 & 0x3fff) << 4;
    const uint32_t at = columns ? start + n / 64 * leading + n % 64 * 2 + k / 8 * stride + k % 8 * 128
                                : start + n / 8 * stride + n % 8 * 128 + k * 2;
    T x;
    memcpy(static_cast<void*>(&x), board.shared + swizzled_bytes(at), 2);
    return to_float(x);
  }
  template <int COUNT>
  static void multiply(float (&c)[COUNT][GROUP], const std::vector<float>& left, const std::vector<float>& right, bool add) {
    constexpr int N = 2 * COUNT;
    std::vector<float> row(N);
    for (int r = 0; r < 64; ++r) {
      std::fill(row.begin(), row.end(), 0.f);
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < N; ++n) row[n] += left[r * 16 + k] * right[k * N + n];
      for (int n = 0; n < N; ++n) {
        // of a row of eight columns a thread has two; its elements 0 and 1 are of row r, 2 and 3 of r + 8
        const int l = r / 16 * 32 + r % 8 * 4 + n % 8 / 2, e = n / 8 * 4 + r % 16 / 8 * 2 + n % 2;
        c[e][l] = (add ? c[e][l] : 0.f) + row[n];
      }
    }
  }
};

// The roles of a block, side by side; throws what one of them throws.
inline void run_roles(Board& board, const std::vector<std::function<void(Model&)>>& roles) {
  std::vector<std::exception_ptr> errors(roles.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < roles.size(); ++i)
    threads.emplace_back([&, i] {
      try {
        Model machine(board);
        roles[i](machine);
      } catch (...) {
        errors[i] = std::current_exception();
      }
    });
  for (auto& thread : threads) thread.join();
  for (const auto& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace hopper
}  // namespace mka
