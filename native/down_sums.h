// Down projection over neuron records of an integer format: weighted sums of rows in whole numbers.
#pragma once

#include <cstdint>

#include "context.h"
#include "matrix.h"

namespace thermocline {

// A token's factors are counted in a unit of its own, for which the largest product of a factor with a scale
// decides, of all rows that are not weighed by zero. In it the sums are exact, so that the result depends
// neither on what is skipped, nor on threads, nor on where rows lie, nor on the rest of the batch.
class DownSums {
 public:
  // Takes scratch for lists of up to `most` rows. `largest` has a place for each row of the matrix, with what
  // was found before; without it rows are looked through each time. If `weighed`, weigh() meets every place
  // of the list before it is made.
  DownSums(Context& context, Pool& team, const Matrix& down, const LargestScales* largest, int64_t tokens,
           int64_t most, bool weighed);

  // Places k0 .. k1 of the list, with their rows (the places themselves if null), have their h.
  void weigh(int worker, const int32_t* rows, const float* h, int64_t k0, int64_t k1);

  // As DownRecords has them.
  void list(const int32_t* ids, const int32_t* rows, const uint8_t* wanted, int64_t count, const float* h,
            int64_t h_stride);
  void add(int worker, float* out);

 private:
  // What the factors of a token are counted in: units to one, and one to a unit.
  struct Scale {
    double per_factor, per_least;
    SumUnits units;
    bool finite, known;  // known: of every row its largest scale is
  };

  int64_t row(int64_t place) const { return rows_ ? rows_[place] : place; }
  void measure(int64_t k0, int64_t k1);
  Scale scale_of(int64_t t, const int32_t* list, int64_t count) const;
  LargestScale heaviest() const;
  static Scale scale_from(const LargestScale& factor);
  SumJob job_of(int64_t t, const int32_t* list, SumStep* sums) const;
  void add_one(int worker, float* out);
  void finish_one(int worker, float* out);
  void begin_token(int64_t t);
  void add_tile(int worker, int64_t item, float* out);
  void finish(int64_t t, const SumStep* parts, int64_t count, int64_t c0, int64_t c1, float* out) const;

  Context& context_;
  Pool& team_;
  const Matrix& down_;
  const int64_t tokens_, most_, steps_;
  const float* h_ = nullptr;
  int64_t h_stride_ = 0, count_ = 0;
  int32_t *listed_rows_, *listed_positions_;
  const int32_t *rows_ = nullptr, *positions_ = nullptr;  // of each place of the list; null: the place
  const bool kept_;
  const bool weigh_;
  LargestScales largest_;  // by row if they are kept, else by place
  bool measured_ = false;
  Scale* scales_;                  // of each token
  Areas<LargestScale> weighed_{};  // by each worker: its largest factors; for one token whose rows are kept
  Areas<SumStep> sums_;            // for one token `steps_` of them
  int32_t* fired_ = nullptr;       // more: per token an ascending list of places, and an end
  int64_t column_parts_ = 0, token_parts_ = 0;
  Streams streams_;
  Items measure_items_, token_items_, items_;
};

}  // namespace thermocline
