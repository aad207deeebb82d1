// Attention for the many queries of a prompt: products with keys and with values by panels, where the level
// has them for split numbers.
#pragma once

#include <cstdint>

#include "attend_parts.h"

namespace thermocline {

// A worker takes a block of tokens of one kv head and goes through the chunks of keys. A chunk's keys and
// values become panels once; a few queries at a time meet them, so that their scores stay in the cache. A
// query's result depends on itself and the chunks only.
class PanelAttention {
 public:
  // Whether a batch goes this way.
  static bool pays(const Kernels& kernels, const AttentionJob& job);

  PanelAttention(Context& context, const AttentionJob& job);

  void run();

 private:
  // A worker's memory.
  struct Desk {
    uint16_t *queries, *weights;  // split
    uint8_t *keys, *values;       // panels
    uint8_t* scratch;
    float* scores;
    Sums part, total;
  };
  // Keys of a chunk that a block sees: those from `first` on, whole steps, the last of which ends past `to`.
  struct Span {
    int64_t first, from, to, steps;
  };

  Desk desk(int worker) const;
  Span span(int64_t chunk, int64_t t0, int64_t t1) const;
  void split_queries(int64_t head, int64_t t0, int64_t t1, const Desk& desk) const;
  void pack(int64_t head, const Span& span, const Desk& desk) const;
  void attend(int64_t t0, int64_t query, int64_t count, const Span& span, const Desk& desk) const;
  void attend_block(int64_t item, const Desk& desk) const;

  Context& context_;
  const AttentionJob& job_;
  const Kernels& kernels_;
  const int64_t group_, dim_, dim_steps_;
  Pool& team_;
  int64_t block_tokens_;
  Areas<uint16_t> queries_, weights_;
  Areas<uint8_t> keys_, values_, scratch_;
  Areas<float> scores_, parts_, totals_;
  Items items_, write_items_;
};

}  // namespace thermocline
