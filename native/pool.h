// A persistent thread pool for many short parallel sections a second.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace thermocline {

// One instruction that tells the core (or its sibling thread) that this is a waiting loop.
inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The n-th look of a waiting loop: soon the core is given away between looks, for with more threads than
// cores the one waited for may need it. A pause takes 10 to 50 ns, a yield that nobody takes up about 300 ns.
// Where the one waited for has a core of its own (`keep`), only a stranger could take the core, and would
// keep it for milliseconds.
inline void wait_between_looks(int look, bool keep = false) {
  constexpr int kPauses = 256;
  if (keep || look < kPauses) {
    relax();
  } else {
    std::this_thread::yield();
  }
}

// Runs a body on `size` threads at once; the calling thread is worker 0. Between bodies the other workers
// spin for kSpin, so that the next op of a token starts within a microsecond, then sleep, so that an idle
// process costs nothing. Not reentrant; one caller at a time (Context holds a lock).
class Pool {
 public:
  // `pin` binds worker i to the i-th core of the affinity mask, if the pool takes all of them: a pool that
  // leaves cores free is better placed by the system, which sees what else runs.
  Pool(int size, bool pin);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }

  // body(worker) once on every worker; returns when all have returned. The body must not throw.
  template <class Body>
  void run(Body&& body) {
    if (size_ == 1) {
      body(0);
      return;
    }
    start([](void* context, int worker) { (*static_cast<std::remove_reference_t<Body>*>(context))(worker); },
          &body);
    body(0);
    finish();
  }

  // Inside a body: waits for all workers. The last to arrive runs `serial` before any goes on.
  template <class Serial>
  void barrier(Serial&& serial) {
    const uint32_t generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      serial();
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int look = 0; generation_.load(std::memory_order_acquire) == generation; ++look)
      wait_between_looks(look, alone());
  }
  void barrier() {
    barrier([] {});
  }

  // Sends the workers to sleep now instead of after kSpin.
  void park() { park_.store(true, std::memory_order_relaxed); }

 private:
  using Call = void (*)(void*, int);

  // Whether every worker has a core, which it need not share with a worker of another pool.
  bool alone() const { return !cores_.empty() && awake.load(std::memory_order_relaxed) < size_; }

  void start(Call call, void* context);
  void step_aside();
  void finish();
  void work(int worker);
  int wait_for_work(int seen);

  alignas(128) static inline std::atomic<int> awake{0};  // workers of all pinned pools

  const int size_;
  const uint32_t forks_;
  Call call_ = nullptr;
  void* context_ = nullptr;
  std::vector<std::thread> threads_;
  std::vector<int> cores_;  // of each worker, the caller's first; empty if they are not pinned
  std::chrono::steady_clock::time_point stepped_aside_{};
  // Each on its own pair of cache lines: one is written while another is polled.
  alignas(128) std::atomic<int> epoch_{0};
  alignas(128) std::atomic<int> asleep_{0};
  alignas(128) std::atomic<bool> park_{false};
  std::atomic<bool> stop_{false};
  alignas(128) std::atomic<int> running_{0};
  alignas(128) std::atomic<int> arrived_{0};
  alignas(128) std::atomic<uint32_t> generation_{0};
};

// Hands out the items 0 .. count - 1 of a phase in pieces of `grain`, first come, first served.
class Items {
 public:
  void reset(int64_t count, int64_t grain) {
    count_ = count;
    grain_ = grain;
    next_.store(0, std::memory_order_relaxed);
  }

  // body(begin, end) for pieces until none is left.
  template <class Body>
  void drain(Body&& body) {
    for (;;) {
      const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
      if (begin >= count_) return;
      body(begin, begin + grain_ < count_ ? begin + grain_ : count_);
    }
  }

 private:
  int64_t count_ = 0, grain_ = 1;
  alignas(128) std::atomic<int64_t> next_{0};
};

// Hands out the items 0 .. count - 1 so that each worker goes through a stretch of its own, for memory is
// read fastest in few long streams, and then helps the others with what is left of theirs.
class Streams {
 public:
  struct alignas(128) Stretch {
    std::atomic<int64_t> next;
    int64_t begin, end;
  };

  // `stretches` has room for one of each worker.
  Streams(Stretch* stretches, int workers) : stretches_(stretches), workers_(workers) {}

  // Pieces are of one grain or, if `halving`, of half of what is left of a stretch: few, and small ones at
  // the end, so that all workers finish together.
  void reset(int64_t count, int64_t grain, bool halving) {
    grain_ = grain;
    halving_ = halving;
    const int64_t pieces = (count + grain - 1) / grain;
    for (int w = 0; w < workers_; ++w) {
      Stretch& s = stretches_[w];
      s.begin = std::min(pieces * w / workers_ * grain, count);
      s.end = std::min(pieces * (w + 1) / workers_ * grain, count);
      s.next.store(s.begin, std::memory_order_relaxed);
    }
  }

  // Where a worker begins.
  int64_t begin(int worker) const { return stretches_[worker].begin; }

  // body(begin, end) for pieces, of whole grains but for the last, until none is left.
  template <class Body>
  void drain(int worker, Body&& body) {
    for (int i = 0; i < workers_; ++i) {
      Stretch& s = stretches_[(worker + i) % workers_];
      for (Piece piece; (piece = take(s)).begin < s.end;) body(piece.begin, piece.end);
    }
  }

 private:
  struct Piece {
    int64_t begin, end;
  };

  Piece take(Stretch& s) const {
    Piece piece{s.next.load(std::memory_order_relaxed), 0};
    do {
      const int64_t left = s.end - piece.begin;
      const int64_t size = halving_ ? (left + 2 * grain_ - 1) / (2 * grain_) * grain_ : grain_;
      piece.end = std::min(piece.begin + size, s.end);
    } while (piece.begin < s.end &&
             !s.next.compare_exchange_weak(piece.begin, piece.end, std::memory_order_relaxed));
    return piece;
  }

  Stretch* stretches_;
  int workers_;
  int64_t grain_ = 1;
  bool halving_ = false;
};

}  // namespace thermocline
