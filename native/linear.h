// Products of a batch of activations with the rows of matrices.
#pragma once

#include <cstdint>

#include "context.h"
#include "matrix.h"

namespace thermocline {

// Whether a matrix of this format meets so many tokens by panels.
bool has_panel(const Kernels& kernels, Format format, int64_t tokens);

// The TokenForm in which a matrix of this format meets so many tokens.
unsigned form_of(const Kernels& kernels, Format format, int64_t tokens);

// The activations of an op, brought once to the forms in which all its matrices meet them.
class Batch {
 public:
  // Takes scratch for the forms, a set of TokenForm.
  Batch(Context& context, const float* x, int64_t count, int64_t columns, unsigned forms);

  // In a parallel section: makes the forms with all workers, and waits for the last.
  void prepare(Context& context, Pool& team);

  const Tokens& tokens() const { return tokens_; }
  int64_t count() const { return count_; }
  int64_t columns() const { return columns_; }

 private:
  void quantise_piece(const Kernels& kernels, int64_t piece);

  Tokens tokens_{};
  int64_t count_, columns_;
  int8_t* q_ = nullptr;
  QuadToken* quads_ = nullptr;
  float* d_ = nullptr;
  int16_t* sums_ = nullptr;
  uint8_t* offset_ = nullptr;
  float *lifts_ = nullptr, *tiles_ = nullptr;
  uint16_t *rounded_ = nullptr, *pairs_ = nullptr, *split_ = nullptr;
  int64_t pieces_ = 0;      // of a token
  int64_t group_size_ = 0;  // numbers of a group of tokens, as Tokens::pairs has them
  Items byte_items_, tile_items_, round_items_, group_items_;
};

// Rows that one worker takes at a time: enough bytes to stream, few enough that the workers end together.
int64_t row_grain(int64_t rows, int64_t row_bytes, int64_t tokens, int workers);

// Brings the first lines that a worker will read on their way, while it does something else.
inline void fetch(const uint8_t* data) {
  constexpr int kBytes = 4096;
  for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(data + i);
}

// Floats of scratch that dot_chunk needs for a matrix and a batch.
int64_t dot_scratch(const Kernels& kernels, Format format, int64_t columns, int64_t tokens);

// The dot products of rows r0 .. r1 with all tokens, with the weights read once: by panels where the level
// has them and the batch is worth it, else half formats are widened a few rows at a time, and the tokens
// taken in blocks that stay in the second cache.
void dot_chunk(const Kernels& kernels, Format format, const DotJob& job, int64_t r0, int64_t r1,
               int64_t tokens, float* scratch);

struct LinearPart {
  Matrix matrix;
  float* out;         // (tokens, rows)
  const float* bias;  // (rows), or null
};

// out = x (tokens, columns) times each matrix transposed, plus its bias; added to `out` if `add`.
void linear(Context& context, const float* x, int64_t tokens, int64_t columns, const LinearPart* parts,
            int64_t count, bool add);

}  // namespace thermocline
