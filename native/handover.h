// Cold neurons for a device: a thread of its own, without Python, that computes what a device hands over in
// the middle of a step and hands the sum back.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "context.h"
#include "ffn.h"
#include "tape.h"

namespace thermocline {

// Memory that both sides see (pinned, if the device is one). A crossing goes: the device writes x (and, for
// listed layers, active and count), then ready = layer + 1; the worker takes it by setting ready to 0,
// computes, writes partial, then done = layer + 1; the device sees it, sets done to 0 and adds partial.
struct Mailbox {
  uint32_t* ready;
  uint32_t* done;
  const float* x;         // (columns)
  float* partial;         // (columns)
  const int32_t* active;  // (most neurons of a layer)
  const int32_t* count;   // (1)
  int64_t columns, room;
};

// What a test makes the worker do at its n-th crossing (from 0).
enum class Fault : int { kNone, kDie, kFail, kStall };

class HandOver {
 public:
  // What a device's call gets.
  struct Argument {
    HandOver* self;
    uint32_t number;
  };

  HandOver(Context& context, Mailbox box, double patience);
  ~HandOver();
  HandOver(const HandOver&) = delete;
  HandOver& operator=(const HandOver&) = delete;

  // The cold neurons of the next layer that crosses; its number. `listed`: only those in the mailbox's list.
  // Matrices are the caller's to keep. Not while the worker runs.
  uint32_t add_layer(const FfnBlock& block, bool skip, bool listed);
  // The same for ops of any kind, which find what they compute with in arrays of their own. The tape is the
  // caller's to keep, and is complete.
  uint32_t add_tape(const Tape& tape);

  // Before a step: the worker is there and looks without pause. False if the last step's work is still going
  // on after `patience`. Starts a new worker where one died.
  bool begin();
  // After a step: the worker may sleep. What went wrong since begin, or nothing.
  std::optional<std::string> end();

  // The device's side, for devices that call the host: hand layer number - 1 over; wait for its sum. Waiting
  // gives up after `patience`, keeps the failure, and returns false; the late sum is dropped.
  void post(uint32_t number);
  bool await(uint32_t number);

  // For whoever watches a device that waits for nobody: answers what is open, whatever the sum; the step has
  // failed with `reason`, its first one. True if something was open.
  bool release(const std::string& reason);

  void inject(Fault fault, int64_t crossing, double seconds);

  // Callable by a device: void call(void* argument).
  void* argument(uint32_t number);

  bool alive() const { return alive_.load(); }
  int64_t crossings() const { return crossings_.load(); }
  // Of all crossings since the last call.
  FfnWork take_work();

 private:
  using Clock = std::chrono::steady_clock;
  struct Layer {
    std::optional<Matrix> gate;
    Matrix up, down;
    FfnBlock block;
    bool skip, listed;
    const Tape* tape = nullptr;  // instead of all before
  };

  void start();
  void work();
  // False if the worker is to die.
  bool answer(uint32_t number);
  void compute(uint32_t number);
  FfnWork neurons(const Layer& layer);
  void fail(const std::string& reason);
  bool close_crossing(uint32_t number);

  Context& context_;
  const Mailbox box_;
  const Clock::duration patience_;
  std::deque<Layer> layers_;
  std::deque<Argument> arguments_;
  std::thread thread_;
  std::mutex mutex_;  // of failure_ and work_
  std::optional<std::string> failure_;
  FfnWork work_{0, 0, 0, 0};
  std::atomic<bool> stop_{false}, alive_{false}, busy_{false};
  std::atomic<int64_t> crossings_{0};
  std::atomic<int> fault_{0};
  std::atomic<int64_t> fault_at_{-1};
  std::atomic<double> fault_seconds_{0};
  alignas(128) std::atomic<uint32_t> taken_{0};  // the crossing that somebody must answer, or 0
  alignas(128) std::atomic<int> awake_{0};
};

// void(void*) functions for a device that calls the host in its stream.
void* post_function();
void* await_function();

// The device's side in the caller's thread: `crossings` of them, over the layers in turn. Counts answers
// that differ from those of the first round; stops early when an answer does not come, or when `cancel` is
// set.
struct Simulated {
  int64_t crossings, different;
  double seconds;
};
Simulated simulate(HandOver& hand, const Mailbox& box, uint32_t layers, int64_t crossings,
                   const std::atomic<bool>* cancel);

}  // namespace thermocline
