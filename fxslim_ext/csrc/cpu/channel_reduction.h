// Sums (or minima, ...) per channel in one pass over a tensor, on all threads. The partition into
// pieces depends on the shape alone, so the result does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../layout.h"

namespace fxslim {

constexpr int64_t kPiece = 1 << 16;
constexpr int64_t kMaxTables = 32;

// Where runs of one channel are short, a piece is accumulated into a table of whole periods.
struct ReductionShape {
  Walk walk;
  bool spread;
  int64_t table;            // accumulators of a piece, per quantity
  int64_t pieces, piece;    // of the tensor (spread) or of a run; elements in a piece

  explicit ReductionShape(const Walk& walk_) : walk(walk_) {
    const int64_t period = std::max<int64_t>(walk.period(), 1);
    spread = walk.channels > 1 && walk.inner < 32;
    table = spread ? period * std::max<int64_t>(1, 1024 / period) : 1;
    // At most kMaxTables tables are alive at once, however wide they are.
    const int64_t rows = std::max(kPiece / table, (walk.numel() / table + kMaxTables - 1) / kMaxTables);
    piece = spread ? table * std::max<int64_t>(1, rows) : kPiece;
    pieces = ((spread ? walk.numel() : walk.inner) + piece - 1) / piece;
  }
};

// One set of `Quantities` accumulators per channel.
//   start(k)                            first value of quantity k
//   over_run(begin, end, channel, acc)  adds the elements of one channel to acc[k]
//   over_table(begin, end, acc, table)  adds element i to acc[k * table + (i - begin) % table]
//   merge(into, stride_into, from, stride_from)
template <int Quantities, class Value, class Start, class OverRun, class OverTable, class Merge>
std::vector<Value> reduce_channels(
    const Walk& walk, const Start& start, const OverRun& over_run, const OverTable& over_table, const Merge& merge) {
  const ReductionShape shape(walk);
  const auto started = [&](int64_t entries) {
    std::vector<Value> values(entries * Quantities);
    for (int64_t k = 0; k < Quantities; ++k) std::fill_n(values.begin() + k * entries, entries, start(k));
    return values;
  };
  std::vector<Value> result = started(walk.channels);
  if (walk.numel() == 0) return result;
  const int64_t runs = shape.spread ? 1 : walk.outer * walk.channels;
  const int64_t tasks = runs * shape.pieces;
  std::vector<Value> partial(shape.spread ? 0 : tasks * Quantities);
  std::vector<std::vector<Value>> tables(shape.spread ? tasks : 0);
  const int64_t work = shape.spread ? shape.piece : std::min(shape.piece, walk.inner);
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kPiece / 2 / work), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      if (shape.spread) {
        tables[t] = started(shape.table);
        const int64_t begin = t * shape.piece;
        over_table(begin, std::min(walk.numel(), begin + shape.piece), tables[t].data(), shape.table);
      } else {
        const int64_t run = t / shape.pieces, begin = run * walk.inner + t % shape.pieces * shape.piece;
        Value* acc = &partial[t * Quantities];
        for (int64_t k = 0; k < Quantities; ++k) acc[k] = start(k);
        over_run(begin, std::min((run + 1) * walk.inner, begin + shape.piece), run % walk.channels, acc);
      }
    }
  });
  if (shape.spread) {
    for (const auto& table : tables)
      for (int64_t p = 0; p < shape.table; ++p)
        merge(&result[p / walk.inner % walk.channels], walk.channels, &table[p], shape.table);
  } else {
    for (int64_t t = 0; t < tasks; ++t)
      merge(&result[t / shape.pieces % walk.channels], walk.channels, &partial[t * Quantities], int64_t(1));
  }
  return result;
}

}  // namespace fxslim
