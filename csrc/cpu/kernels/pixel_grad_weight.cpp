#include "cpu/kernels/pixel_grad_weight.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "core/tile_lists.h"

namespace prunekernels {
namespace {

constexpr int64_t kPackedBytes = 256 << 10;  // of a block
constexpr int64_t kFlatPixels = 512;         // of a block where pixels have no neighbours
constexpr int64_t kHalf = kPixelBlock / 2;
constexpr int64_t kMaskedFilters = 8;  // of a tile, if tiles are left out
constexpr double kWorthwhile = 0.9;    // share of multiplications left from which on vectors hold filters

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

void zero_pairs(uint32_t* to, int64_t begin, int64_t end, int64_t words) {
  std::memset(to + begin * words, 0, (end - begin) * words * sizeof(*to));
}

}  // namespace

PixelGradWeight::PixelGradWeight(const ConvShape& s, const MaskTable* mask, const ChannelList& filters,
                                 const ChannelList& channels)
    : kernels_(mask ? vector_pixel_kernels() : pixel_kernels()),
      mask_(mask ? std::optional<MaskTable>(*mask) : std::nullopt),
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
  vectors_of_filters_ = kernels_.step
                            ? R_ * runs_ == 1 && wide_x < wide_g  // what is turned is less, and no tap shifts it
                            : wide_g * elements_ < kWorthwhile * static_cast<double>(wide_x * filters.live);
  g_width_ = vectors_of_filters_ ? wide_g : filters.live, x_width_ = vectors_of_filters_ ? elements_ : wide_x;
  broadcast_ = vectors_of_filters_ ? elements_ : filters.live, width_ = vectors_of_filters_ ? wide_g : wide_x;
  out_rows_ = kernels_.step ? blocks_of(broadcast_, kHalf) * kHalf : broadcast_;
  const bool flat = flatten(s, rows_, columns_, images_);
  block_columns_ = flat ? std::min(columns_.result, kFlatPixels) : columns_.result;
  column_blocks_ = blocks_of(columns_.result, block_columns_);
  pairs_ = padded((block_columns_ + 1) / 2);
  g_row_ = pairs_ * g_width_, x_row_ = runs_ * pairs_ * x_width_;
  block_rows_ = rows_.result;
  while (block_rows_ > 1 && (x_words() + g_words()) * 4 > kPackedBytes) block_rows_ = (block_rows_ + 1) / 2;
  row_blocks_ = blocks_of(rows_.result, block_rows_);
  tiles_ = blocks_of(broadcast_, mask_ ? kMaskedFilters : kernels_.most_filters);
  vectors_ = width_ / kHalf;
  if (mask_) find_live();
}

// Which numbers are multiplied by which vectors, of a run: filters, and its elements, which are channels tap after tap.
void PixelGradWeight::find_live() {
  const TileLists lists = filter_tile_lists(*mask_, vectors_of_filters_ ? kHalf : kMaskedFilters, 1);
  live_.assign(tiles_ * vectors_, 0);
  for (int64_t t = 0; t < lists.tiles(); ++t)
    for (int64_t i = lists.first[t]; i < lists.first[t + 1]; ++i)
      for (int64_t e = lists.chunks[i]; e < elements_; e += channels_.live)
        live_[vectors_of_filters_ ? e / kMaskedFilters * vectors_ + t : t * vectors_ + e / kHalf] = 1;
}

int64_t PixelGradWeight::computed_floats() const {
  if (!mask_) return partial_floats();
  return std::count(live_.begin(), live_.end(), 1) * kMaskedFilters * kHalf * R_ * runs_;
}

int64_t PixelGradWeight::padded(int64_t pairs) const { return kernels_.padded ? kernels_.padded(pairs, 1) : pairs; }

// Of the packed rows of a block.
int64_t PixelGradWeight::x_words() const { return blocks_of(x_row_ * rows_.reach(block_rows_), kHalf) * kHalf; }
int64_t PixelGradWeight::g_words() const { return blocks_of(g_row_ * block_rows_, kHalf) * kHalf; }

// A block whose rows are one run has as many steps or fewer.
int64_t PixelGradWeight::turned_words() const {
  if (!kernels_.step) return 0;
  return (block_rows_ * (pairs_ / kernels_.step(pairs_)) + 1) / 2 * out_rows_ * kPixelBlock;
}

// Of one row, of x or of the output's gradient, with what fills up the last vector.
int64_t PixelGradWeight::gathered_words() const {
  const int64_t x = columns_.reach(block_columns_) * channels_.live, g = block_columns_ * filters_.live;
  return (std::max(x, g) + kPixelBlock) / 2;
}

void PixelGradWeight::pack_grad(const uint16_t* row, int64_t count, int64_t columns, int64_t pairs, uint32_t* to,
                                uint16_t* gathered) const {
  const int64_t live = filters_.live, channels = filters_.channels;
  for (int64_t r = 0; r < count; ++r, row += columns_.result * channels, to += g_row_) {
    kernels_.gather(row, channels, channels, filters_.bits, live, gathered, live, columns);
    kernels_.interleave(gathered, live, columns, g_width_, to);
    zero_pairs(to, (columns + 1) / 2, pairs, g_width_);
  }
}

// Gathered rows from first_row on; of each run of taps, the inputs under pairs of outputs. What fills up vectors is
// what happens to lie there: its products go to lanes that nothing reads.
void PixelGradWeight::pack_x(const uint16_t* image, int64_t first_row, int64_t count, int64_t first_column,
                             int64_t columns, int64_t pairs, uint32_t* to, uint16_t* gathered) const {
  const int64_t live = channels_.live;
  for (int64_t r = first_row; r < first_row + count; ++r, to += x_row_) {
    const int64_t row = r * rows_.step - rows_.padding;
    if (row < 0 || row >= rows_.operand) {
      std::memset(to, 0, x_row_ * sizeof(*to));
      continue;
    }
    columns_.gather(kernels_, channels_, image + row * columns_.operand * channels_.channels, first_column,
                    columns_.reach(columns), gathered, live);
    for (int64_t run = 0; run < runs_; ++run) {
      uint32_t* const packed = to + run * pairs_ * x_width_;
      kernels_.interleave(gathered + run * columns_.spacing * live, columns_.stride * live, columns, x_width_, packed);
      zero_pairs(packed, (columns + 1) / 2, pairs, x_width_);
    }
  }
}

// Lines of `pairs` pairs for what is broadcast -> steps as dots wants them. Reads up to kHalf pairs behind the last.
void PixelGradWeight::turn(const uint32_t* from, int64_t lines, int64_t line, int64_t pairs, int64_t step,
                           uint32_t* to) const {
  int64_t t = 0;
  for (int64_t i = 0; i < lines; ++i, from += line)
    for (int64_t j = 0; j < pairs; j += step, ++t)
      kernels_.lanes(reinterpret_cast<const uint16_t*>(from + j * broadcast_), 2 * broadcast_, broadcast_,
                     to + t / 2 * out_rows_ * kPixelBlock + t % 2 * kHalf);
}

void PixelGradWeight::run(const uint16_t* x, const uint16_t* grad, int64_t first, int64_t end, float* partial,
                          uint32_t* scratch) const {
  uint32_t *const g = scratch + x_words(), *const turned = g + g_words();
  uint16_t* const gathered = reinterpret_cast<uint16_t*>(turned + turned_words());
  for (int64_t block = first; block < end; ++block) {
    const int64_t image = block / (row_blocks_ * column_blocks_);
    const int64_t row = block / column_blocks_ % row_blocks_ * block_rows_;
    const int64_t column = block % column_blocks_ * block_columns_;
    const int64_t rows = std::min(block_rows_, rows_.result - row);
    const int64_t columns = std::min(block_columns_, columns_.result - column);
    int64_t pairs = std::min(padded((columns + 1) / 2), pairs_), lines = rows;
    pack_grad(grad + ((image * rows_.result + row) * columns_.result + column) * filters_.channels, rows, columns,
              pairs, g, gathered);
    pack_x(x + image * rows_.operand * columns_.operand * channels_.channels, row * rows_.stride, rows_.reach(rows),
           column * columns_.stride, columns, pairs, scratch, gathered);
    if (runs_ == 1 && rows_.stride == 1 && pairs == pairs_) pairs *= rows, lines = 1;  // the rows are one run
    const PixelSection section(kernels_, pairs);
    if (section.step)
      turn(vectors_of_filters_ ? scratch : g, lines, vectors_of_filters_ ? x_row_ : g_row_, pairs, section.step,
           turned);
    multiply({scratch, g, turned, lines, pairs, section.step}, partial);
  }
}

void PixelGradWeight::multiply(const Packed& p, float* partial) const {
  const int64_t size = mask_ ? kMaskedFilters : kernels_.most_filters;
  const bool whole = mask_ || p.step;  // tiles but the last, which else are of about the same size
  for (int64_t t = 0; t < tiles_; ++t) {
    const int64_t begin = whole ? t * size : broadcast_ * t / tiles_;
    const int64_t count = (whole ? std::min(begin + size, broadcast_) : broadcast_ * (t + 1) / tiles_) - begin;
    for (int64_t r = 0; r < R_; ++r)
      for (int64_t run = 0; run < runs_; ++run) {
        PixelDots dots{};
        dots.rows = p.lines, dots.pairs = p.pairs, dots.step = p.step;
        dots.g = p.g, dots.g_row = g_row_, dots.g_pair = g_width_;
        dots.x = p.x + r * rows_.spacing * x_row_ + run * pairs_ * x_width_;
        dots.x_row = rows_.stride * x_row_, dots.x_pair = x_width_;
        if (vectors_of_filters_)
          std::swap(dots.g, dots.x), std::swap(dots.g_row, dots.x_row), std::swap(dots.g_pair, dots.x_pair);
        dots.g += begin;
        if (p.step) dots.g = p.turned + begin * kPixelBlock, dots.g_pair = out_rows_ * kPixelBlock;
        dots.out = partial + ((r * runs_ + run) * out_rows_ + begin) * width_, dots.out_filter = width_;
        for (int64_t v = 0; v < vectors_; v += 2, dots.x += kPixelBlock, dots.out += kPixelBlock) {
          const bool left = is_live(t, v), right = v + 1 < vectors_ && is_live(t, v + 1);
          PixelDots these = dots;
          if (!left) these.x += kHalf, these.out += kHalf;
          if (left || right) (left && right ? kernels_.dots : kernels_.dots_half)[count](these);
        }
      }
  }
}

void PixelGradWeight::write(const float* partial, int64_t count, const float* scale, uint16_t* grad_weight,
                            int64_t begin, int64_t end) const {
  std::vector<float> sum(elements_);
  std::vector<uint16_t> row(elements_ + kPixelBlock), live(channels_.channels);
  const int64_t channels = channels_.channels, taps = R_ * runs_ * run_taps_;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t filter = filters_.slot[k];
    uint16_t* to = grad_weight + k * taps * channels;
    if (filter < 0) {
      std::memset(to, 0, taps * channels * sizeof(*to));
      continue;
    }
    for (int64_t c = 0; mask_ && c < channels; ++c) live[c] = mask_->pair(k, c) ? 0xffff : 0;
    for (int64_t run = 0; run < R_ * runs_; ++run) {
      const float* from = partial + run * out_rows_ * width_ + filter * (vectors_of_filters_ ? 1 : width_);
      const int64_t next = vectors_of_filters_ ? width_ : 1;
      for (int64_t i = 0; i < elements_; ++i) sum[i] = from[i * next];
      for (int64_t share = 1; share < count; ++share)
        for (int64_t i = 0; i < elements_; ++i) sum[i] += from[share * partial_floats() + i * next];
      kernels_.narrow(sum.data(), scale ? scale[k] : 1, elements_, row.data());
      for (int64_t tap = 0; tap < run_taps_; ++tap, to += channels) {
        kernels_.scatter(row.data() + tap * channels_.live, 0, channels_.bits, to, channels, 1);
        for (int64_t c = 0; mask_ && c < channels; ++c) to[c] &= live[c];
      }
    }
  }
}

}  // namespace prunekernels
