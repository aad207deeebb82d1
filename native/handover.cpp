#include "handover.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

namespace thermocline {
namespace {

// Longer than a device needs from one layer to the next, so that a worker sleeps between requests only.
constexpr auto kSpin = std::chrono::milliseconds(2);

// Time that passed while somebody looked: a process that is stopped, or a machine that sleeps, wastes
// nobody's patience.
class Patience {
 public:
  using Clock = std::chrono::steady_clock;
  explicit Patience(Clock::duration most) : left_(most) {}
  bool over() {
    const auto now = Clock::now();
    left_ -= std::min<Clock::duration>(now - last_, std::chrono::milliseconds(100));
    last_ = now;
    return left_ < Clock::duration::zero();
  }

 private:
  Clock::duration left_;
  Clock::time_point last_ = Clock::now();
};

std::atomic_ref<uint32_t> flag(uint32_t* word) { return std::atomic_ref<uint32_t>(*word); }

}  // namespace

HandOver::HandOver(Context& context, Mailbox box, double patience)
    : context_(context),
      box_(box),
      patience_(std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(patience))) {
  flag(box_.ready).store(0);
  flag(box_.done).store(0);
}

HandOver::~HandOver() {
  stop_.store(true);
  awake_.store(1);
  awake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

uint32_t HandOver::add_layer(const FfnBlock& block, bool skip, bool listed) {
  Layer& layer = layers_.emplace_back(Layer{block.gate ? std::optional<Matrix>(*block.gate) : std::nullopt,
                                            *block.up, *block.down, block, skip, listed, nullptr});
  layer.block.gate = layer.gate ? &*layer.gate : nullptr;
  layer.block.up = &layer.up;
  layer.block.down = &layer.down;
  return static_cast<uint32_t>(layers_.size() - 1);
}

uint32_t HandOver::add_tape(const Tape& tape) {
  layers_.emplace_back().tape = &tape;
  return static_cast<uint32_t>(layers_.size() - 1);
}

void HandOver::start() {
  if (thread_.joinable()) thread_.join();
  alive_.store(true);
  thread_ = std::thread([this] { work(); });
}

bool HandOver::begin() {
  Patience patience(patience_);
  for (int look = 0; busy_.load(); ++look) {
    if (patience.over()) return false;
    wait_between_looks(look);
  }
  flag(box_.ready).store(0);
  flag(box_.done).store(0);
  taken_.store(0);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    failure_.reset();
  }
  if (!alive_.load()) start();
  awake_.store(1);
  awake_.notify_all();
  return true;
}

std::optional<std::string> HandOver::end() {
  awake_.store(0);
  const std::lock_guard<std::mutex> lock(mutex_);
  return failure_;
}

void HandOver::fail(const std::string& reason) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!failure_) failure_ = reason;
}

FfnWork HandOver::take_work() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(work_, FfnWork{0, 0, 0, 0});
}

void HandOver::work() {
  constexpr int kLooksPerClock = 16;
  auto since = Clock::now();
  for (int look = 1; !stop_.load(std::memory_order_relaxed); ++look) {
    uint32_t number = flag(box_.ready).load(std::memory_order_acquire);
    if (number != 0) {
      busy_.store(true);
      if (flag(box_.ready).compare_exchange_strong(number, 0)) {
        const bool lives = answer(number);
        busy_.store(false);
        if (!lives) {
          alive_.store(false);
          return;
        }
      } else {
        busy_.store(false);
      }
      since = Clock::now();
      look = 1;
      continue;
    }
    wait_between_looks(look);
    if (look % kLooksPerClock == 0 && Clock::now() - since > kSpin) {
      if (awake_.load() == 0) awake_.wait(0);
      since = Clock::now();
      look = 1;
    }
  }
  alive_.store(false);
}

bool HandOver::answer(uint32_t number) {
  taken_.store(number);
  if (crossings_.fetch_add(1) == fault_at_.load()) {
    const auto fault = static_cast<Fault>(fault_.load());
    if (fault == Fault::kDie) return false;
    if (fault == Fault::kFail) fail("the worker was told to fail");
    if (fault == Fault::kStall) {
      std::this_thread::sleep_for(std::chrono::duration<double>(fault_seconds_.load()));
    }
  }
  try {
    compute(number);
  } catch (const std::exception& error) {
    fail(error.what());
  }
  if (close_crossing(number)) flag(box_.done).store(number, std::memory_order_release);
  return true;
}

// True for the one who may answer a crossing; everybody else comes too late.
bool HandOver::close_crossing(uint32_t number) { return taken_.compare_exchange_strong(number, 0); }

void HandOver::compute(uint32_t number) {
  if (number > layers_.size())
    throw std::runtime_error("a layer was handed over that the worker does not have");
  const Layer& layer = layers_[number - 1];
  const FfnWork work = layer.tape ? layer.tape->play(context_) : neurons(layer);
  const std::lock_guard<std::mutex> lock(mutex_);
  add_to(work_, work);
}

FfnWork HandOver::neurons(const Layer& layer) {
  const int32_t* ids = layer.listed ? box_.active : nullptr;
  const int64_t count = layer.listed ? *box_.count : layer.block.neurons;
  if (ids && !is_active_list(ids, count, std::min(box_.room, layer.block.neurons))) {
    throw std::runtime_error("the list of neurons that was handed over is damaged");
  }
  std::fill(box_.partial, box_.partial + box_.columns, 0.0f);
  if (count == 0) return {0, 0, 0, 0};
  const OpScope scope(context_);
  return ffn(context_, box_.x, 1, layer.block, ids, count, layer.skip, box_.partial, nullptr);
}

void HandOver::post(uint32_t number) { flag(box_.ready).store(number, std::memory_order_release); }

bool HandOver::await(uint32_t number) {
  constexpr int kLooksPerClock = 64;
  Patience patience(patience_);
  for (int look = 1;; ++look) {
    if (flag(box_.done).load(std::memory_order_acquire) == number) {
      flag(box_.done).store(0, std::memory_order_relaxed);
      return true;
    }
    wait_between_looks(look);
    if (look % kLooksPerClock == 0 && (!alive_.load() || patience.over())) break;
  }
  fail(alive_.load() ? "the CPU did not compute its neurons in time"
                     : "the worker of the CPU's neurons died");
  uint32_t open = number;
  flag(box_.ready).compare_exchange_strong(open, 0);
  close_crossing(number);
  flag(box_.done).store(0);
  return false;
}

bool HandOver::release(const std::string& reason) {
  fail(reason);
  uint32_t number = flag(box_.ready).exchange(0);
  if (number == 0) number = taken_.exchange(0);
  if (number == 0) return false;
  flag(box_.done).store(number, std::memory_order_release);
  return true;
}

void HandOver::inject(Fault fault, int64_t crossing, double seconds) {
  fault_.store(static_cast<int>(fault));
  fault_seconds_.store(seconds);
  fault_at_.store(crossing < 0 ? crossing : crossings_.load() + crossing);
}

void* HandOver::argument(uint32_t number) { return &arguments_.emplace_back(Argument{this, number}); }

namespace {

void call_post(void* argument) noexcept {
  const auto* a = static_cast<const HandOver::Argument*>(argument);
  a->self->post(a->number);
}

void call_await(void* argument) noexcept {
  const auto* a = static_cast<const HandOver::Argument*>(argument);
  a->self->await(a->number);
}

}  // namespace

void* post_function() { return reinterpret_cast<void*>(&call_post); }
void* await_function() { return reinterpret_cast<void*>(&call_await); }

Simulated simulate(HandOver& hand, const Mailbox& box, uint32_t layers, int64_t crossings,
                   const std::atomic<bool>* cancel) {
  std::vector<std::vector<float>> expected(layers);
  Simulated result{0, 0, 0.0};
  const auto began = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < crossings; ++i) {
    const auto layer = static_cast<uint32_t>(i % layers);
    hand.post(layer + 1);
    if (!hand.await(layer + 1)) break;
    ++result.crossings;
    if (expected[layer].empty()) expected[layer].assign(box.partial, box.partial + box.columns);
    if (std::memcmp(expected[layer].data(), box.partial, sizeof(float) * expected[layer].size()) != 0) {
      ++result.different;
    }
    // A device overwrites what it has used.
    std::fill(box.partial, box.partial + box.columns, -1.0f);
    if (cancel && cancel->load(std::memory_order_relaxed)) break;
  }
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  return result;
}

}  // namespace thermocline
