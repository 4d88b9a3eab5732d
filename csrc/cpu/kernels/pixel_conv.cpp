#include "cpu/kernels/pixel_conv.h"

#include <algorithm>
#include <cstring>

namespace prunekernels {
namespace {

constexpr int64_t kGatheredBytes = 192 << 10;  // of a task: half of a small L2
constexpr int64_t kResultBytes = 16 << 10;     // that are scattered at a time: less than an L1
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kFlatTiles = 16;  // of a task where pixels have no neighbours
constexpr int64_t kHalf = kPixelBlock / 2;

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace

PixelConv::PixelConv(Direction direction, const ConvShape& s, const ChannelList& filters, const ChannelList& channels,
                     int64_t threads)
    : kernels_(pixel_kernels()),
      forward_(direction == kForward),
      in_(forward_ ? channels : filters),
      out_(forward_ ? filters : channels),
      rows_(s, 0, forward_),
      columns_(s, 1, forward_),
      images_(s.N),
      pairs_((in_.live + 1) / 2),
      pixel_(2 * pairs_),
      blocks_(blocks_of(out_.live, kPixelBlock)) {
  const bool flat = flatten(s, rows_, columns_, images_);
  block_columns_ = flat ? std::min(columns_.result, kFlatTiles * kernels_.most_pixels) : columns_.steps();
  column_blocks_ = blocks_of(columns_.steps(), block_columns_);
  pitch_ = columns_.reach(block_columns_) * pixel_;
  block_rows_ = rows_.steps();
  const auto too_much = [&] {
    const bool few = images_ * blocks_of(rows_.steps(), block_rows_) * column_blocks_ < kTasksPerThread * threads;
    return few || gathered_elements() * static_cast<int64_t>(sizeof(uint16_t)) > kGatheredBytes;
  };
  while (block_rows_ > 1 && too_much()) block_rows_ = (block_rows_ + 1) / 2;
  row_blocks_ = blocks_of(rows_.steps(), block_rows_);
  writes_in_place_ = out_.live == out_.channels && out_.live % kHalf == 0;
  scatters_ = 1;
  while (scatters_ < blocks_of(block_columns_, kernels_.most_pixels) &&
         2 * result_elements() * static_cast<int64_t>(sizeof(uint16_t)) <= kResultBytes)
    scatters_ *= 2;

  for (const PixelAxis::Phase& row_phase : rows_.phases)
    for (const PixelAxis::Phase& column_phase : columns_.phases) {
      const std::vector<PixelAxis::Tap>& columns = column_phase.taps;
      const int64_t taps = static_cast<int64_t>(columns.size()), run = columns_.spacing == 1 ? taps : 1;
      Part part{static_cast<int64_t>(order_.size()), static_cast<int64_t>(runs_.size()), 0, run * pairs_};
      for (const PixelAxis::Tap& row : row_phase.taps)
        for (int64_t i = 0; i < taps; ++i) {
          order_.push_back(row.index * s.S + columns[i].index);
          if (i % run) continue;
          const int64_t at = (row.offset - rows_.low) * pitch_ + (columns[i].offset - columns_.low) * pixel_;
          runs_.push_back(static_cast<int32_t>(at));
          ++part.runs;
        }
      parts_.push_back(part);
    }
}

// With what a tile may read behind its pixels.
int64_t PixelConv::gathered_elements() const {
  return rows_.reach(block_rows_) * pitch_ + kMostPixels * columns_.stride * pixel_;
}

int64_t PixelConv::pack_scratch() const {
  return forward_ ? (kHalf + 1) * (pixel_ + kPixelBlock) : 2 * (blocks_ + 1) * kPixelBlock;
}

// Rows of the weight are filters, and channels lie side by side in them. Forward, a result is a row: its channels are
// gathered, and their pairs go to the result's lane; a piece is a block of results. Backward, an operand is a row: the
// channels of two rows, which are results, are gathered and interleaved; a piece is such a pair.
void PixelConv::pack_weights(const uint16_t* weight, uint32_t* packed, int64_t begin, int64_t end,
                             uint16_t* scratch) const {
  const int64_t channels = forward_ ? in_.channels : out_.channels, taps = static_cast<int64_t>(order_.size());
  const auto row = [&](int32_t filter, int64_t tap) { return weight + (filter * taps + order_[tap]) * channels; };
  if (forward_) {
    for (int64_t half = 2 * begin; half < 2 * end; ++half) {
      const int64_t first = half * kHalf, count = std::clamp<int64_t>(out_.live - first, 0, kHalf);
      uint32_t* const to = packed + half / 2 * block_words() + half % 2 * kHalf;
      if (count < kHalf) std::memset(scratch, 0, kHalf * pixel_ * sizeof(*scratch));
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t i = 0; i < count; ++i)
          kernels_.gather(row(out_.index[first + i], tap), channels, channels, in_.bits, in_.live, scratch + i * pixel_,
                          pixel_, 1);
        kernels_.lanes(scratch, pixel_, pairs_, to + tap * pairs_ * kPixelBlock);
      }
    }
    return;
  }
  const int64_t wide = blocks_ * kPixelBlock;
  for (int64_t j = begin; j < end; ++j)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const bool whole = 2 * j + 1 < in_.live;
      const auto gather = [&](int32_t filter, uint16_t* to) {
        kernels_.gather(row(filter, tap), channels, channels, out_.bits, out_.live, to, wide, 1);
      };
      gather(in_.index[2 * j], scratch);
      if (whole) gather(in_.index[2 * j + 1], scratch + wide);
      for (int64_t block = 0; block < blocks_; ++block)
        kernels_.interleave(scratch + block * kPixelBlock, wide, whole ? 2 : 1, kPixelBlock,
                            packed + block * block_words() + (tap * pairs_ + j) * kPixelBlock);
    }
}

void PixelConv::run(const uint16_t* operand, const uint32_t* weights, const float* start, uint16_t* result,
                    int64_t task, uint16_t* scratch) const {
  const int64_t image = task / (row_blocks_ * column_blocks_);
  const int64_t first_row = task / column_blocks_ % row_blocks_ * block_rows_;
  const int64_t first_column = task % column_blocks_ * block_columns_;
  const int64_t rows = std::min(block_rows_, rows_.steps() - first_row);
  const int64_t columns = std::min(block_columns_, columns_.steps() - first_column);
  uint16_t* to = scratch;
  for (int64_t r = 0; r < rows_.reach(rows); ++r, to += pitch_) {
    const int64_t row = (first_row * rows_.stride + rows_.low + r) * rows_.step - rows_.padding;
    const int64_t wide = columns_.reach(columns);
    if (row < 0 || row >= rows_.operand)
      std::memset(to, 0, wide * pixel_ * sizeof(*to));
    else
      columns_.gather(kernels_, in_, operand + (image * rows_.operand + row) * columns_.operand * in_.channels,
                      first_column * columns_.stride + columns_.low, wide, to, pixel_);
  }
  Operands operands{scratch, weights, start, scratch + gathered_elements()};
  for (int64_t row = 0; row < rows; ++row, operands.gathered += rows_.stride * pitch_)
    for (int64_t phase = 0; phase < rows_.phase_count(); ++phase) {
      const int64_t at = (first_row + row) * rows_.phase_count() + phase;
      if (at < rows_.result)
        run_row(operands, phase, first_column, columns,
                result + (image * rows_.result + at) * columns_.result * out_.channels);
    }
}

// Of a row of results, which starts at `to`: the results first..first + count of every phase of columns.
void PixelConv::run_row(const Operands& operands, int64_t row_phase, int64_t first, int64_t count, uint16_t* to) const {
  const int64_t channels = out_.channels, width = blocks_ * kPixelBlock, phases = columns_.phase_count();
  const int64_t tiles = blocks_of(count, kernels_.most_pixels);
  if (rows_.phases[row_phase].taps.empty()) {
    const int64_t last = std::min(columns_.result, (first + count) * phases);
    std::memset(to + first * phases * channels, 0, (last - first * phases) * channels * sizeof(*to));
    return;
  }
  PixelTile tile{};
  tile.x_pixel = columns_.stride * pixel_;
  const int64_t pixel = writes_in_place_ ? channels : width;
  tile.y_pixel = phases * pixel;
  const int64_t size = count / tiles, larger = count % tiles;
  for (int64_t t = 0, begin = 0, done = 0; t < tiles; ++t) {
    const int64_t end = begin + size + (t < larger);
    uint16_t* const results = writes_in_place_ ? to + (first + begin) * phases * channels
                                               : operands.results + (begin - done) * phases * width;
    for (int64_t phase = 0; phase < phases; ++phase) {
      const int64_t pixels = std::min(columns_.phases[phase].results - first, end) - begin;
      if (pixels <= 0) continue;
      const Part& part = parts_[row_phase * phases + phase];
      tile.x = operands.gathered + begin * columns_.stride * pixel_;
      tile.taps = runs_.data() + part.first_run, tile.tap_count = part.runs, tile.pairs = part.pairs;
      for (int64_t block = 0; block < blocks_; ++block) {
        const bool half = out_.live - block * kPixelBlock <= kHalf;
        tile.weights = operands.weights + block * block_words() + part.first_tap * pairs_ * kPixelBlock;
        tile.start = operands.start + block * kPixelBlock;
        tile.y = results + phase * pixel + block * kPixelBlock;
        (half ? kernels_.conv_half : kernels_.conv)[pixels](tile);
      }
    }
    begin = end;
    if (writes_in_place_ || ((t + 1) % scatters_ && t + 1 < tiles)) continue;
    const int64_t column = (first + done) * phases;
    kernels_.scatter(operands.results, width, out_.bits, to + column * channels, channels,
                     std::min(columns_.result - column, (end - done) * phases));
    done = end;
  }
}

}  // namespace prunekernels
