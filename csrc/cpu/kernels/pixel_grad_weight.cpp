#include "cpu/kernels/pixel_grad_weight.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace prunekernels {
namespace {

constexpr int64_t kPackedBytes = 256 << 10;  // of a block
constexpr int64_t kFlatPixels = 512;         // of a block where pixels have no neighbours
constexpr int64_t kHalf = kPixelBlock / 2;
constexpr double kWorthwhile = 0.9;  // share of multiplications left from which on vectors hold filters

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace

PixelGradWeight::PixelGradWeight(const ConvShape& s, const ChannelList& filters, const ChannelList& channels)
    : kernels_(pixel_kernels()),
      filters_(filters),
      channels_(channels),
      rows_(s, 0, true),
      columns_(s, 1, true),
      images_(s.N),
      R_(s.R),
      runs_(columns_.spacing == 1 ? 1 : s.S),
      run_taps_(s.S / runs_),
      elements_(run_taps_ * channels.live) {
  const int64_t wide_x = blocks_of(elements_, kHalf) * kHalf, wide_g = blocks_of(filters.live, kHalf) * kHalf;
  vectors_of_filters_ = wide_g * elements_ < kWorthwhile * static_cast<double>(wide_x * filters.live);
  g_width_ = vectors_of_filters_ ? wide_g : filters.live, x_width_ = vectors_of_filters_ ? elements_ : wide_x;
  broadcast_ = vectors_of_filters_ ? elements_ : filters.live, width_ = vectors_of_filters_ ? wide_g : wide_x;
  const bool flat = flatten(s, rows_, columns_, images_);
  block_columns_ = flat ? std::min(columns_.result, kFlatPixels) : columns_.result;
  column_blocks_ = blocks_of(columns_.result, block_columns_);
  pairs_ = (block_columns_ + 1) / 2;
  g_row_ = pairs_ * g_width_, x_row_ = runs_ * pairs_ * x_width_;
  block_rows_ = rows_.result;
  while (block_rows_ > 1 && (x_row_ * rows_.reach(block_rows_) + g_row_ * block_rows_) * 4 > kPackedBytes)
    block_rows_ = (block_rows_ + 1) / 2;
  row_blocks_ = blocks_of(rows_.result, block_rows_);
}

// Of one row, of x or of the output's gradient, with what fills up the last vector.
int64_t PixelGradWeight::gathered_words() const {
  const int64_t x = columns_.reach(block_columns_) * channels_.live, g = block_columns_ * filters_.live;
  return (std::max(x, g) + kPixelBlock) / 2;
}

void PixelGradWeight::pack_grad(const uint16_t* row, int64_t count, int64_t columns, uint32_t* to,
                                uint16_t* gathered) const {
  const int64_t live = filters_.live, channels = filters_.channels;
  for (int64_t r = 0; r < count; ++r, row += columns_.result * channels, to += g_row_) {
    kernels_.gather(row, channels, channels, filters_.bits, live, gathered, live, columns);
    kernels_.interleave(gathered, live, columns, g_width_, to);
  }
}

// Gathered rows from first_row on; of each run of taps, the inputs under pairs of outputs. What fills up vectors is
// what happens to lie there: its products go to lanes that nothing reads.
void PixelGradWeight::pack_x(const uint16_t* image, int64_t first_row, int64_t count, int64_t first_column,
                             int64_t columns, uint32_t* to, uint16_t* gathered) const {
  const int64_t live = channels_.live;
  for (int64_t r = first_row; r < first_row + count; ++r, to += x_row_) {
    const int64_t row = r * rows_.step - rows_.padding;
    if (row < 0 || row >= rows_.operand) {
      std::memset(to, 0, x_row_ * sizeof(*to));
      continue;
    }
    columns_.gather(kernels_, channels_, image + row * columns_.operand * channels_.channels, first_column,
                    columns_.reach(columns), gathered, live);
    for (int64_t run = 0; run < runs_; ++run)
      kernels_.interleave(gathered + run * columns_.spacing * live, columns_.stride * live, columns, x_width_,
                          to + run * pairs_ * x_width_);
  }
}

void PixelGradWeight::run(const uint16_t* x, const uint16_t* grad, int64_t first, int64_t end, float* partial,
                          uint32_t* scratch) const {
  uint32_t* const g = scratch + x_row_ * rows_.reach(block_rows_);
  uint16_t* const gathered = reinterpret_cast<uint16_t*>(g + g_row_ * block_rows_);
  for (int64_t block = first; block < end; ++block) {
    const int64_t image = block / (row_blocks_ * column_blocks_);
    const int64_t row = block / column_blocks_ % row_blocks_ * block_rows_;
    const int64_t column = block % column_blocks_ * block_columns_;
    const int64_t rows = std::min(block_rows_, rows_.result - row);
    const int64_t columns = std::min(block_columns_, columns_.result - column);
    pack_grad(grad + ((image * rows_.result + row) * columns_.result + column) * filters_.channels, rows, columns, g,
              gathered);
    pack_x(x + image * rows_.operand * columns_.operand * channels_.channels, row * rows_.stride, rows_.reach(rows),
           column * columns_.stride, columns, scratch, gathered);
    const int64_t tiles = blocks_of(broadcast_, kernels_.most_filters);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = broadcast_ * t / tiles, count = broadcast_ * (t + 1) / tiles - begin;
      for (int64_t r = 0; r < R_; ++r)
        for (int64_t run = 0; run < runs_; ++run) {
          const uint32_t* const under = scratch + r * rows_.spacing * x_row_ + run * pairs_ * x_width_;
          PixelDots dots{g, under, rows, (columns + 1) / 2, g_row_, g_width_, rows_.stride * x_row_, x_width_};
          if (vectors_of_filters_) {
            std::swap(dots.g, dots.x), std::swap(dots.g_row, dots.x_row), std::swap(dots.g_pair, dots.x_pair);
          }
          dots.g += begin;
          dots.out = partial + ((r * runs_ + run) * broadcast_ + begin) * width_, dots.out_filter = width_;
          for (int64_t c = 0; c < width_; c += kPixelBlock, dots.x += kPixelBlock, dots.out += kPixelBlock)
            (width_ - c < kPixelBlock ? kernels_.dots_half : kernels_.dots)[count](dots);
        }
    }
  }
}

void PixelGradWeight::write(const float* partial, int64_t count, const float* scale, uint16_t* grad_weight,
                            int64_t begin, int64_t end) const {
  std::vector<float> sum(elements_);
  std::vector<uint16_t> row(elements_ + kPixelBlock);
  const int64_t channels = channels_.channels, taps = R_ * runs_ * run_taps_;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t filter = filters_.slot[k];
    uint16_t* to = grad_weight + k * taps * channels;
    if (filter < 0) {
      std::memset(to, 0, taps * channels * sizeof(*to));
      continue;
    }
    for (int64_t run = 0; run < R_ * runs_; ++run) {
      const float* from = partial + run * broadcast_ * width_ + filter * (vectors_of_filters_ ? 1 : width_);
      const int64_t next = vectors_of_filters_ ? width_ : 1;
      for (int64_t i = 0; i < elements_; ++i) sum[i] = from[i * next];
      for (int64_t share = 1; share < count; ++share)
        for (int64_t i = 0; i < elements_; ++i) sum[i] += from[share * partial_floats() + i * next];
      kernels_.narrow(sum.data(), scale ? scale[k] : 1, elements_, row.data());
      for (int64_t tap = 0; tap < run_taps_; ++tap, to += channels)
        kernels_.scatter(row.data() + tap * channels_.live, 0, channels_.bits, to, channels, 1);
    }
  }
}

}  // namespace prunekernels
