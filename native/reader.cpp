#include "reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <system_error>

namespace thermocline {
namespace {

// What direct reads ask of offsets, lengths and addresses on every common disk and file system.
constexpr int64_t kAlign = 4096;

int64_t down(int64_t value) { return value / kAlign * kAlign; }
int64_t up(int64_t value) { return down(value + kAlign - 1); }

struct Free {
  void operator()(uint8_t* bytes) const { std::free(bytes); }
};
using Bounce = std::unique_ptr<uint8_t, Free>;

Bounce bounce_of(int64_t largest) {
  const auto bytes = static_cast<size_t>(up(largest) + kAlign);
  auto* memory = static_cast<uint8_t*>(std::aligned_alloc(kAlign, bytes));
  if (!memory) throw std::bad_alloc();
  return Bounce(memory);
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

[[noreturn]] void fail(int error, const std::string& what) {
  throw std::system_error(error, std::generic_category(), what);
}

// Some file systems accept O_DIRECT when opening and refuse it when reading.
int open_direct(const std::string& path, uint8_t* bounce) {
#ifdef O_DIRECT
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  if (descriptor < 0) return -1;
  if (pread(descriptor, bounce, kAlign, 0) >= 0) return descriptor;
  close(descriptor);
#else
  (void)path, (void)bounce;
#endif
  return -1;
}

}  // namespace

Reader::Reader(const std::string& path, int depth, int64_t largest, bool direct) : largest_(largest) {
  std::vector<Bounce> bounces;
  for (int i = 0; i < depth; ++i) bounces.push_back(bounce_of(largest));
  if (direct) descriptor_ = open_direct(path, bounces.front().get());
  direct_ = descriptor_ >= 0;
  if (!direct_) descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) fail(errno, path);
  struct stat found{};
  if (fstat(descriptor_, &found) != 0 || !S_ISREG(found.st_mode)) {
    close(descriptor_);
    fail(EINVAL, path + " is no regular file");
  }
  size_ = found.st_size;
  if (!direct_) posix_fadvise(descriptor_, 0, 0, POSIX_FADV_RANDOM);
  for (Bounce& bounce : bounces) {
    workers_.emplace_back([this, held = std::move(bounce)] {
      std::unique_lock lock(mutex_);
      while (true) {
        wanted_.wait(lock, [this] { return stop_ || !queue_.empty(); });
        if (stop_) return;
        const Job job = queue_.front();
        queue_.pop_front();
        const bool skip = job.batch->error != 0;
        if (!skip && in_flight_++ == 0) busy_since_ = now();
        lock.unlock();
        int64_t done = 0;
        const int error = skip ? 0 : read(job, held.get(), &done);
        lock.lock();
        if (!skip && --in_flight_ == 0) stats_.busy += now() - busy_since_;
        if (!skip) {
          stats_.requests += 1;
          stats_.bytes += done;
        }
        if (error != 0 && job.batch->error == 0) {
          job.batch->error = error;
          job.batch->where = job.request.offset;
        }
        if (--job.batch->left == 0) finished_.notify_all();
      }
    });
  }
}

Reader::~Reader() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wanted_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  close(descriptor_);
}

ReadStats Reader::stats() {
  const std::lock_guard lock(mutex_);
  ReadStats stats = stats_;
  if (in_flight_ > 0) stats.busy += now() - busy_since_;
  return stats;
}

int64_t Reader::submit(const std::vector<ReadRequest>& requests, const std::vector<ReadPart>& parts) {
  const std::lock_guard lock(mutex_);
  const int64_t ticket = next_ticket_++;
  Batch& batch = batches_[ticket];
  batch.parts = parts;
  batch.left = static_cast<int64_t>(requests.size());
  int64_t part = 0;
  for (const ReadRequest& request : requests) {
    queue_.push_back({&batch, request, part});
    part += request.parts;
    wanted_.notify_one();
  }
  return ticket;
}

void Reader::wait(int64_t ticket) {
  std::unique_lock lock(mutex_);
  const auto found = batches_.find(ticket);
  if (found == batches_.end())
    throw std::invalid_argument("ticket: is not of a read that was started, or was waited for");
  finished_.wait(lock, [&] { return found->second.left == 0; });
  const int error = found->second.error;
  const int64_t where = found->second.where;
  batches_.erase(found);
  if (error == 0) return;
  if (error < 0) fail(EIO, "the file ends early: nothing at byte " + std::to_string(where));
  fail(error, "at byte " + std::to_string(where));
}

// 0, an errno, or -1 if the file ends early.
int Reader::read(const Job& job, uint8_t* bounce, int64_t* done) const {
  const int64_t start = direct_ ? down(job.request.offset) : job.request.offset;
  const int64_t end = job.request.offset + job.request.bytes;
  const int64_t stop = direct_ ? up(end) : end;
  while (start + *done < end) {
    const ssize_t got =
        pread(descriptor_, bounce + *done, static_cast<size_t>(stop - start - *done), start + *done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno;
    if (got == 0) return -1;
    *done += got;
    // A direct read that stops within a block has met the end of the file.
    if (direct_ && got % kAlign != 0 && start + *done < end) return -1;
  }
  if (!direct_) posix_fadvise(descriptor_, start, stop - start, POSIX_FADV_DONTNEED);
  const ReadPart* part = job.batch->parts.data() + job.first_part;
  for (int64_t i = 0; i < job.request.parts; ++i, ++part) {
    std::memcpy(part->to, bounce + (part->offset - start), static_cast<size_t>(part->bytes));
  }
  return 0;
}

}  // namespace thermocline
