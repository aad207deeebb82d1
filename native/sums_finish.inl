// What weighted sums come to.

// A step's sums over all parts.
static inline SumStep whole_step(const SumStep* parts, int64_t count, int64_t stride) {
  constexpr int kInts = sizeof(SumStep) / sizeof(int32_t);
  SumStep total = *parts;
  auto* to = reinterpret_cast<int32_t*>(&total);
  for (int64_t p = 1; p < count; ++p) {
    const auto* from = reinterpret_cast<const int32_t*>(parts + p * stride);
    for (int i = 0; i < kInts; ++i) to[i] += from[i];
  }
  return total;
}

// Four columns, which lie side by side in a step as in a row.
using Ints4 [[gnu::vector_size(16)]] = int32_t;
using Doubles4 [[gnu::vector_size(32)]] = double;
using Floats4 [[gnu::vector_size(16)]] = float;

static inline Ints4 load_four(const int32_t* from) {
  Ints4 to;
  memcpy(&to, from, sizeof to);
  return to;
}

// What digits come to: below 2^53, so that any digits of a number give the same.
template <Format F>
static inline double number_of(const int32_t* digits) {
  constexpr double kBase = kDigitBase<F>;
  return (digits[2] * kBase + digits[1]) * kBase + digits[0];
}
template <Format F>
static inline void numbers_of(const Ints4 (&digits)[kDigits], Doubles4& numbers) {
  constexpr double kBase = kDigitBase<F>;
  numbers = __builtin_convertvector(digits[2], Doubles4);
  for (int d = 1; d >= 0; --d) numbers = numbers * kBase + __builtin_convertvector(digits[d], Doubles4);
}

// The block, and its half, that the columns at place 4 * lane of a half belong to.
template <Format F>
static inline int block_of(int half, int lane) {
  return kFileOrder<F> ? lane / 2 * 2 + half : lane;
}
template <Format F>
static inline int part_of(int half, int lane) {
  return kFileOrder<F> ? lane % 2 : half;
}

// One half of a step's columns.
template <Format F, int half>
static inline void finish_half(const SumStep& sums, const SumUnits& units, int64_t columns, float* out) {
  for (int lane = 0; lane < 4; ++lane) {
    const int part = part_of<F>(half, lane), block = block_of<F>(half, lane);
    const int64_t column = block * kBlock + part * 16;
    if (column >= columns) continue;
    const int32_t* factors = sums.factors[is_q6_k(F) ? part : 0] + 4 * block;
    const double least = has_minima(F) ? units.least * number_of<F>(sums.least + 4 * block) : 0.0;
    for (int j = 0; j < 4; ++j) {
      const int place = (half * 4 + j) * 16 + 4 * lane;
      Ints4 digits[kDigits];
      for (int d = 0; d < kDigits; ++d) {
        digits[d] = load_four(sums.at[d] + place);
        if (kWholeBytes<F> && half) digits[d] = (digits[d] - load_four(sums.at[d] + place - 64)) >> 4;
        if (kUnsigned<F>) digits[d] -= kUnsigned<F> * factors[d];
      }
      Doubles4 numbers;
      numbers_of<F>(digits, numbers);
      const Floats4 values = __builtin_convertvector(numbers * units.factor - least, Floats4);
      float* to = out + column + 4 * j;
      for (int t = 0; t < 4; ++t) to[t] += values[t];
    }
  }
}

template <Format F>
static void finish_sums(const SumStep* parts, int64_t count, int64_t stride, const SumUnits& units,
                        int64_t columns, float* out) {
  for (int64_t c = 0; c < columns; c += kSumColumns, ++parts) {
    const SumStep total = whole_step(parts, count, stride);
    finish_half<F, 0>(total, units, columns - c, out + c);
    finish_half<F, 1>(total, units, columns - c, out + c);
  }
}
