// Passes over whole matrices: are all values finite, how fast can they be read.

// Whether `count` 16-bit words at `step` bytes from each other hold one whose exponent bits are all set.
static inline bool any_set(const uint8_t* p, int64_t count, int64_t step, uint16_t exponent) {
  int found = 0;
  for (int64_t i = 0; i < count; ++i) found |= (load_u16(p + i * step) & exponent) == exponent;
  return found != 0;
}

template <Format F>
static bool row_finite(const uint8_t* row, int64_t columns) {
  if constexpr (F == kF32) return !any_set(row + 2, columns, 4, 0x7F80);  // the high half, little endian
  if constexpr (F == kF16) return !any_set(row, columns, 2, 0x7C00);
  if constexpr (F == kBF16) return !any_set(row, columns, 2, 0x7F80);
  const int64_t blocks = columns / kFormatInfo[F].block;
  constexpr int kBytes = kFormatInfo[F].block_bytes;
  if constexpr (has_scales_apart(F)) {
    constexpr int kScales = kFormatInfo[F].block / kBlock;
    for (int64_t b = 0; b < blocks; ++b) {
      if (any_set(scale_at(part_at<F>(row, b * kScales)), kScales, 2, 0x7C00)) return false;
    }
    return true;
  }
  if (has_minima(F) && any_set(row + 2, blocks, kBytes, 0x7C00)) return false;
  return !any_set(row + (is_q6_k(F) ? 208 : 0), blocks, kBytes, 0x7C00);
}

template <Format F>
static int64_t first_nonfinite(const uint8_t* base, int64_t count, int64_t columns, int64_t row_bytes) {
  for (int64_t r = 0; r < count; ++r) {
    if (!row_finite<F>(base + r * row_bytes, columns)) return r;
  }
  return -1;
}

static uint64_t checksum(const uint8_t* data, int64_t n) {
  uint64_t lane[8] = {};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    for (int j = 0; j < 8; ++j) {
      uint64_t word;
      memcpy(&word, data + i + 8 * j, sizeof word);
      lane[j] += word;
    }
  }
  uint64_t total = 0;
  for (; i < n; ++i) total += data[i];
  for (int j = 0; j < 8; ++j) total += lane[j];
  return total;
}
