// The inner loops of the direct plan on pixels: NHWC, bfloat16, sums in float. A number of 32 bits holds two bfloat16
// that are multiplied and added together: two channels of a pixel, or the same channel of two pixels.
#pragma once

#include <cstdint>

namespace prunekernels {

constexpr int kMostPixels = 32;        // of a tile of a convolution,
constexpr int kMostHalfPixels = 32;    // and of one of half of the filters
constexpr int kMostPixelFilters = 32;  // of a tile of a weight gradient
constexpr int kPixelBlock = 32;        // filters of a tile of a convolution, channels of a tile of a weight gradient

// One call of a convolution: a tile of a few pixels p and up to kPixelBlock filters i.
//   y[p][i] = start[i] + sum over taps t and pairs j of channels of weights[t][j][i] . x[taps[t] + p * x_pixel + 2 j]
// Distances are in elements. All kPixelBlock results of a pixel are written, as zeros where `lanes` has no bit. What
// lies in x where as many pixels would be as the largest tile has may be read.
struct PixelTile {
  const uint16_t* x;
  int64_t x_pixel;
  const int32_t* taps;
  int64_t tap_count, pairs;
  const uint32_t* weights;
  const float* start;  // [kPixelBlock]
  uint32_t lanes;
  uint16_t* y;
  int64_t y_pixel;
  int64_t pixels, step;  // step: PixelSection's
};

// One call of a weight gradient: a few filters f and kPixelBlock channels c, or the other way round.
//   out[f][c] += sum over rows and pairs j of pixels of g[row, j, f] . x[row, j, c]
// Kernels that work in steps find the pairs of the t-th one, of all rows, for filter f side by side at
// g + t / 2 * g_pair + f * kPixelBlock + t % 2 * kPixelBlock / 2, and add to kPixelBlock / 2 or kPixelBlock filters.
struct PixelDots {
  const uint32_t *g, *x;
  int64_t rows, pairs;
  int64_t g_row, g_pair, x_row, x_pair;
  float* out;
  int64_t out_filter;
  int64_t step;  // as above
};

struct PixelKernels {
  using Conv = void (*)(const PixelTile&);
  using Dots = void (*)(const PixelDots&);

  int64_t most_pixels, most_half_pixels, most_filters;  // of the tiles there are
  Conv conv[kMostPixels + 1];                           // [pixels]
  Conv conv_half[kMostHalfPixels + 1];                  // the same of the first half of the filters
  Dots dots[kMostPixelFilters + 1];                     // [filters]
  Dots dots_half[kMostPixelFilters + 1];                // the same of kPixelBlock / 2 channels

  // Of kernels that work in steps of several pairs; null in others.
  int64_t (*step)(int64_t pairs);  // for runs whose lengths are multiples of `pairs`; divides it
  // How many pairs there should be, with zeros behind `pairs`, where runs are `times` as long.
  int64_t (*padded)(int64_t pairs, int64_t times);
  // What a thread does before and after calls, all of this step.
  void (*begin)(int64_t step);
  void (*end)();

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

// Around a thread's calls of conv or dots, whose runs of pairs have lengths that are multiples of `pairs`.
class PixelSection {
 public:
  PixelSection(const PixelKernels& kernels, int64_t pairs)
      : step(kernels.step ? kernels.step(pairs) : 0), kernels_(kernels) {
    if (step) kernels_.begin(step);
  }
  ~PixelSection() {
    if (step) kernels_.end();
  }
  PixelSection(const PixelSection&) = delete;

  const int64_t step;

 private:
  const PixelKernels& kernels_;
};

const PixelKernels& pixel_kernels();         // the best the instruction set in force allows
const PixelKernels& vector_pixel_kernels();  // of those that work on vectors, not on tiles
bool has_pixel_kernels();                    // whether those in force are faster than the scalar ones

}  // namespace prunekernels
