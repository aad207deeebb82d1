#include "arena.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <new>

namespace thermocline {
namespace {

constexpr size_t kLines = 128;  // a pair of cache lines, as Streams::Stretch wants
constexpr size_t kSmallest = size_t{1} << 20;
constexpr size_t kHugePage = size_t{1} << 21;

// Pieces of several huge pages begin with one, so that the system can give them such.
std::align_val_t alignment(size_t size) {
  return std::align_val_t{size < 2 * kHugePage ? kLines : kHugePage};
}

}  // namespace

void Arena::Free::operator()(std::byte* p) const { ::operator delete[](p, alignment(size)); }

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
  auto* made = static_cast<std::byte*>(::operator new[](size, alignment(size)));
  pieces_.push_back({std::unique_ptr<std::byte[], Free>(made, Free{size}), size});
#ifdef __linux__
  if (size >= 2 * kHugePage) madvise(made, size / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  used_ = 0;
}

}  // namespace thermocline
