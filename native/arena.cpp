#include "arena.h"

#include <new>

namespace thermocline {
namespace {

constexpr size_t kLines = 128;  // a pair of cache lines, as Streams::Stretch wants
constexpr std::align_val_t kAlign{kLines};
constexpr size_t kSmallest = size_t{1} << 20;

}  // namespace

void Arena::Free::operator()(std::byte* p) const { ::operator delete[](p, kAlign); }

size_t Arena::capacity() const {
  size_t total = 0;
  for (const Piece& piece : pieces_) total += piece.size;
  return total;
}

void Arena::reset() {
  if (pieces_.size() > 1) {
    const size_t total = capacity();
    pieces_.clear();
    grow(total);
  }
  used_ = 0;
}

void Arena::release(const Mark& mark) {
  // Pieces added since stay, to be merged by reset(); the last of them is used anew from its start.
  used_ = pieces_.size() == mark.pieces ? mark.used : 0;
}

void* Arena::take_bytes(size_t bytes) {
  const size_t rounded = (bytes + kLines - 1) / kLines * kLines;
  if (pieces_.empty() || pieces_.back().size - used_ < rounded) grow(rounded);
  std::byte* at = pieces_.back().bytes.get() + used_;
  used_ += rounded;
  return at;
}

void Arena::grow(size_t bytes) {
  const size_t size = bytes < kSmallest ? kSmallest : bytes;
  pieces_.push_back(
      {std::unique_ptr<std::byte[], Free>(static_cast<std::byte*>(::operator new[](size, kAlign))), size});
  used_ = 0;
}

}  // namespace thermocline
