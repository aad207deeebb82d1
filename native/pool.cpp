#include "pool.h"

#include <pthread.h>

#include <chrono>
#include <fstream>
#include <set>
#include <stdexcept>
#include <string>

#ifdef __linux__
#include <sched.h>
#endif

namespace thermocline {
namespace {

using Clock = std::chrono::steady_clock;

// Longer than the work between two ops of a token, shorter than anyone would notice as load.
constexpr auto kSpin = std::chrono::milliseconds(2);

// Counts forks: the threads of a pool exist in the process that made it only.
std::atomic<uint32_t> fork_count{0};

uint32_t forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1); });
  (void)registered;
  return fork_count.load(std::memory_order_relaxed);
}

#ifdef __linux__
// The first allowed hardware thread of each core.
std::vector<int> allowed_cores() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(0, sizeof mask, &mask) != 0) return {};
  std::vector<int> cores;
  std::set<std::string> seen;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &mask)) continue;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                       "/topology/thread_siblings_list");
    std::string siblings;
    if (!std::getline(file, siblings)) siblings = std::to_string(cpu);
    if (seen.insert(siblings).second) cores.push_back(cpu);
  }
  return cores;
}

void pin_to(pthread_t thread, int cpu) {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  CPU_SET(cpu, &mask);
  pthread_setaffinity_np(thread, sizeof mask, &mask);  // refused: the system places it
}
#endif

}  // namespace

Pool::Pool(int size, bool pin) : size_(size), forks_(forks()) {
#ifdef __linux__
  if (pin && size > 1) cores_ = allowed_cores();
  if (static_cast<int>(cores_.size()) != size) cores_.clear();
#else
  (void)pin;
#endif
  threads_.reserve(static_cast<size_t>(size));
  for (int worker = 1; worker < size; ++worker) {
    threads_.emplace_back([this, worker] { work(worker); });
#ifdef __linux__
    if (!cores_.empty()) pin_to(threads_.back().native_handle(), cores_[static_cast<size_t>(worker)]);
#endif
  }
}

Pool::~Pool() {
  if (forks() != forks_) {
    // In a forked child there is nothing to join.
    for (std::thread& thread : threads_) thread.detach();
    return;
  }
  stop_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Pool::start(Call call, void* context) {
  if (forks() != forks_) {
    throw std::runtime_error(
        "the thread pool belongs to the process that made it; make a new one after fork");
  }
  step_aside();
  call_ = call;
  context_ = context;
  park_.store(false, std::memory_order_relaxed);
  running_.store(size_ - 1, std::memory_order_relaxed);
  // Sequentially consistent with the sleeper's steps (count itself asleep, look at the epoch): one of the two
  // sees the other.
  epoch_.fetch_add(1);
  if (asleep_.load() > 0) epoch_.notify_all();
}

void Pool::finish() {
  for (int look = 0; running_.load(std::memory_order_acquire) != 0; ++look) wait_between_looks(look, alone());
}

// The caller, which is not pinned, may wake up on the core of a worker. There each would wait for the other,
// for the system thinks twice before it moves a thread that ran a moment ago.
void Pool::step_aside() {
#ifdef __linux__
  constexpr auto kSeldom = std::chrono::milliseconds(10);  // a move takes tens of microseconds
  if (cores_.empty() || sched_getcpu() == cores_[0]) return;
  if (std::find(cores_.begin(), cores_.end(), sched_getcpu()) == cores_.end()) return;
  const auto now = Clock::now();
  if (now - stepped_aside_ < kSeldom) return;
  stepped_aside_ = now;
  cpu_set_t allowed;
  if (pthread_getaffinity_np(pthread_self(), sizeof allowed, &allowed) != 0) return;
  if (!CPU_ISSET(cores_[0], &allowed)) return;
  pin_to(pthread_self(), cores_[0]);
  pthread_setaffinity_np(pthread_self(), sizeof allowed, &allowed);
#endif
}

int Pool::wait_for_work(int seen) {
  constexpr int kLooksPerClock = 16;
  const auto deadline = Clock::now() + kSpin;
  for (int look = 1;; ++look) {
    const int epoch = epoch_.load(std::memory_order_acquire);
    if (epoch != seen) return epoch;
    wait_between_looks(look, alone());
    if (look % kLooksPerClock == 0 && (park_.load(std::memory_order_relaxed) || Clock::now() > deadline))
      break;
  }
  const int counted = cores_.empty() ? 0 : 1;
  awake.fetch_sub(counted);
  asleep_.fetch_add(1);
  int epoch = epoch_.load();
  while (epoch == seen) {
    epoch_.wait(seen);
    epoch = epoch_.load();
  }
  asleep_.fetch_sub(1);
  awake.fetch_add(counted);
  return epoch;
}

void Pool::work(int worker) {
  int seen = 0;
  if (!cores_.empty()) awake.fetch_add(1);
  for (;;) {
    seen = wait_for_work(seen);
    if (stop_.load()) break;
    call_(context_, worker);
    running_.fetch_sub(1, std::memory_order_release);
  }
  if (!cores_.empty()) awake.fetch_sub(1);
}

}  // namespace thermocline
