// Reads of a file with several in flight, past the page cache where the file system allows it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace thermocline {

// `bytes` of the file at `offset`, wanted at `to`.
struct ReadPart {
  int64_t offset, bytes;
  uint8_t* to;
};

// One request to the file: `bytes` at `offset`, which cover the next `parts` parts.
struct ReadRequest {
  int64_t offset, bytes, parts;
};

struct ReadStats {
  int64_t requests, bytes;  // as the device saw them: whole aligned blocks
  double busy;              // seconds during which something was in flight
};

class Reader {
 public:
  // Opens `path` for requests of up to `largest` bytes, `depth` of them in flight. With `direct`, reads
  // bypass the page cache if the file system allows it; else what was read is dropped from it. Throws
  // std::system_error.
  Reader(const std::string& path, int depth, int64_t largest, bool direct);
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  bool direct() const { return direct_; }
  int depth() const { return static_cast<int>(workers_.size()); }
  int64_t largest() const { return largest_; }
  int64_t size() const { return size_; }
  ReadStats stats();

  // Starts requests; what they write to must live until wait() has returned. The ticket is for wait().
  int64_t submit(const std::vector<ReadRequest>& requests, const std::vector<ReadPart>& parts);

  // Returns when no request of the ticket is in flight any more. Throws std::system_error if one failed.
  void wait(int64_t ticket);

 private:
  struct Batch {
    std::vector<ReadPart> parts;
    int64_t left;
    int error = 0;
    int64_t where = 0;
  };
  struct Job {
    Batch* batch;
    ReadRequest request;
    int64_t first_part;
  };

  int read(const Job& job, uint8_t* bounce, int64_t* done) const;

  const int64_t largest_;
  int descriptor_ = -1;
  bool direct_ = false;
  int64_t size_ = 0;
  std::mutex mutex_;
  std::condition_variable wanted_, finished_;
  std::deque<Job> queue_;
  std::map<int64_t, Batch> batches_;
  int64_t next_ticket_ = 0, in_flight_ = 0;
  ReadStats stats_{};
  double busy_since_ = 0;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace thermocline
