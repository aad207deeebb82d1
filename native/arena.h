// Scratch memory of a context: grows until the largest op fits, then never allocates again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace thermocline {

// What each worker has of its own. Cores fetch ahead of what they read, to the end of a page, and would take
// lines away from a neighbour that writes them: a page lies between any two.
template <class T>
struct Areas {
  static constexpr int64_t kApart = 4096 / sizeof(T) + 1;

  T* data = nullptr;
  int64_t stride = 0;  // elements

  T* of(int worker) const { return data + worker * stride; }
};

class Arena {
 public:
  // Gives back everything taken. If the last op needed several pieces they become one as large as all of
  // them.
  void reset();

  // `count` uninitialised elements of a trivial type, aligned to 128 bytes, valid until reset().
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }

  // An area of `count` such elements for each worker.
  template <class T>
  Areas<T> take_areas(int64_t count, int workers) {
    constexpr int64_t kUnit = sizeof(T) < 128 ? 128 / sizeof(T) : 1;
    const int64_t stride = (count + Areas<T>::kApart + kUnit - 1) / kUnit * kUnit;
    return {take<T>(stride * workers), stride};
  }

  // A point to which release() goes back: all taken since then is given back.
  struct Mark {
    size_t pieces, used;
  };
  Mark mark() const { return {pieces_.size(), used_}; }
  void release(const Mark& mark);

  // Bytes held.
  size_t capacity() const;

 private:
  struct Free {
    size_t size;
    void operator()(std::byte* p) const;
  };
  struct Piece {
    std::unique_ptr<std::byte[], Free> bytes;
    size_t size;
  };

  void* take_bytes(size_t bytes);
  void grow(size_t bytes);

  std::vector<Piece> pieces_;
  size_t used_ = 0;  // of the last piece
};

}  // namespace thermocline
