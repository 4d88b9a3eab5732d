#include "cpu/kernels/pixel_conv.h"

#include <algorithm>
#include <cstring>

namespace prunekernels {
namespace {

constexpr int64_t kGatheredBytes = 192 << 10;  // of a task: half of a small L2
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kFlatTiles = 16;  // of a task where pixels have no neighbours
constexpr int64_t kHalf = kPixelBlock / 2;

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace

bool PixelConv::serves(Direction direction, const ConvShape& s) {
  if (s.G != 1) return false;
  if (direction == kForward) return true;
  for (int i = 0; i < 2; ++i)
    if (s.stride[i] != 1 || (i ? s.S - 1 : s.R - 1) * s.dilation[i] < s.padding[i]) return false;
  return true;
}

PixelConv::PixelConv(Direction direction, const ConvShape& s, const ChannelList& filters, const ChannelList& channels,
                     int64_t threads)
    : kernels_(pixel_kernels()),
      forward_(direction == kForward),
      in_(forward_ ? channels : filters),
      out_(forward_ ? filters : channels),
      images_(s.N),
      taps_(s.taps()),
      pairs_((in_.live + 1) / 2),
      pixel_(2 * pairs_),
      blocks_(blocks_of(out_.live, kPixelBlock)) {
  rows_ = {s.H, s.P, s.R, s.stride[0], s.padding[0], s.dilation[0]};
  columns_ = {s.W, s.Q, s.S, s.stride[1], s.padding[1], s.dilation[1]};
  for (Axis* axis : {&rows_, &columns_})
    if (!forward_) {
      std::swap(axis->operand, axis->result);
      axis->padding = (axis->taps - 1) * axis->dilation - axis->padding;
    }
  const bool alone = taps_ == 1 && rows_.stride == 1 && columns_.stride == 1 && !rows_.padding && !columns_.padding;
  if (alone) {  // all pixels in one row
    columns_.operand = columns_.result = images_ * rows_.result * columns_.result;
    rows_.operand = rows_.result = images_ = 1;
  }
  block_columns_ = alone ? std::min(columns_.result, kFlatTiles * kernels_.most_pixels) : columns_.result;
  column_blocks_ = blocks_of(columns_.result, block_columns_);
  block_rows_ = rows_.result;
  const auto too_much = [&] {
    const bool few = images_ * blocks_of(rows_.result, block_rows_) * column_blocks_ < kTasksPerThread * threads;
    return few || gathered_elements() * static_cast<int64_t>(sizeof(uint16_t)) > kGatheredBytes;
  };
  while (block_rows_ > 1 && too_much()) block_rows_ = (block_rows_ + 1) / 2;
  row_blocks_ = blocks_of(rows_.result, block_rows_);
  writes_in_place_ = out_.live == out_.channels && out_.live % kPixelBlock == 0;
}

int64_t PixelConv::pack_scratch() const {
  return forward_ ? (kHalf + 1) * (pixel_ + kPixelBlock) : 2 * (blocks_ + 1) * kPixelBlock;
}

// Rows of the weight are filters, and channels lie side by side in them. Forward, a result is a row: its channels are
// gathered, and their pairs go to the result's lane; a piece is a block of results. Backward, an operand is a row: the
// channels of two rows, which are results, are gathered and interleaved; a piece is such a pair.
void PixelConv::pack_weights(const uint16_t* weight, uint32_t* packed, int64_t begin, int64_t end,
                             uint16_t* scratch) const {
  const int64_t channels = forward_ ? in_.channels : out_.channels, block_words = taps_ * pairs_ * kPixelBlock;
  const auto row = [&](int32_t filter, int64_t tap) { return weight + (filter * taps_ + tap) * channels; };
  if (forward_) {
    for (int64_t half = 2 * begin; half < 2 * end; ++half) {
      const int64_t first = half * kHalf, count = std::clamp<int64_t>(out_.live - first, 0, kHalf);
      uint32_t* const to = packed + half / 2 * block_words + half % 2 * kHalf;
      if (count < kHalf) std::memset(scratch, 0, kHalf * pixel_ * sizeof(*scratch));
      for (int64_t tap = 0; tap < taps_; ++tap) {
        for (int64_t i = 0; i < count; ++i)
          kernels_.gather(row(out_.index[first + i], tap), channels, in_.bits, in_.live, scratch + i * pixel_, pixel_,
                          1);
        kernels_.lanes(scratch, pixel_, pairs_, to + tap * pairs_ * kPixelBlock);
      }
    }
    return;
  }
  const int64_t wide = blocks_ * kPixelBlock;
  uint16_t* const other = scratch + wide;
  for (int64_t j = begin; j < end; ++j)
    for (int64_t tap = 0; tap < taps_; ++tap) {
      const bool whole = 2 * j + 1 < in_.live;
      const int64_t from = taps_ - 1 - tap;
      kernels_.gather(row(in_.index[2 * j], from), channels, out_.bits, out_.live, scratch, wide, 1);
      if (whole) kernels_.gather(row(in_.index[2 * j + 1], from), channels, out_.bits, out_.live, other, wide, 1);
      for (int64_t block = 0; block < blocks_; ++block)
        kernels_.interleave(scratch + block * kPixelBlock, whole ? other + block * kPixelBlock : nullptr, kPixelBlock,
                            packed + block * block_words + (tap * pairs_ + j) * kPixelBlock);
    }
}

// Rows row..row + rows of the padded image, from column on.
void PixelConv::gather(const uint16_t* image, int64_t row, int64_t rows, int64_t column, int64_t columns,
                       uint16_t* to) const {
  for (int64_t r = row; r < row + rows; ++r, to += columns * pixel_) {
    if (r < 0 || r >= rows_.operand) {
      std::memset(to, 0, columns * pixel_ * sizeof(*to));
      continue;
    }
    const int64_t first = std::clamp<int64_t>(-column, 0, columns);
    const int64_t last = std::clamp<int64_t>(columns_.operand - column, first, columns);
    std::memset(to, 0, first * pixel_ * sizeof(*to));
    kernels_.gather(image + (r * columns_.operand + column + first) * in_.channels, in_.channels, in_.bits, in_.live,
                    to + first * pixel_, pixel_, last - first);
    std::memset(to + last * pixel_, 0, (columns - last) * pixel_ * sizeof(*to));
  }
}

void PixelConv::run(const uint16_t* operand, const uint32_t* weights, const float* start, uint16_t* result,
                    int64_t task, uint16_t* scratch) const {
  const int64_t image = task / (row_blocks_ * column_blocks_);
  const int64_t first_row = task / column_blocks_ % row_blocks_ * block_rows_;
  const int64_t first_column = task % column_blocks_ * block_columns_;
  const int64_t rows = std::min(block_rows_, rows_.result - first_row);
  const int64_t columns = std::min(block_columns_, columns_.result - first_column);
  const int64_t wide = columns_.reach(columns), width = blocks_ * kPixelBlock;
  const int64_t channels = out_.channels, image_pixels = rows_.operand * columns_.operand;
  gather(operand + image * image_pixels * in_.channels, first_row * rows_.stride - rows_.padding, rows_.reach(rows),
         first_column * columns_.stride - columns_.padding, wide, scratch);
  uint16_t* const results = scratch + gathered_elements() + kMostPixels * columns_.stride * pixel_;
  std::vector<int32_t> taps;
  for (int64_t r = 0; r < rows_.taps; ++r)
    for (int64_t s = 0; s < columns_.taps; ++s)
      taps.push_back(static_cast<int32_t>((r * rows_.dilation * wide + s * columns_.dilation) * pixel_));
  const int64_t tiles = blocks_of(columns, kernels_.most_pixels);
  PixelTile tile{nullptr, columns_.stride * pixel_, taps.data(), taps_, pairs_, nullptr, nullptr, nullptr, 0};
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t column = columns * t / tiles, pixels = columns * (t + 1) / tiles - column;
      const int64_t at = (image * rows_.result + first_row + row) * columns_.result + first_column + column;
      uint16_t* const to = result + at * channels;
      tile.x = scratch + (row * rows_.stride * wide + column * columns_.stride) * pixel_;
      tile.y_pixel = writes_in_place_ ? channels : width;
      for (int64_t block = 0; block < blocks_; ++block) {
        const bool half = out_.live - block * kPixelBlock <= kHalf;
        tile.weights = weights + block * taps_ * pairs_ * kPixelBlock;
        tile.start = start + block * kPixelBlock;
        tile.y = (writes_in_place_ ? to : results) + block * kPixelBlock;
        (half ? kernels_.conv_half : kernels_.conv)[pixels](tile);
      }
      if (!writes_in_place_) kernels_.scatter(results, width, out_.bits, to, channels, pixels);
    }
}

}  // namespace prunekernels
