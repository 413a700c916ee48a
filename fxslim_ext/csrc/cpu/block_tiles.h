// How blocks are added up on the CPU: a tile of a few pixels and filters stays in registers meanwhile.
#pragma once

#include <array>
#include <memory>
#include <utility>

#include "../block_sparse.h"
#include "instruction_set.h"
#if FXSLIM_X86
#include <immintrin.h>
#endif

namespace fxslim {

// The blocks of one part of a sum, for the pixels and filters of a tile.
template <class In, class Weight>
struct Tile {
  // rows[position * row_step + i] is what pixel i reads at a position.
  const In* const* rows;
  int64_t row_step;
  const Weight* weights;
  int64_t block_step, panel_step;  // from one block, and from one panel, to the next
  const int32_t* places;
  int64_t count;
  int64_t cin, row;   // values of a block, and of all blocks of a pixel
  float* sums;        // of a pixel; whole numbers take the same room meanwhile
  int64_t sum_step;   // from one pixel to the next
  // What float sums start from; whole numbers are multiplied and added to in the end.
  const float *factor, *bias;
  const int32_t* start;  // what whole numbers start from
  bool first, last, relu;
};

// One block of a tile: pixel i reads `depth` values from rows[i] + at.
template <class In, class Weight>
struct BlockOfTile {
  const In* const* rows;
  int64_t at, depth;
  const Weight* weights;

  FXSLIM_INLINE BlockOfTile(const Tile<In, Weight>& t, int64_t b)
      : rows(t.rows + t.places[2 * b + 1] * t.row_step), at(t.places[2 * b] * t.cin),
        depth(std::min(t.cin, t.row - at)), weights(t.weights + b * t.block_step) {}
};

// What the next block, or that of the next pixels, reads lies in no order that the processor foresees: 32 channels of it.
template <int64_t Pixels, class In, class Weight>
FXSLIM_INLINE inline void fetch_next(const Tile<In, Weight>& t, int64_t b) {
  const bool more = b + 1 < t.count;
  const int32_t* place = t.places + (more ? 2 * b + 2 : 0);
  const In* const* rows = t.rows + place[1] * t.row_step + (more ? 0 : Pixels);
  const int64_t at = place[0] * t.cin;
  constexpr int64_t kLine = 64 / sizeof(In);
  for (int64_t i = 0; i < Pixels; ++i)
    for (int64_t k = 0; k < 32; k += kLine) __builtin_prefetch(rows[i] + at + k);
}

// What belongs to each filter; null where there is none.
struct Constants {
  const float *factor, *bias;
  const int32_t* start;  // filled up to whole panels
};

// Pixels are worked on in ranges of at most so many: what they read stays in the second-level cache for all parts of the
// sum.
constexpr int64_t kRange = 128;
// Bytes of weights that stay in the first-level cache while a range goes by.
constexpr int64_t kPart = 16384;

// `Kernel` computes with tiles of up to kPixels x kPanels panels: run<pixels, panels>(tile).
template <class Kernel>
class BlockSum {
 public:
  using In = typename Kernel::In;
  using Weight = typename Kernel::Weight;

  // `row` and `cin` count values of the input as it is read here: of a pixel, and of one block of it.
  BlockSum(
      const BlockConvolution& conv_, const In* input_, int64_t row_, int64_t cin_, const In* padded_,
      const PackedBlocks& packed, const Constants& of_filters_, bool relu_, float* output_)
      : conv(conv_), input(input_), row(row_), cin(cin_), padded(padded_),
        weights(static_cast<const Weight*>(packed.blocks.const_data_ptr())),
        places(static_cast<const int32_t*>(packed.places.const_data_ptr())),
        starts(static_cast<const int32_t*>(packed.starts.const_data_ptr())),
        of_filters(of_filters_), relu(relu_), output(output_) {
    // Ranges are alike: a last one of few pixels would read all weights for them.
    const int64_t ranges = (conv.pixels() + kRange - 1) / kRange, even = (conv.pixels() + ranges - 1) / ranges;
    range_size = std::min(kRange, (even + Kernel::kPixels - 1) / Kernel::kPixels * Kernel::kPixels);
  }

  void run() const {
    const int64_t ranges = (conv.pixels() + range_size - 1) / range_size;
    torch::stable::parallel_for(0, ranges * conv.over_filters, 1, [&](int64_t first, int64_t last) {
      // What is fetched ahead of the last pixels lies behind them.
      std::vector<const In*> rows(conv.positions() * kRange + Kernel::kPixels);
      // Filters that do not fill their panels are added up aside.
      std::vector<float> aside(ends_inside() ? kRange * conv.panels * kPanel : 0);
      std::vector<float> constants(2 * conv.panels * kPanel);
      int64_t known = -1;
      for (int64_t task = first; task < last; ++task) {
        const int64_t range = task / conv.over_filters;
        if (range != known) find_rows(range, rows.data());
        known = range;
        add_filters(range, task % conv.over_filters, rows.data(), aside.data(), constants.data());
      }
    });
  }

 private:
  const BlockConvolution& conv;
  const In* input;
  int64_t row, cin;
  const In* padded;
  const Weight* weights;
  const int32_t *places, *starts;
  Constants of_filters;
  bool relu;
  float* output;
  int64_t range_size;

  bool ends_inside() const { return conv.cout % kPanel != 0 || conv.num_out % conv.cout != 0; }
  int64_t range_end(int64_t range) const { return std::min(conv.pixels(), (range + 1) * range_size); }

  void find_rows(int64_t range, const In** rows) const {
    const int64_t begin = range * range_size;
    int64_t ox = begin % conv.out_w, oy = begin / conv.out_w % conv.out_h, n = begin / (conv.out_w * conv.out_h);
    for (int64_t p = 0; p < range_end(range) - begin; ++p) {
      const int64_t y = oy * conv.stride_h - conv.top, x = ox * conv.stride_w - conv.left;
      const In** to = rows + p;
      for (int64_t i = 0, yi = y; i < conv.kernel_h; ++i, yi += conv.dilation_h) {
        const bool inside = yi >= 0 && yi < conv.height;
        const In* const line = inside ? input + (n * conv.height + yi) * conv.width * row : padded;
        for (int64_t j = 0, xj = x; j < conv.kernel_w; ++j, xj += conv.dilation_w, to += kRange)
          *to = inside && xj >= 0 && xj < conv.width ? line + xj * row : padded;
      }
      if (++ox == conv.out_w) ox = 0, ++oy;
      if (oy == conv.out_h) oy = 0, ++n;
    }
  }

  void add_filters(int64_t range, int64_t g, const In* const* rows, float* aside, float* constants) const {
    const int64_t begin = range * range_size, pixels = range_end(range) - begin, width = conv.panels * kPanel;
    const int64_t filters = std::min(conv.cout, conv.num_out - g * conv.cout);
    const bool direct = filters == width;
    float *factors = constants, *biases = constants + width;
    for (int64_t o = 0; o < width; ++o) {
      factors[o] = of_filters.factor != nullptr && o < filters ? of_filters.factor[g * conv.cout + o] : 0.0f;
      biases[o] = of_filters.bias != nullptr && o < filters ? of_filters.bias[g * conv.cout + o] : 0.0f;
    }
    const int64_t panel_step = cin * kPanel, block_step = conv.panels * panel_step;
    float* const to = output + begin * conv.num_out + g * conv.cout;
    Tile<In, Weight> tile{};
    tile.row_step = kRange, tile.block_step = block_step, tile.panel_step = panel_step;
    tile.cin = cin, tile.row = row, tile.relu = relu;
    tile.sum_step = direct ? conv.num_out : width;
    const int64_t part = std::max<int64_t>(
        1, kPart / (panel_step * std::min<int64_t>(Kernel::kPanels, conv.panels) * static_cast<int64_t>(sizeof(Weight))));
    for (int64_t b = starts[g]; b < starts[g + 1] || b == starts[g]; b += part) {
      tile.count = std::min<int64_t>(part, starts[g + 1] - b);
      tile.places = places + 2 * b;
      tile.first = b == starts[g], tile.last = b + part >= starts[g + 1];
      for (int64_t panel = 0; panel < conv.panels; panel += Kernel::kPanels) {
        tile.weights = weights + b * block_step + panel * panel_step;
        tile.factor = factors + panel * kPanel, tile.bias = biases + panel * kPanel;
        tile.start = of_filters.start == nullptr ? nullptr : of_filters.start + g * width + panel * kPanel;
        tile.sums = (direct ? to : aside) + panel * kPanel;
        add_pixels(tile, rows, pixels, std::min(Kernel::kPanels, conv.panels - panel));
      }
      if (starts[g] == starts[g + 1]) break;
    }
    if (!direct)
      for (int64_t p = 0; p < pixels; ++p) std::copy_n(aside + p * width, filters, to + p * conv.num_out);
  }

  // Tiles of pixels differ by one at most: a last one of few would wait for its sums.
  void add_pixels(Tile<In, Weight> tile, const In* const* rows, int64_t pixels, int64_t panels) const {
    const int64_t tiles = (pixels + Kernel::kPixels - 1) / Kernel::kPixels, size = pixels / tiles;
    const int64_t larger = pixels % tiles;
    float* const sums = tile.sums;
    for (int64_t t = 0, at = 0; t < tiles; ++t) {
      const int64_t count = size + (t < larger);
      tile.rows = rows + at;
      tile.sums = sums + at * tile.sum_step;
      kTable[panels - 1][count - 1](tile);
      at += count;
    }
  }

  using Run = void (*)(const Tile<In, Weight>&);

  template <int64_t Panels, int64_t... Pixels>
  static constexpr std::array<Run, Kernel::kPixels> table_of(std::integer_sequence<int64_t, Pixels...>) {
    return {&Kernel::template run<Pixels + 1, Panels>...};
  }
  template <int64_t... Panels>
  static constexpr std::array<std::array<Run, Kernel::kPixels>, Kernel::kPanels> tables(
      std::integer_sequence<int64_t, Panels...>) {
    return {table_of<Panels + 1>(std::make_integer_sequence<int64_t, Kernel::kPixels>())...};
  }
  static constexpr auto kTable = tables(std::make_integer_sequence<int64_t, Kernel::kPanels>());
};

}  // namespace fxslim
