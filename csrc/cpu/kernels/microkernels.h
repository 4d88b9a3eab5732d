// The inner loops of the direct and sparse plans. For one filter, a convolution over planes (channel after channel,
// each a run of floats) is a list of steps. A step is a weight and the distance from an output's position to the
// operand which that weight multiplies. The steps of a dead kernel are not in the list, so it costs nothing.
#pragma once

#include <cstdint>

namespace prunekernels {

// The largest tiles of any instruction set.
constexpr int kMaxFilters = 8;   // filters that share a list of steps
constexpr int kMaxVectors = 16;  // vectors of output positions
constexpr int kMaxRows = 4;      // rows of output positions (conv_rows, window)
constexpr int kMaxWindowVectors = 8;
constexpr int kMaxDotFilters = 4;
constexpr int kMaxDotXs = 6;
constexpr int kMaxLanes = 16;

// One call of a convolution: a tile of `vectors` vectors of outputs (positions p) for each of a few filters i.
//   y[i][p] = start[i] + sum over channels c and taps t of weights[c, t, i] * x[channels[c] + taps[t] + p]
struct ConvTile {
  const float* x;
  int64_t x_row, y_row;            // floats from one row of the tile to the next (conv_rows, window)
  int64_t x_phase, y_class;        // window2: from one phase of x to the next; window_turned: from one class of y
  bool adds;                       // to what y holds, instead of start (conv_rows, window)
  const int32_t *channels, *taps;  // offsets in floats
  int64_t channel_count, tap_count;
  const float* weights;
  const float* start;  // null: 0
  float* const* y;
  int last;  // lanes of the last vector that are read and written
};

// One call of a weight gradient: the dot products of a few output gradients f with a few operands j (`xs` of them).
//   out[f * xs + j] += sum over planes n, rows r and positions p of g[f][n, r, p] * x[j][n, r, p]
struct DotTile {
  const float* const* g;
  const float* const* x;
  int64_t planes, g_plane, x_plane;
  int64_t rows, g_row, x_row, x_phase;
  int64_t vectors;  // of positions
  int last;         // lanes of the last vector that are read
  float* out;
  // dot_window: several calls in a row may share sums, which the first begins, all but the last leave in carry [9]
  // [lanes] and the last adds to out.
  float* carry;
  bool begins, ends;
};

// Where the lanes of a vector read or write, pixel after pixel: lane n has pixels begin[n]..end[n] of those from at[n]
// on.
struct LaneRuns {
  int64_t at[kMaxLanes];
  int32_t begin[kMaxLanes], end[kMaxLanes];
  int32_t any_begin, any_end, all_begin, all_end;  // pixels that some lane has, and those that each has
};

struct Microkernels {
  using Conv = void (*)(const ConvTile&);
  using Dot = void (*)(const DotTile&);

  int lanes;
  int most_filters;
  int conv_vectors[kMaxFilters + 1];                 // [filters]: the most vectors of a tile
  Conv conv[kMaxFilters + 1][kMaxVectors + 1];       // [filters][vectors]
  Conv conv_part[kMaxFilters + 1][kMaxVectors + 1];  // the same; the last vector has ConvTile::last lanes only
  // Of one filter, [rows][vectors of a row]: the rows of the tile share what they read.
  int rows_vectors, most_row_vectors;  // the most vectors of a tile, and of a row of it
  Conv conv_rows[kMaxRows + 1][kMaxVectors + 1];
  // The same for a 3x3 kernel at stride 1, and its dot products (microkernels_window.h); null where the registers do
  // not suffice. _whole: the tile is the whole plane. dot_window: of `down` times `across` tiles from g and x on; out
  // is [9].
  using DotWindow = void (*)(const DotTile&, const float* g, const float* x, int64_t down, int64_t across, float* out);
  // window2 and dot_window2: at stride 2. window_turned: the input gradient at stride 2 and padding 1; a tile has the
  // [rows][vectors] of the output's gradient and four times as many results.
  Conv window[kMaxRows + 1][kMaxWindowVectors + 1], window_whole[kMaxRows + 1][kMaxRows + 1];
  Conv window2[kMaxRows + 1][kMaxWindowVectors + 1], window_turned[kMaxRows + 1][kMaxWindowVectors + 1];
  DotWindow dot_window[kMaxRows + 1][kMaxWindowVectors + 1], dot_window_whole[kMaxRows + 1][kMaxRows + 1];
  DotWindow dot_window2[kMaxRows + 1][kMaxWindowVectors + 1];
  int dot_filters, dot_xs;
  Dot dot[kMaxDotFilters + 1][kMaxDotXs + 1];  // [filters][xs]
  // Every x stands for three operands, x and its two neighbours to the right: one float apart (dot3), or one vector
  // apart, where a vector holds one pixel of several images (dot3_images). out is [filters][xs][3].
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
  // One vector a pixel: to[cells[p]][n] = from[runs.at[n] + p], 0 where lane n lacks pixel p; of pixels that some lane
  // has. The next call will read from + ahead: the hardware does not foresee so many lanes.
  void (*images_to_lanes)(const float* from, const LaneRuns& runs, const int32_t* cells, float* to, int64_t ahead);
  // to[runs.at[n] + p] = from[cells[p]][n]. The next call will write to + ahead.
  void (*lanes_to_images)(const float* from, const int32_t* cells, float* to, const LaneRuns& runs, int64_t ahead);
};

const Microkernels& microkernels();  // the best the instruction set in force allows

}  // namespace prunekernels
