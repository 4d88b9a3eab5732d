// The inner loops of the direct and sparse plans. A convolution over planes (channel after channel, each a run of
// floats) is, for one filter, a list of steps: a weight, and how far from the output's position its operand lies.
// A kernel is then only a few steps that are not in the list, so a dead one costs nothing.
#pragma once

#include <cstdint>

namespace prunekernels {

constexpr int kMaxFilters = 8;   // that share a list of steps
constexpr int kMaxVectors = 16;  // of positions, in one tile
constexpr int kMaxRows = 4;      // of positions, in one tile of conv_rows or window
constexpr int kMaxWindowVectors = 8;
constexpr int kMaxDotFilters = 4;
constexpr int kMaxDotXs = 6;

// y[i][p] = start[i] + sum over channels c and taps t of weights[c, t, i] * x[channels[c] + taps[t] + p], for
// p = 0..vectors * lanes - 1
struct ConvTile {
  const float* x;
  int64_t x_row, y_row;            // conv_rows, window: between the rows of a tile
  const int32_t *channels, *taps;  // offsets
  int64_t channel_count, tap_count;
  const float* weights;
  const float* start;  // null: 0
  float* const* y;
  int last;  // lanes of the last vector that are read and written
};

// out[f * xs + j] += sum over planes n, rows r and positions p of g[f][n, r, p] * x[j][n, r, p]
struct DotTile {
  const float* const* g;
  const float* const* x;
  int64_t planes, g_plane, x_plane;
  int64_t rows, g_row, x_row;
  int64_t vectors;  // of positions
  int last;         // lanes of the last vector that are read
  float* out;
};

struct Microkernels {
  using Conv = void (*)(const ConvTile&);
  using Dot = void (*)(const DotTile&);

  int lanes;
  int most_filters;
  int conv_vectors[kMaxFilters + 1];                 // the largest tile of so many filters
  Conv conv[kMaxFilters + 1][kMaxVectors + 1];       // [filters][vectors]
  Conv conv_part[kMaxFilters + 1][kMaxVectors + 1];  // the same where the last vector is not whole
  // One filter, [rows][vectors]: several rows of positions share what they read.
  int rows_vectors, most_row_vectors;  // the largest tile, and its longest row
  Conv conv_rows[kMaxRows + 1][kMaxVectors + 1];
  // The same of a 3x3 kernel at stride 1 and its dot products (microkernels_window.h), null where registers do not
  // suffice; whole: of a plane that is one tile. dot_window: of `down` times `across` tiles from g and x on; out is
  // [9].
  using DotWindow = void (*)(const DotTile&, const float* g, const float* x, int64_t down, int64_t across, float* out);
  Conv window[kMaxRows + 1][kMaxWindowVectors + 1], window_whole[kMaxRows + 1][kMaxRows + 1];
  DotWindow dot_window[kMaxRows + 1][kMaxWindowVectors + 1], dot_window_whole[kMaxRows + 1][kMaxRows + 1];
  int dot_filters, dot_xs;
  Dot dot[kMaxDotFilters + 1][kMaxDotXs + 1];  // [filters][xs]
  // Here every x stands for three: x and the two positions behind it (dot3), or the two vectors (dot3_images). out is
  // [filters][xs][3].
  int dot3_filters, dot3_images_filters;
  Dot dot3[kMaxDotFilters + 1][4], dot3_images[kMaxDotFilters + 1][4];

  // to[j][t] = from[at[j] * stride + order[t]] for the kernels of a list, each of `kernel` floats
  void (*pack_list)(const float* from, int64_t stride, int64_t kernel, const int32_t* at, int64_t count,
                    const int32_t* order, int64_t taps, float* to);

  void (*copy)(const float* from, float* to, int64_t count);
  void (*zero)(float* to, int64_t count);
  // even[i] = from[2 i], odd[i] = from[2 i + 1]; reads exactly count floats
  void (*split)(const float* from, float* even, float* odd, int64_t count);
  // to[2 i] = even[i], to[2 i + 1] = odd[i]; writes exactly count floats
  void (*merge)(const float* even, const float* odd, float* to, int64_t count);
  // The same pixels of up to `lanes` images as vectors: to[cells[p]][n] = from[n * image + p], absent images 0
  void (*images_to_lanes)(const float* from, int64_t image, int images, int64_t pixels, const int32_t* cells,
                          float* to);
  // to[n * image + p] = from[cells[p]][n]
  void (*lanes_to_images)(const float* from, const int32_t* cells, int64_t pixels, float* to, int64_t image,
                          int images);
};

const Microkernels& microkernels();  // the best the instruction set in force allows

}  // namespace prunekernels
