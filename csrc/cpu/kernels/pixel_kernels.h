// The inner loops of the direct plan on pixels: NHWC, bfloat16, sums in float. A number of 32 bits holds two bfloat16
// that are multiplied and added together: two channels of a pixel, or the same channel of two pixels.
#pragma once

#include <cstdint>

namespace prunekernels {

constexpr int kMostPixels = 16;        // of a tile of a convolution,
constexpr int kMostHalfPixels = 28;    // and of one of half of the filters
constexpr int kMostPixelFilters = 16;  // of a tile of a weight gradient
constexpr int kPixelBlock = 32;        // filters of a tile of a convolution, channels of a tile of a weight gradient

// One call of a convolution: a tile of a few pixels p and up to kPixelBlock filters i.
//   y[p][i] = start[i] + sum over taps t and pairs j of channels of weights[t][j][i] . x[taps[t] + p * x_pixel + 2 j]
// Distances are in elements. All kPixelBlock results of a pixel are written. What lies in x where kMostPixels pixels
// would be may be read.
struct PixelTile {
  const uint16_t* x;
  int64_t x_pixel;
  const int32_t* taps;
  int64_t tap_count, pairs;
  const uint32_t* weights;
  const float* start;  // [kPixelBlock]
  uint16_t* y;
  int64_t y_pixel;
};

// One call of a weight gradient: a few filters f and kPixelBlock channels c, or the other way round.
//   out[f][c] += sum over rows and pairs j of pixels of g[row, j, f] . x[row, j, c]
struct PixelDots {
  const uint32_t *g, *x;
  int64_t rows, pairs;
  int64_t g_row, g_pair, x_row, x_pair;
  float* out;
  int64_t out_filter;
};

struct PixelKernels {
  using Conv = void (*)(const PixelTile&);
  using Dots = void (*)(const PixelDots&);

  int64_t most_pixels, most_half_pixels, most_filters;  // of the tiles there are
  Conv conv[kMostPixels + 1];                           // [pixels]
  Conv conv_half[kMostHalfPixels + 1];                  // the same of the first half of the filters
  Dots dots[kMostPixelFilters + 1];                     // [filters]
  Dots dots_half[kMostPixelFilters + 1];                // the same of kPixelBlock / 2 channels

  // Of pixels that lie from_pixel apart: the channels whose bits are set, close together, and zeros behind them up to
  // to_pixel.
  void (*gather)(const uint16_t* from, int64_t from_pixel, int64_t channels, const uint64_t* bits, int64_t live,
                 uint16_t* to, int64_t to_pixel, int64_t pixels);
  // Back to their places; zeros elsewhere. May read kPixelBlock - 1 elements behind the last pixel.
  void (*scatter)(const uint16_t* from, int64_t from_pixel, const uint64_t* bits, uint16_t* to, int64_t channels,
                  int64_t pixels);
  // to[j * kPixelBlock + i] = pair j of row i, of kPixelBlock / 2 rows
  void (*lanes)(const uint16_t* rows, int64_t row, int64_t pairs, uint32_t* to);
  // to[j * count + i] = element i of pixels 2 j and 2 j + 1; 0 for one that is missing. May read kPixelBlock elements
  // from each pixel.
  void (*interleave)(const uint16_t* from, int64_t from_pixel, int64_t pixels, int64_t count, uint32_t* to);
  // to[i] = from[i] * scale, rounded to nearest even
  void (*narrow)(const float* from, float scale, int64_t count, uint16_t* to);
};

const PixelKernels& pixel_kernels();  // the best the instruction set in force allows
bool has_pixel_kernels();             // whether those are faster than the scalar ones

}  // namespace prunekernels
