// Scratch memory of a context: grows until the largest op fits, then never allocates again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace thermocline {

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
