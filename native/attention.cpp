#include "attention.h"

#include <algorithm>
#include <cstring>

#include "attend_panels.h"
#include "attend_parts.h"
#include "matrix.h"

namespace thermocline {
namespace {

constexpr int64_t kChunk = kAttendKeys;
constexpr int64_t kQueries = 64;      // queries of a block: tokens times the heads that share a kv head
constexpr int64_t kWidenQueries = 8;  // from here on half keys and values are widened once for all queries
// Up to so many tokens the chunks of one head are shared among workers; a longer batch has work enough in its
// blocks.
constexpr int64_t kSplitTokens = 4;
constexpr int64_t kPlaceBytes = 4096;  // least bytes between places that are fetched by turns: a page
constexpr int64_t kNoItem = -1;

// The keys and the values of an item, and the keys of the one after, which a worker reads one after another.
struct Stream {
  struct Piece {
    const uint8_t* data;
    int64_t rows, row_bytes;
  };
  Piece pieces[3];

  int64_t place_rows;  // rows from one place to the next that are fetched by turns: whole steps
  int64_t places;      // kPlaces or 1

  // What is fetched during the step at row `k` of a piece: as large a part of the next places * place_rows
  // rows.
  Ahead after(int piece, int64_t k) const {
    const int64_t block = places * place_rows;
    for (k += block; piece < 3; ++piece) {
      const Piece& now = pieces[piece];
      const int64_t rows = (now.rows + block - 1) / block * block;
      if (k < rows) {
        const int64_t row = k / block * block + k % block / places;
        const int64_t apart = places > 1 ? place_rows * now.row_bytes : 0;
        return {now.data + row * now.row_bytes, now.row_bytes, apart};
      }
      k -= rows;
    }
    return {nullptr, 0, 0};
  }
};

class Attention {
 public:
  Attention(Context& context, const AttentionJob& job)
      : context_(context),
        job_(job),
        group_(job.group()),
        dim_(job.head_dim),
        q_stride_(parts_of(job.head_dim, kQuadColumns) * kQuadColumns),
        quads_(context.kernels.quad_tokens ? q_stride_ / kQuadColumns : 0),
        split_(job.tokens <= kSplitTokens),
        block_tokens_(split_ ? job.tokens : std::max<int64_t>(1, kQueries / group_)),
        first_chunk_(job.visible_from(0) / kChunk),
        chunks_((job.start + job.tokens - 1) / kChunk + 1 - first_chunk_),
        team_(context.team((job.start + job.tokens - job.visible_from(0)) * job.kv_heads *
                           (job.keys.row_bytes + job.values.row_bytes) * job.tokens)),
        streams_(context.streams(team_)) {
    const int64_t queries = block_tokens_ * group_;
    sums_size_ = Sums::size(queries, dim_);
    constexpr int64_t kQuadFloats = sizeof(QuadToken) / sizeof(float);
    bytes_size_ = job.keys.format == kQ8_0
                      ? queries * (q_stride_ / 4 + 2 * q_stride_ / kBlock + quads_ * kQuadFloats)
                      : 0;
    queries_size_ = aligned(queries * dim_ + bytes_size_);
    // Queries, scores, widened chunk, sums of the chunk, sums so far.
    scratch_size_ = queries_size_ + aligned(queries * kChunk + kChunk * dim_ + 2 * sums_size_);
    scratch_ = context.arena.take_areas<float>(scratch_size_, team_.size());
    const int64_t blocks = (job.tokens + block_tokens_ - 1) / block_tokens_;
    if (split_) {
      parts_ = context.arena.take<float>(job.kv_heads * chunks_ * sums_size_);
      prepared_ = context.arena.take<float>(job.kv_heads * queries_size_);
      prepare_items_.reset(job.kv_heads, 1);
      streams_.reset(job.kv_heads * chunks_, 1, false);
      merge_items_.reset(job.kv_heads * queries, 1);
    } else {
      items_.reset(job.kv_heads * blocks, 1);
    }
    write_items_.reset(job.tokens * job.kv_heads, 16);
  }

  void run() {
    team_.run([&](int worker) {
      write_items_.drain(
          [&](int64_t begin, int64_t end) { write_cache(context_.kernels, job_, begin, end); });
      prepare_items_.drain(
          [&](int64_t head, int64_t) { prepare(head, 0, job_.tokens, prepared_ + head * queries_size_); });
      team_.barrier();
      float* scratch = scratch_.of(worker);
      if (!split_) {
        items_.drain([&](int64_t item, int64_t) { attend_block(item, scratch); });
        return;
      }
      // A worker goes on with the chunk after, whose keys it fetches at the end of this one.
      const int64_t count = job_.kv_heads * chunks_;
      streams_.drain(worker, [&](int64_t item, int64_t) {
        attend_chunk(item, item + 1 < count ? item + 1 : kNoItem, scratch);
      });
      team_.barrier();
      merge_items_.drain([&](int64_t item, int64_t) { merge_chunks(item, scratch); });
    });
  }

 private:
  // Floats in whole vectors of any level.
  static int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

  Sums sums_at(float* memory) const { return Sums(memory, block_tokens_ * group_, dim_); }

  // Puts the queries of tokens t0 .. t1 and one kv head into `memory`, one after another, and in 8 bits too
  // if the keys are.
  void prepare(int64_t head, int64_t t0, int64_t t1, float* memory) const {
    for (int64_t t = t0; t < t1; ++t) {
      const float* from = job_.q + (t * job_.heads + head * group_) * dim_;
      std::copy(from, from + group_ * dim_, memory + (t - t0) * group_ * dim_);
    }
    if (job_.keys.format != kQ8_0) return;
    const Queries to = queries_at(memory);
    std::memset(to.q, 0, static_cast<size_t>(bytes_size_) * sizeof(float));
    const int64_t blocks = q_stride_ / kBlock;
    for (int64_t i = 0; i < (t1 - t0) * group_; ++i) {
      int8_t* q = to.q + i * q_stride_;
      float* d = to.d + i * blocks;
      int16_t* sums = to.sums + 2 * i * blocks;
      context_.kernels.quantize(to.x + i * dim_, dim_, q, d, sums);
      if (quads_) context_.kernels.quad_tokens(q, d, sums, quads_, to.quads + i * quads_);
    }
  }

  struct Queries {
    float* x;
    int8_t* q;
    float* d;
    int16_t* sums;
    QuadToken* quads;
  };

  Queries queries_at(float* memory) const {
    const int64_t room = block_tokens_ * group_;
    float* bytes = memory + room * dim_;
    float* d = bytes + room * q_stride_ / 4;
    float* sums = d + room * q_stride_ / kBlock;
    return {memory, reinterpret_cast<int8_t*>(bytes), d, reinterpret_cast<int16_t*>(sums),
            reinterpret_cast<QuadToken*>(sums + room * q_stride_ / kBlock)};
  }

  // What prepare() put there.
  Tokens tokens_at(float* memory) const {
    Tokens tokens{};
    const Queries from = queries_at(memory);
    tokens.x = from.x;
    tokens.x_stride = dim_;
    if (job_.keys.format != kQ8_0) return tokens;
    tokens.q = from.q;
    tokens.d = from.d;
    tokens.sums = from.sums;
    tokens.q_stride = q_stride_;
    tokens.quads = quads_ ? from.quads : nullptr;
    return tokens;
  }

  // Rows k0 .. k1 of a head's cache, as floats if so many queries will read them as such.
  Rows rows(const Cache& cache, int64_t head, int64_t k0, int64_t k1, int64_t queries, float* wide,
            Format* format) {
    const Rows stored{cache.row(head, k0), cache.row_bytes, nullptr};
    *format = cache.format;
    if (cache.format == kF32 || queries < kWidenQueries) return stored;
    context_.kernels.dequantize[cache.format](stored, 0, k1 - k0, 0, dim_, wide, dim_);
    *format = kF32;
    return {reinterpret_cast<const uint8_t*>(wide), dim_ * 4, nullptr};
  }

  // The keys or the values of an item of the decode path.
  Stream::Piece piece(const Cache& cache, int64_t item) const {
    if (item == kNoItem) return {nullptr, 0, 0};
    const int64_t from = std::max((first_chunk_ + item % chunks_) * kChunk, job_.visible_from(0));
    const int64_t to = std::min((first_chunk_ + item % chunks_ + 1) * kChunk, job_.start + job_.tokens);
    return {cache.row(item / chunks_, from), to - from, cache.row_bytes};
  }

  // The scores of `rows` keys, while those after them are fetched.
  void score(const DotJob& dots, Format format, int64_t rows, int64_t queries, const Stream& stream) const {
    const auto few = context_.kernels.attend.score[format];
    for (int64_t k = 0; k < rows; k += kStep) {
      const int64_t end = std::min(k + kStep, rows);
      const Ahead ahead = stream.after(0, k);
      if (few) {
        few(dots, k, end, 0, queries, ahead);
        continue;
      }
      fetch(ahead, 0, kStep * ahead.row_bytes);
      context_.kernels.dot[format](dots, k, end, 0, queries);
    }
  }

  // The sums of tokens t0 .. t1, whose queries are `tokens`, over the keys that they see in one chunk.
  void attend(int64_t head, int64_t t0, int64_t t1, int64_t chunk, const Tokens& tokens, float* scratch,
              const Sums& sums, const Stream* stream = nullptr) {
    const int64_t queries = (t1 - t0) * group_;
    float* scores = scratch + queries_size_;
    float* wide = scores + block_tokens_ * group_ * kChunk;
    const int64_t origin = chunk * kChunk;
    const int64_t from = std::max(origin, job_.visible_from(t0));
    const int64_t to = std::min(origin + kChunk, job_.start + t1);
    sums.clear(queries, dim_);
    if (from >= to) return;
    // Steps of the softmax begin at fixed positions, so that all sums are taken in the same order by every
    // batch.
    const int64_t base = from / kStep * kStep;
    const int64_t steps = (to - base + kStep - 1) / kStep * kStep;

    Format format = job_.keys.format;
    const Rows keys = format == kQ8_0 || stream
                          ? Rows{job_.keys.row(head, from), job_.keys.row_bytes, nullptr}
                          : rows(job_.keys, head, from, to, queries, wide, &format);
    const DotJob dots{keys, dim_, tokens, scores + (from - base), kChunk, nullptr, false};
    if (stream) {
      score(dots, format, to - from, queries, *stream);
    } else {
      context_.kernels.dot[format](dots, 0, to - from, 0, queries);
    }
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t t = t0 + i / group_;
      const int64_t first = std::clamp(job_.visible_from(t) - base, from - base, steps);
      const int64_t last = std::clamp(job_.start + t + 1 - base, first, to - base);
      soften(context_.kernels, job_, scores + i * kChunk, first, last, steps, sums, i);
    }
    if (stream) {
      const Rows values{job_.values.row(head, from), job_.values.row_bytes, nullptr};
      const AxpyJob add{values, nullptr, scores + (from - base), kChunk, sums.acc, dim_};
      const auto mix = context_.kernels.attend.mix[job_.values.format];
      for (int64_t k = 0; k < to - from; k += kStep)
        mix(add, k, std::min(k + kStep, to - from), 0, queries, dim_, stream->after(1, k));
      return;
    }
    const Rows values = rows(job_.values, head, from, to, queries, wide, &format);
    const AxpyJob add{values, nullptr, scores + (from - base), kChunk, sums.acc, dim_};
    context_.kernels.axpy[format](add, 0, to - from, 0, queries, 0, dim_);
  }

  void attend_chunk(int64_t item, int64_t next, float* scratch) {
    const int64_t head = item / chunks_, chunk = first_chunk_ + item % chunks_;
    const int64_t steps = (kPlaceBytes / job_.keys.row_bytes + kStep - 1) / kStep;
    const Stream stream{{piece(job_.keys, item), piece(job_.values, item), piece(job_.keys, next)},
                        std::max<int64_t>(1, steps) * kStep,
                        context_.fetching == kToSecond ? 1 : kPlaces};
    attend(head, 0, job_.tokens, chunk, tokens_at(prepared_ + head * queries_size_), scratch,
           sums_at(parts_ + item * sums_size_), dim_ % kAttendColumns == 0 ? &stream : nullptr);
  }

  void merge_chunks(int64_t item, float* scratch) {
    const int64_t queries = job_.tokens * group_, head = item / queries, i = item % queries;
    const Sums total = sums_at(scratch);
    total.clear(1, dim_);
    for (int64_t c = 0; c < chunks_; ++c)
      total.merge(context_.kernels, 0, sums_at(parts_ + (head * chunks_ + c) * sums_size_), i, dim_);
    finish(job_, head, 0, i, total, 0);
  }

  void attend_block(int64_t item, float* scratch) {
    // The last blocks see the most keys: they are handed out first.
    const int64_t blocks = (job_.tokens + block_tokens_ - 1) / block_tokens_;
    const int64_t head = item % job_.kv_heads, block = blocks - 1 - item / job_.kv_heads;
    const int64_t t0 = block * block_tokens_, t1 = std::min(t0 + block_tokens_, job_.tokens);
    const int64_t queries = (t1 - t0) * group_;
    float* memory = scratch + scratch_size_ - 2 * sums_size_;
    const Sums part = sums_at(memory), total = sums_at(memory + sums_size_);
    prepare(head, t0, t1, scratch);
    const Tokens tokens = tokens_at(scratch);
    total.clear(queries, dim_);
    for (int64_t c = job_.visible_from(t0) / kChunk; c <= (job_.start + t1 - 1) / kChunk; ++c) {
      attend(head, t0, t1, c, tokens, scratch, part);
      for (int64_t i = 0; i < queries; ++i) total.merge(context_.kernels, i, part, i, dim_);
    }
    for (int64_t i = 0; i < queries; ++i) finish(job_, head, t0, i, total, i);
  }

  Context& context_;
  const AttentionJob& job_;
  const int64_t group_, dim_, q_stride_, quads_;
  const bool split_;
  const int64_t block_tokens_, first_chunk_, chunks_;
  Pool& team_;
  int64_t sums_size_, bytes_size_, queries_size_, scratch_size_;
  Areas<float> scratch_;
  float* parts_ = nullptr;
  float* prepared_ = nullptr;
  Items items_, merge_items_, write_items_, prepare_items_;
  Streams streams_;
};

}  // namespace

void attention(Context& context, const AttentionJob& job) {
  if (job.tokens == 0 || job.heads == 0) return;
  if (PanelAttention::pays(context.kernels, job)) {
    PanelAttention(context, job).run();
  } else {
    Attention(context, job).run();
  }
}

}  // namespace thermocline
