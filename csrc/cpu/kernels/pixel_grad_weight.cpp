#include "cpu/kernels/pixel_grad_weight.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace prunekernels {
namespace {

constexpr int64_t kPackedBytes = 256 << 10;  // of a block
constexpr int64_t kFlatPixels = 512;         // of a block where pixels have no neighbours
constexpr int64_t kHalf = kPixelBlock / 2;

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace

PixelGradWeight::PixelGradWeight(const ConvShape& s, const ChannelList& filters, const ChannelList& channels)
    : kernels_(pixel_kernels()),
      filters_(filters),
      channels_(channels),
      images_(s.N),
      H_(s.H),
      W_(s.W),
      P_(s.P),
      Q_(s.Q),
      R_(s.R),
      S_(s.S),
      taps_(s.taps()),
      width_(blocks_of(channels.live, kHalf) * kHalf) {
  for (int i = 0; i < 2; ++i) stride_[i] = s.stride[i], padding_[i] = s.padding[i], dilation_[i] = s.dilation[i];
  const bool alone = taps_ == 1 && stride_[0] == 1 && stride_[1] == 1 && !padding_[0] && !padding_[1];
  if (alone) {  // all pixels in one row
    W_ = Q_ = images_ * P_ * Q_;
    images_ = H_ = P_ = 1;
  }
  block_columns_ = alone ? std::min(Q_, kFlatPixels) : Q_;
  column_blocks_ = blocks_of(Q_, block_columns_);
  pairs_ = (block_columns_ + 1) / 2;
  g_row_ = pairs_ * filters_.live, x_row_ = S_ * pairs_ * width_;
  block_rows_ = P_;
  while (block_rows_ > 1 && (x_row_ * x_rows() + g_row_ * block_rows_) * 4 > kPackedBytes)
    block_rows_ = (block_rows_ + 1) / 2;
  row_blocks_ = blocks_of(P_, block_rows_);
}

// Of one row, of x or of the output's gradient.
int64_t PixelGradWeight::gathered_words() const {
  const int64_t x = ((block_columns_ - 1) * stride_[1] + (S_ - 1) * dilation_[1] + 1) * width_;
  return (std::max(x, block_columns_ * filters_.live) + 1) / 2;
}

void PixelGradWeight::pack_grad(const uint16_t* row, int64_t count, int64_t columns, uint32_t* to,
                                uint16_t* gathered) const {
  const int64_t live = filters_.live;
  for (int64_t r = 0; r < count; ++r, row += Q_ * filters_.channels, to += g_row_) {
    kernels_.gather(row, filters_.channels, filters_.bits, live, gathered, live, columns);
    for (int64_t j = 0; 2 * j < columns; ++j)
      kernels_.interleave(gathered + 2 * j * live, 2 * j + 1 < columns ? gathered + (2 * j + 1) * live : nullptr, live,
                          to + j * live);
  }
}

// Rows row..row + count of the padded image; shifted by each tap of a row, the inputs under pairs of outputs.
void PixelGradWeight::pack_x(const uint16_t* image, int64_t row, int64_t count, int64_t column, int64_t columns,
                             uint32_t* to, uint16_t* gathered) const {
  const int64_t reach = (columns - 1) * stride_[1] + (S_ - 1) * dilation_[1] + 1;
  const int64_t first = std::clamp<int64_t>(-column, 0, reach);
  const int64_t last = std::clamp<int64_t>(W_ - column, first, reach);
  for (int64_t r = row; r < row + count; ++r, to += x_row_) {
    if (r < 0 || r >= H_) {
      std::memset(to, 0, x_row_ * sizeof(*to));
      continue;
    }
    std::memset(gathered, 0, first * width_ * sizeof(*gathered));
    kernels_.gather(image + (r * W_ + column + first) * channels_.channels, channels_.channels, channels_.bits,
                    channels_.live, gathered + first * width_, width_, last - first);
    std::memset(gathered + last * width_, 0, (reach - last) * width_ * sizeof(*gathered));
    for (int64_t s = 0; s < S_; ++s)
      for (int64_t j = 0; 2 * j < columns; ++j) {
        const uint16_t* a = gathered + (2 * j * stride_[1] + s * dilation_[1]) * width_;
        kernels_.interleave(a, 2 * j + 1 < columns ? a + stride_[1] * width_ : nullptr, width_,
                            to + (s * pairs_ + j) * width_);
      }
  }
}

void PixelGradWeight::run(const uint16_t* x, const uint16_t* grad, int64_t first, int64_t end, float* partial,
                          uint32_t* scratch) const {
  uint32_t* const g = scratch + x_row_ * x_rows();
  uint16_t* const gathered = reinterpret_cast<uint16_t*>(g + g_row_ * block_rows_);
  for (int64_t block = first; block < end; ++block) {
    const int64_t image = block / (row_blocks_ * column_blocks_);
    const int64_t row = block / column_blocks_ % row_blocks_ * block_rows_;
    const int64_t column = block % column_blocks_ * block_columns_;
    const int64_t rows = std::min(block_rows_, P_ - row), columns = std::min(block_columns_, Q_ - column);
    pack_grad(grad + ((image * P_ + row) * Q_ + column) * filters_.channels, rows, columns, g, gathered);
    pack_x(x + image * H_ * W_ * channels_.channels, row * stride_[0] - padding_[0],
           (rows - 1) * stride_[0] + (R_ - 1) * dilation_[0] + 1, column * stride_[1] - padding_[1], columns, scratch,
           gathered);
    const int64_t live = filters_.live, tiles = blocks_of(live, kernels_.most_filters);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t filter = live * t / tiles, count = live * (t + 1) / tiles - filter;
      for (int64_t tap = 0; tap < taps_; ++tap)
        for (int64_t c = 0; c < width_; c += kPixelBlock) {
          const int64_t r = tap / S_, s = tap % S_;
          (width_ - c < kPixelBlock ? kernels_.dots_half : kernels_.dots)[count](
              {g + filter, scratch + r * dilation_[0] * x_row_ + s * pairs_ * width_ + c, rows, (columns + 1) / 2,
               g_row_, live, stride_[0] * x_row_, width_, partial + (tap * live + filter) * width_ + c, width_});
        }
    }
  }
}

void PixelGradWeight::write(const float* partial, int64_t count, const float* scale, uint16_t* grad_weight,
                            int64_t begin, int64_t end) const {
  std::vector<float> sum(width_);
  std::vector<uint16_t> row(width_ + kPixelBlock);
  for (int64_t k = begin; k < end; ++k) {
    const int64_t filter = filters_.slot[k];
    uint16_t* to = grad_weight + k * taps_ * channels_.channels;
    if (filter < 0) {
      std::memset(to, 0, taps_ * channels_.channels * sizeof(*to));
      continue;
    }
    for (int64_t tap = 0; tap < taps_; ++tap, to += channels_.channels) {
      const float* from = partial + (tap * filters_.live + filter) * width_;
      std::copy(from, from + width_, sum.begin());
      for (int64_t share = 1; share < count; ++share)
        for (int64_t c = 0; c < width_; ++c) sum[c] += from[share * partial_floats() + c];
      kernels_.narrow(sum.data(), scale ? scale[k] : 1, width_, row.data());
      kernels_.scatter(row.data(), width_, channels_.bits, to, channels_.channels, 1);
    }
  }
}

}  // namespace prunekernels
