// The pixel kernels over tiles (amx_tiles.h).
//
// A step multiplies up to 16 pairs: 16 pixels with as many pairs of channels are one factor, packed weights of these
// pairs and 16 filters the other. A tile of a convolution is 32 pixels times 32 filters: four tiles of sums, two of
// pixels, two of weights. So four loads of 8 cycles serve four products of 16, and weights come from L2 at 32 bytes a
// cycle. 16 pixels would need three loads for two products, and 64 bytes a cycle.
//
// Sizes of tiles stay the same during a task, since to configure takes some 200 cycles and clears the sums. So all
// steps of a task have the same number of pairs, which divides the length of every run of pairs, and pixels are padded
// with zeros where that saves steps. Sums of pixels or filters that are not wanted are computed and left.
//
// A task leaves the tiles released: code that uses them configures them for itself, and oneDNN, which does so only if
// it finds another configuration than its own, looks.
//
// A weight gradient multiplies 16 filters with pairs of pixels, which lie as they must once they are turned, by these
// pairs with 16 channels, or the other way round.
#pragma once

#include <cstdint>

#include "cpu/kernels/amx_tiles.h"
#include "cpu/kernels/pixel_kernels.h"

namespace prunekernels {

template <typename Tiles>  // all functions are its own: each file that has one compiles them for its instruction set
struct AmxPixels {
  static constexpr int kVector = 16;  // filters or channels of a tile
  // Of a result: vectors take no longer for these than tiles take to load, store and narrow sums.
  static constexpr int64_t kFewPairs = 4;

  static int64_t step_of(int64_t pairs) {
    int64_t step = kTileRows;
    while (pairs % step) --step;
    return step;
  }

  static int64_t padded(int64_t pairs, int64_t times) {
    int64_t best = pairs, fewest = pairs * times / step_of(pairs * times);
    const int64_t least = (pairs * times + kTileRows - 1) / kTileRows;
    for (int64_t more = pairs + 1; fewest > least && more < pairs + kTileRows; ++more) {
      const int64_t steps = more * times / step_of(more * times);
      if (steps < fewest) best = more, fewest = steps;
    }
    return best;
  }

  // Tiles 0 to 3: sums of the first rows and the first columns, of the first rows and the second columns, ...; 4 and 5:
  // first factors, 6 and 7: second factors.
  static void begin(int64_t step) {
    TileConfig config{};
    config.palette = 1;
    for (int t = 0; t < kTiles; ++t) {
      config.rows[t] = static_cast<uint8_t>(t < 6 ? kTileRows : step);
      config.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? 4 * step : kTileBytes);
    }
    Tiles::configure(config);
  }

  template <int kRows, int kColumns>
  static void load_sums(const float* from, int64_t stride) {
    Tiles::template load<0>(from, stride);
    if constexpr (kColumns > 1) Tiles::template load<1>(from + kVector, stride);
    if constexpr (kRows > 1) {
      from += kTileRows * stride / static_cast<int64_t>(sizeof(float));
      Tiles::template load<2>(from, stride);
      if constexpr (kColumns > 1) Tiles::template load<3>(from + kVector, stride);
    }
  }

  template <int kRows, int kColumns>
  static void store_sums(float* to, int64_t stride) {
    Tiles::template store<0>(to, stride);
    if constexpr (kColumns > 1) Tiles::template store<1>(to + kVector, stride);
    if constexpr (kRows > 1) {
      to += kTileRows * stride / static_cast<int64_t>(sizeof(float));
      Tiles::template store<2>(to, stride);
      if constexpr (kColumns > 1) Tiles::template store<3>(to + kVector, stride);
    }
  }

  // a: kRows * 16 rows of pairs; b: [pairs][kColumns * kVector] words
  template <int kRows, int kColumns>
  static void step(const char* a, int64_t a_row, const char* b, int64_t b_row) {
    Tiles::template load<4>(a, a_row);
    Tiles::template load<6>(b, b_row);
    Tiles::template dot<0, 4, 6>();
    if constexpr (kColumns > 1) {
      Tiles::template load<7>(b + kTileBytes, b_row);
      Tiles::template dot<1, 4, 7>();
    }
    if constexpr (kRows > 1) {
      Tiles::template load<5>(a + kTileRows * a_row, a_row);
      Tiles::template dot<2, 5, 6>();
      if constexpr (kColumns > 1) Tiles::template dot<3, 5, 7>();
    }
  }

  // kRows times 16 pixels, of which t.pixels are wanted; kColumns times 16 filters.
  template <int kRows, int kColumns>
  static void conv(const PixelTile& t) {
    if (t.tap_count * t.pairs <= kFewPairs) return conv_of_few_pairs<kColumns>(t);
    constexpr int64_t kWeightsRow = kPixelBlock * sizeof(uint32_t);
    const int64_t x_pixel = t.x_pixel * static_cast<int64_t>(sizeof(uint16_t)), pairs = t.pairs, step_pairs = t.step;
    const int64_t tap_count = t.tap_count;
    const uint32_t lanes = t.lanes;
    const int32_t* const taps = t.taps;
    const uint16_t* const pixels = t.x;
    const char* weights = reinterpret_cast<const char*>(t.weights);
    load_sums<kRows, kColumns>(t.start, 0);
    for (int64_t tap = 0; tap < tap_count; ++tap) {
      const char* x = reinterpret_cast<const char*>(pixels + taps[tap]);
      for (int64_t j = 0; j < pairs; j += step_pairs) {
        step<kRows, kColumns>(x, x_pixel, weights, kWeightsRow);
        x += step_pairs * sizeof(uint32_t), weights += step_pairs * kWeightsRow;
      }
    }
    alignas(64) float sums[kRows * kTileRows][kColumns * kVector];
    store_sums<kRows, kColumns>(sums[0], sizeof(sums[0]));
    for (int64_t p = 0; p < t.pixels; ++p) Tiles::template narrow<kColumns>(sums[p], lanes, t.y + p * t.y_pixel);
  }

  template <int kColumns>
  static void conv_of_few_pairs(const PixelTile& t) {
    const PixelKernels& vectors = vector_pixel_kernels();
    const int64_t most = kColumns == 1 ? vectors.most_half_pixels : vectors.most_pixels;
    PixelTile part = t;
    for (int64_t p = 0; p < t.pixels; p += most) {
      part.pixels = t.pixels - p < most ? t.pixels - p : most;
      part.x = t.x + p * t.x_pixel, part.y = t.y + p * t.y_pixel;
      (kColumns == 1 ? vectors.conv_half : vectors.conv)[part.pixels](part);
    }
  }

  // kRows times 16 filters, kColumns times 16 channels.
  template <int kRows, int kColumns>
  static void dots(const PixelDots& d) {
    constexpr int64_t kWord = sizeof(uint32_t), kTurnedRow = kPixelBlock * kWord;
    const int64_t rows = d.rows, pairs = d.pairs, step_pairs = d.step;
    const int64_t x_row = d.x_row * kWord, x_pair = d.x_pair * kWord, g_pair = d.g_pair * kWord;
    const char *g = reinterpret_cast<const char*>(d.g), *first = reinterpret_cast<const char*>(d.x);
    float* const out = d.out;
    const int64_t out_filter = d.out_filter * static_cast<int64_t>(sizeof(float));
    load_sums<kRows, kColumns>(out, out_filter);
    bool odd = false;
    for (int64_t row = 0; row < rows; ++row, first += x_row) {
      const char* x = first;
      for (int64_t j = 0; j < pairs; j += step_pairs, x += step_pairs * x_pair, odd = !odd) {
        step<kRows, kColumns>(g, kTurnedRow, x, x_pair);
        g += odd ? g_pair - kTileBytes : kTileBytes;
      }
    }
    store_sums<kRows, kColumns>(out, out_filter);
  }

  static PixelKernels table() {
    PixelKernels kernels = vector_pixel_kernels();
    kernels.most_pixels = kernels.most_half_pixels = kMostPixels, kernels.most_filters = kMostPixelFilters;
    for (int64_t pixels = 1; pixels <= kMostPixels; ++pixels) {
      kernels.conv[pixels] = pixels <= kTileRows ? conv<1, 2> : conv<2, 2>;
      kernels.conv_half[pixels] = pixels <= kTileRows ? conv<1, 1> : conv<2, 1>;
    }
    for (int64_t filters = 1; filters <= kMostPixelFilters; ++filters) {
      kernels.dots[filters] = filters <= kTileRows ? dots<1, 2> : dots<2, 2>;
      kernels.dots_half[filters] = filters <= kTileRows ? dots<1, 1> : dots<2, 1>;
    }
    kernels.step = step_of, kernels.padded = padded, kernels.begin = begin, kernels.end = Tiles::release;
    return kernels;
  }
};

}  // namespace prunekernels
