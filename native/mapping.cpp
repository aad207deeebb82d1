#include "mapping.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <mutex>

namespace thermocline {
namespace {

struct Mapping {
  std::atomic<uintptr_t> begin{0}, end{0};
  std::atomic<int> sheltered{0};
  std::atomic<bool> lost{false};
  std::array<char, 256> words{};
};

constexpr int kMost = 512;
std::array<Mapping, kMost> mappings;
std::mutex numbers;  // of who takes and gives back places in the table; the handler takes no lock
struct sigaction before;
uintptr_t page_size = 0;

Mapping* mapping_of(uintptr_t address) {
  for (Mapping& mapping : mappings) {
    const uintptr_t begin = mapping.begin.load(std::memory_order_acquire);
    if (begin != 0 && address >= begin && address < mapping.end.load(std::memory_order_acquire))
      return &mapping;
  }
  return nullptr;
}

// Nothing but system calls from here on: any thread may have been anywhere.
bool read_zeros_from(Mapping& mapping, uintptr_t address) {
  const uintptr_t page = address / page_size * page_size;
  const uintptr_t end = (mapping.end.load() + page_size - 1) / page_size * page_size;
  void* const zeros = mmap(reinterpret_cast<void*>(page), end - page, PROT_READ,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  if (zeros == MAP_FAILED) return false;
  mapping.lost.store(true);
  return true;
}

void on_bus_error(int signal, siginfo_t* info, void* context) {
  const int saved = errno;
  Mapping* const mapping =
      info->si_code == BUS_ADRERR ? mapping_of(reinterpret_cast<uintptr_t>(info->si_addr)) : nullptr;
  if (mapping != nullptr) {
    const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
    if (mapping->sheltered.load() > 0 && read_zeros_from(*mapping, address)) {
      errno = saved;
      return;
    }
    const ssize_t said = write(STDERR_FILENO, mapping->words.data(), strlen(mapping->words.data()));
    (void)said;
  }
  if ((before.sa_flags & SA_SIGINFO) != 0) {
    before.sa_sigaction(signal, info, context);
  } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
    before.sa_handler(signal);
  } else {
    // What failed fails again when this returns, and now ends the process; what another process sent is sent
    // on.
    struct sigaction plain{};
    plain.sa_handler = SIG_DFL;
    sigaction(signal, &plain, nullptr);
    if (info->si_code != BUS_ADRERR) raise(signal);
  }
  errno = saved;
}

void listen() {
  page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  struct sigaction ours{};
  ours.sa_sigaction = on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGBUS, &ours, &before);
}

}  // namespace

int watch_mapping(uintptr_t address, int64_t bytes, const std::string& words) {
  static std::once_flag once;
  std::call_once(once, listen);
  const std::lock_guard lock(numbers);
  for (int i = 0; i < kMost; ++i) {
    Mapping& mapping = mappings[static_cast<size_t>(i)];
    if (mapping.begin.load() != 0) continue;
    const size_t length = std::min(words.size(), mapping.words.size() - 1);
    std::copy_n(words.data(), length, mapping.words.data());
    mapping.words[length] = '\0';
    mapping.sheltered.store(0);
    mapping.lost.store(false);
    mapping.end.store(address + static_cast<uintptr_t>(bytes));
    mapping.begin.store(address, std::memory_order_release);
    return i;
  }
  return -1;
}

void forget_mapping(int number) {
  const std::lock_guard lock(numbers);
  mappings.at(static_cast<size_t>(number)).begin.store(0);
}

void shelter_mapping(int number, int by) { mappings.at(static_cast<size_t>(number)).sheltered.fetch_add(by); }

bool lost_mapping(int number) { return mappings.at(static_cast<size_t>(number)).lost.load(); }

}  // namespace thermocline
