// The table of kernels that each instruction set fills, and the plain data they work on.
//
// Every output element is computed by one call in an order that depends on its own row and token only:
// neither on the rows and tokens that share the call nor on how calls are spread over threads.
#pragma once

#include <cstdint>

#include "format.h"

namespace thermocline {

// Where rows are brought to before they are read. To the first cache: those that lie apart eight at a time.
// Or to the second, which some processors ask for more lines at once: those that lie apart a tile at a time;
// single rows of floats with neighbours are then left to the processor's own prefetching.
enum Fetching { kToFirst, kToSecond };

// Rows of a matrix: row i lies at base + (ids ? ids[i] : i) * row_bytes. There are `count` of them, which a
// kernel may fetch ahead of its own; 0 says no more than the kernel is given.
struct Rows {
  const uint8_t* base;
  int64_t row_bytes;
  const int32_t* ids;
  int64_t count = 0;
  Fetching fetching = kToFirst;
};

constexpr int kGroupTokens = 16;

constexpr int64_t kQuadColumns = 4 * kBlock;

// Four blocks of a token: the first 16 numbers of each block, and the second 16. Then what belongs to a
// block, four times: its scale, that times the sum of its numbers, and -8 times that sum; and minus the sums
// of its first 16 numbers and of the second, with two zeros after them.
struct QuadToken {
  int8_t first[64], second[64];
  float d[16], sums[16];
  int32_t eight[16], minus[16];
};

// Which block stands for block i of four, of which `left` are there.
static inline int block_in(int i, int left) { return i < left ? i : left - 1; }

// Activations of a batch. Integer formats read the quantised form: per block of 32 a float scale `d` and 32
// signed bytes `q` in [-127, 127]; `sums` holds the sum of every 16 neighbouring bytes. `q_stride` is a whole
// number of four blocks, the last padded with zeros, so that a kernel may read past `columns`.
struct Tokens {
  const float* x;
  int64_t x_stride;
  const int8_t* q;
  const float* d;
  const int16_t* sums;
  int64_t q_stride;
  // For panels only, each where a panel asks for it: q + 128 and, for each block, d times the sum of q; tiles
  // of kTileTokens tokens column by column; numbers rounded to BF16, with an even number of columns; the same
  // in groups of kGroupTokens tokens, of which 32 columns lie together, pair by pair, the last padded with
  // zeros; these columns followed each time by what rounding took off them, rounded too.
  const uint8_t* offset;
  const float* lifts;
  const float* tiles;
  const uint16_t* rounded;
  const uint16_t* pairs;
  const uint16_t* split;
  // Instead of q, d and sums where a level wants it: q_stride / kQuadColumns for each token.
  const QuadToken* quads;
};

// The form of tokens that a kernel reads.
enum TokenForm : unsigned {
  kPlain = 0,
  kBytes = 1,
  kOffsetBytes = 2,
  kTiled = 4,
  kRounded = 8,
  kPaired = 16,
  kSplit = 32,
  kQuads = 64
};

constexpr int64_t kPanelRows = 32;
// Tokens from which on weights meet what is rounded for them.
constexpr int64_t kRoundedTokens = 8;
constexpr int kTileTokens = 12;
constexpr int64_t kPairColumns = 32;
constexpr int64_t kAcrossColumns = 256;
// Rows whose panels are made before tokens meet them, where tokens take longer to read than weights.
constexpr int64_t kManyPanelRows = 256;

// out[t * out_stride + r] = row(r) . token(t) (+ bias[r]) (+ the old value if `add`)
struct DotJob {
  Rows rows;
  int64_t columns;
  Tokens tokens;
  float* out;
  int64_t out_stride;
  const float* bias;
  bool add;
};

// Products of a batch of tokens with weights that are unpacked first, kPanelRows rows at a time.
struct PanelKernels {
  TokenForm form;
  int64_t least;  // tokens from which on unpacking pays
  // Rows that are unpacked at once at most: a panel for each kPanelRows, one after another.
  int64_t rows;
  int64_t scratch;                    // bytes that dot needs
  int64_t (*bytes)(int64_t columns);  // of a panel
  void (*pack)(const Rows& rows, int64_t r0, int64_t r1, int64_t columns, uint8_t* panel);
  // Rows r0 .. r1 of the job, which are those of the panels, with all tokens; `scratch` lies on a line of
  // the cache.
  void (*dot)(const DotJob& job, const uint8_t* panel, int64_t r0, int64_t r1, int64_t tokens,
              uint8_t* scratch);
};

// acc[t * acc_stride + c - c0] += sum over k of h[t * h_stride + (positions ? positions[k] : k)] * row(k)[c],
// in ascending k.
struct AxpyJob {
  Rows rows;
  const int32_t* positions;
  const float* h;
  int64_t h_stride;
  float* acc;
  int64_t acc_stride;
};

constexpr int kListColumns = 128;

// Of rows k0 .. k1, whose kListColumns numbers lie in a tile, those that a token lists, ascending: row k with
// the factor h[positions[k]].
struct ListJob {
  const float* numbers;
  int64_t k0, k1;
  const int32_t* list;  // ends with a number that is at least k1
  const int32_t* positions;
  const float* h;
};

// Columns of which weighted sums lie together.
constexpr int kSumColumns = 4 * kBlock;
// Factors are whole numbers up to this, as exact as floats are, so that what a sum comes to hardly depends on
// its unit; they are taken by digits, of a signed byte each.
constexpr int kLargestFactor = (1 << 22) - 1;
constexpr int kDigits = 3;
// As many rows as sums of unsigned bytes times digits have room for.
constexpr int64_t kMostSumRows = 65536;

// Sums of kSumColumns columns by digit, lowest first, in an order of the level's own; and of the factors of
// the four blocks and what minima take off, digit d of block i in place 4 * i + d. In Q6_K the second factors
// are those of the second halves of blocks.
struct alignas(64) SumStep {
  int32_t at[kDigits][kSumColumns];
  int32_t factors[2][16], least[16];
};

// sums += the rows at places list[k] (k if null), each with the factor h[positions[place]] (h[place] if
// null).
struct SumJob {
  Rows rows;
  const int32_t* list;
  const int32_t* positions;
  const float* h;
  double per_factor, per_least;  // units that a factor times a scale, or times a minimum, of 1 comes to
  SumStep* sums;
};

// What a sum is multiplied with in the end.
struct SumUnits {
  double factor, least;
};

// The largest magnitude of a row's scales, and of its minima; NaN if there is one among them.
struct LargestScale {
  float scale, least;
};

// The same of many rows; -1 where it is not known yet.
struct LargestScales {
  float *scale, *least;
};

// Factors h[positions[k]] for the places k = list[i] (k and i where null), of rows rows[k] (k if null).
struct FactorJob {
  const float* h;
  const int32_t *positions, *list, *rows;
};

// Places that are fetched by turns, where not all is read as it lies: a processor's own prefetching may
// follow each page apart, so that lines of a few pages arrive faster than those of one.
constexpr int64_t kPlaces = 8;

// What will be read soon: it is fetched meanwhile, so many bytes for each row that is worked on; at one place
// or, if they lie `apart` bytes from each other, an equal share of them at each of kPlaces.
struct Ahead {
  const uint8_t* data;
  int64_t row_bytes, apart;
};

// Fetches bytes from .. to of what is ahead: the same line of 64 of all places, then the next.
static inline void fetch(const Ahead& ahead, int64_t from, int64_t to) {
  constexpr int64_t kLine = 64, kTurn = kPlaces * kLine;
  if (!ahead.apart) {
    for (int64_t at = (from + kLine - 1) / kLine * kLine; at < to; at += kLine)
      __builtin_prefetch(ahead.data + at, 0, 2);
    return;
  }
  for (int64_t turn = (from + kTurn - 1) / kTurn; turn * kTurn < to; ++turn) {
    for (int64_t place = 0; place < kPlaces; ++place)
      __builtin_prefetch(ahead.data + place * ahead.apart + turn * kLine, 0, 2);
  }
}

// For the few queries of a decode step, which meet every key and value of the cache once.
struct AttendKernels {
  // What dot gives, to the bit, where rows follow each other and there is neither bias nor add. Columns are a
  // multiple of kAttendColumns, as below. Null where dot is as fast.
  void (*score[kFormats])(const DotJob& job, int64_t r0, int64_t r1, int64_t t0, int64_t t1,
                          const Ahead& ahead);
  // What axpy gives, to the bit, where rows follow each other and are taken in order.
  void (*mix[kFormats])(const AxpyJob& job, int64_t k0, int64_t k1, int64_t t0, int64_t t1, int64_t columns,
                        const Ahead& ahead);
  // total[c] = total[c] * keep + part[c] * take
  void (*blend)(float* total, float keep, const float* part, float take, int64_t n);
};

constexpr int64_t kAttendColumns = 16;

// For the many queries of a prompt: keys and values as panels of split numbers, which meet Tokens::split. All
// null where the level or the format has none.
struct SplitKernels {
  PanelKernels panel[kFormats];
  // As Kernels::pack_across.
  void (*pack_across[kFormats])(const Rows& rows, int64_t steps, int64_t c0, int64_t c1, int64_t columns,
                                uint8_t* panels);
};

enum Activation : int { kSilu = 0, kRelu = 1, kRelu2 = 2, kGelu = 3 };

struct Kernels {
  const char* name;
  // Activations to 8 bits; n is a multiple of 32. A block that is not finite gets a NaN scale.
  void (*quantize)(const float* x, int64_t n, int8_t* q, float* d, int16_t* sums);
  void (*dot[kFormats])(const DotJob& job, int64_t r0, int64_t r1, int64_t t0, int64_t t1);
  // All null where the level has none.
  PanelKernels panel[kFormats];
  void (*tile_tokens)(const float* x, int64_t x_stride, int64_t count, int64_t columns, float* out);
  void (*round_tokens)(const float* x, int64_t n, uint16_t* out);
  // Up to kGroupTokens tokens as Tokens::pairs and Tokens::split have them.
  void (*pair_tokens)(const float* x, int64_t x_stride, int64_t count, int64_t columns, uint16_t* out);
  void (*split_tokens)(const float* x, int64_t x_stride, int64_t count, int64_t columns, uint16_t* out);
  // Panels of columns c0 .. c1 (at most kAcrossColumns, c0 a multiple of them) of a matrix whose rows are
  // summed over: what they meet are tokens with a number for each place of rows.ids, 32 a step, zeros where
  // that is negative. One panel after another, of kPanelRows columns each. Null where the level has none.
  void (*pack_across[kFormats])(const Rows& rows, int64_t steps, int64_t c0, int64_t c1, int64_t columns,
                                uint8_t* panels);
  // c0 and c1 are multiples of the block.
  void (*axpy[kFormats])(const AxpyJob& job, int64_t k0, int64_t k1, int64_t t0, int64_t t1, int64_t c0,
                         int64_t c1);
  // acc (kListColumns) += the listed rows of a tile, with the operations of axpy, from place `next` of the
  // list on; returns the place of the first row that is not below k1.
  int32_t (*add_listed)(const ListJob& job, int32_t next, float* acc);
  // The largest magnitude of a factor times the scale of its row, of places i < count; NaN if one is, and
  // less than 0 if a scale is.
  float (*largest_factor)(const FactorJob& job, const float* scales, int64_t count);
  // These are null but for integer formats. Places k0 .. k1 of a job, columns c0 .. c1, of which c0 is a
  // multiple of kSumColumns.
  void (*add_sums[kFormats])(const SumJob& job, int64_t k0, int64_t k1, int64_t c0, int64_t c1);
  LargestScale (*largest_scale[kFormats])(const uint8_t* row, int64_t columns);
  // out += the sum of `count` parts, `stride` steps apart.
  void (*finish_sums[kFormats])(const SumStep* parts, int64_t count, int64_t stride, const SumUnits& units,
                                int64_t columns, float* out);
  // out[(r - r0) * out_stride + c - c0]; c0 and c1 are multiples of the block.
  void (*dequantize[kFormats])(const Rows& rows, int64_t r0, int64_t r1, int64_t c0, int64_t c1, float* out,
                               int64_t out_stride);
  // First of `count` rows of `columns` elements that holds a NaN or an infinity (in a value or a scale), or
  // -1.
  int64_t (*first_nonfinite[kFormats])(const uint8_t* base, int64_t count, int64_t columns,
                                       int64_t row_bytes);
  // x = act(x)
  void (*activate)(Activation activation, float threshold, float* x, int64_t n);
  // The columns of scores (tokens, n) where some token has at least `threshold`, ascending; returns how many.
  // `out` has room for n.
  int64_t (*select)(const float* scores, int64_t tokens, int64_t n, float threshold, int32_t* out);
  // Sets flags[i] where x[i] is not zero; returns how many are not.
  int64_t (*flag_nonzero)(const float* x, int64_t n, uint8_t* flags);
  // The places of the flags, each 0 or 1, that are set, ascending; returns how many. `out` has room for n.
  int64_t (*list_flags)(const uint8_t* flags, int64_t n, int32_t* out);
  // h[i] = gate * h[i], and exactly +0 where the gate is 0, for the gate gates[places[i]] (gates[i] if null).
  void (*close_gates)(const float* gates, const int32_t* places, float* h, int64_t n);
  void (*rms_norm)(const float* x, const float* weight, double eps, float* out, int64_t n);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, double eps, float* out,
                     int64_t n);
  void (*rope)(float* head, const float* cosine, const float* sine, int64_t half, bool interleaved);
  // Scores to exp(score * scale - m), their maximum m and their sum; n is a multiple of 16 and a score of
  // -inf becomes 0. Returns the sum; m is -inf and the sum 0 if there is no score.
  float (*softmax_part)(float* scores, int64_t n, float scale, float* m);
  // out[i] += the sum over p of parts[p * stride + i], in ascending p.
  void (*reduce)(const float* parts, int64_t count, int64_t stride, float* out, int64_t n);
  // Any alignment.
  void (*to_half)(const float* x, uint8_t* out, int64_t n);
  // A value that depends on all bytes, so that reading them cannot be optimised away.
  uint64_t (*checksum)(const uint8_t* data, int64_t n);
  AttendKernels attend = {};
  SplitKernels split = {};
  // `count` times four blocks of a token. Null where the level reads none.
  void (*quad_tokens)(const int8_t* q, const float* d, const int16_t* sums, int64_t count,
                      QuadToken* out) = nullptr;
  // Multiplies tiles, of bytes or of BF16 numbers, `rounds` times and reads no memory; returns the
  // operations, of which a product and its addition are two. Null where the level has no tiles.
  int64_t (*turn_tiles)(bool bytes, int64_t rounds) = nullptr;
};

extern const Kernels kBaselineKernels;
extern const AttendKernels kBaselineAttend;
#ifdef THERMOCLINE_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const AttendKernels kAvx2Attend, kAvx512Attend;
// What a CPU with AVX-VNNI does otherwise than one with AVX2, in integer formats.
struct VnniKernels {
  void (*dot[kFormats])(const DotJob& job, int64_t r0, int64_t r1, int64_t t0, int64_t t1);
  PanelKernels panel[kFormats];
  decltype(Kernels::add_sums) add_sums;
  decltype(Kernels::finish_sums) finish_sums;
};
extern const VnniKernels kAvxVnniKernels;
// What a CPU with AVX512-BF16 does otherwise.
struct Bf16Kernels {
  PanelKernels panel;
  void (*round_tokens)(const float* x, int64_t n, uint16_t* out);
};
extern const Bf16Kernels kAvx512Bf16Kernels;
// What a CPU with AMX does otherwise than that, where a format has a panel here.
struct AmxKernels {
  PanelKernels panel[kFormats];
  decltype(Kernels::pair_tokens) pair_tokens, split_tokens;
  decltype(Kernels::pack_across) pack_across;
  SplitKernels split;
  decltype(Kernels::turn_tiles) turn_tiles;
};
extern const AmxKernels kAmxKernels;
#endif

}  // namespace thermocline
