// The hand-over under a sanitizer: a simulated device, a worker that dies, fails and stalls, a watcher, a
// cancel.
//
// Takes the number of crossings; returns 0 if every answer was right and every fault ended as it should.
#include "../handover.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using namespace thermocline;

namespace {

int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  ++failures;
}

struct World {
  static constexpr int64_t kWidth = 64, kNeurons = 48;
  Context context{2, "baseline", false};
  std::vector<float> weights = std::vector<float>(3 * kNeurons * kWidth);
  alignas(128) uint32_t words[64] = {};
  std::vector<float> x = std::vector<float>(kWidth), partial = std::vector<float>(kWidth);
  std::vector<int32_t> active = std::vector<int32_t>(kNeurons);
  int32_t count = 0;
  Mailbox box{words, words + 32, x.data(), partial.data(), active.data(), &count, kWidth, kNeurons};

  World() {
    uint32_t seed = 1;
    const auto next = [&] {
      return static_cast<float>((seed = seed * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1.0f;
    };
    for (float& w : weights) w = next();
    for (float& v : x) v = next();
  }

  Matrix matrix(int which) const {
    const auto* data = reinterpret_cast<const uint8_t*>(weights.data() + which * kNeurons * kWidth);
    return {data, format_of(0), kNeurons, kWidth, row_bytes(format_of(0), kWidth)};
  }

  void fill(HandOver& hand, uint32_t layers) {
    const Matrix gate = matrix(0), up = matrix(1), down = matrix(2);
    for (uint32_t i = 0; i < layers; ++i) {
      FfnBlock block{};
      block.gate = &gate;
      block.up = &up;
      block.down = &down;
      block.records = true;
      block.activation = kRelu;
      block.neurons = kNeurons;
      hand.add_layer(block, true, false);
    }
  }

  // What a layer computes, on a tape, and an op after it.
  void write(Tape& tape) {
    tape.add([this](Context& shared, FfnWork& work) {
      const Matrix gate = matrix(0), up = matrix(1), down = matrix(2);
      FfnBlock block{};
      block.gate = &gate;
      block.up = &up;
      block.down = &down;
      block.records = true;
      block.activation = kRelu;
      block.neurons = kNeurons;
      std::fill(partial.begin(), partial.end(), 1.0f);
      add_to(work, ffn(shared, x.data(), 1, block, nullptr, kNeurons, true, partial.data(), nullptr));
    });
    tape.add([this](Context&, FfnWork&) {
      for (float& v : partial) v *= 2.0f;
    });
  }
};

void many(int64_t crossings) {
  World world;
  Tape tape;
  world.write(tape);
  HandOver hand(world.context, world.box, 60.0);
  world.fill(hand, 2);
  hand.add_tape(tape);
  // Steps of 300 crossings: the worker is woken and let go between them.
  int64_t left = crossings;
  while (left > 0) {
    const int64_t n = left < 300 ? left : 300;
    expect(hand.begin(), "a step begins");
    const Simulated seen = simulate(hand, world.box, 3, n, nullptr);
    expect(!hand.end() && seen.crossings == n && seen.different == 0, "every crossing is answered alike");
    left -= n;
  }
}

// Each with the neurons of a layer (1) and with a tape (2).
void faults(uint32_t layer) {
  World world;
  Tape tape;
  world.write(tape);
  HandOver hand(world.context, world.box, 0.3);
  world.fill(hand, 1);
  hand.add_tape(tape);
  for (const Fault fault : {Fault::kDie, Fault::kFail, Fault::kStall}) {
    // Layers and tapes take turns, from layer 1 on.
    hand.inject(fault, layer == 1 ? 4 : 5, 0.6);
    expect(hand.begin(), "a step begins before a fault");
    simulate(hand, world.box, 2, 20, nullptr);
    expect(hand.end().has_value(), "a fault is told");
    bool back = false;
    for (int i = 0; i < 100 && !back; ++i) {
      if (!hand.begin()) continue;
      back = simulate(hand, world.box, 2, 20, nullptr).crossings == 20;
      hand.end();
    }
    expect(back, "the worker is back after a fault");
  }
}

void watched(uint32_t layer) {
  World world;
  Tape tape;
  world.write(tape);
  HandOver hand(world.context, world.box, 5.0);
  world.fill(hand, 1);
  hand.add_tape(tape);
  hand.inject(Fault::kStall, 0, 0.2);
  expect(hand.begin(), "a watched step begins");
  hand.post(layer);
  std::thread watcher([&] {
    while (!hand.release("given up")) std::this_thread::yield();
  });
  watcher.join();
  expect(hand.end().has_value(), "a release is told");
  expect(hand.begin(), "a step begins after a release");
  expect(simulate(hand, world.box, 2, 20, nullptr).crossings == 20, "and is answered");
  hand.end();
}

void cancelled() {
  World world;
  Tape tape;
  world.write(tape);
  HandOver hand(world.context, world.box, 5.0);
  world.fill(hand, 1);
  hand.add_tape(tape);
  std::atomic<bool> cancel{false};
  expect(hand.begin(), "a step begins before it is cancelled");
  std::thread device([&] { simulate(hand, world.box, 2, int64_t{1} << 40, &cancel); });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  cancel.store(true);
  device.join();
  expect(!hand.end(), "a cancelled step has not failed");
  expect(hand.begin() && simulate(hand, world.box, 2, 20, nullptr).crossings == 20,
         "and the next is answered");
  expect(!hand.end(), "without a failure");
}

// A tape that throws ends its step with what it says; the device is answered all the same.
void throwing() {
  World world;
  Tape good, bad;
  world.write(good);
  bad.add([](Context&, FfnWork&) { throw std::runtime_error("an id is beyond the table"); });
  HandOver hand(world.context, world.box, 5.0);
  hand.add_tape(good);
  hand.add_tape(bad);
  for (int i = 0; i < 50; ++i) {
    expect(hand.begin(), "a step begins before a tape that throws");
    expect(simulate(hand, world.box, 2, 4, nullptr).crossings == 4, "what throws is answered");
    const std::optional<std::string> failure = hand.end();
    expect(failure && *failure == "an id is beyond the table", "what a tape throws is told");
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int64_t crossings = count > 1 ? std::atoll(arguments[1]) : 1000000;
  many(crossings);
  for (const uint32_t layer : {1u, 2u}) {
    faults(layer);
    watched(layer);
  }
  cancelled();
  throwing();
  std::printf("%lld crossings, %d wrong\n", static_cast<long long>(crossings), failures);
  return failures == 0 ? 0 : 1;
}
