#include "cpu/kernels/pixel_conv.h"

#include <algorithm>
#include <cstring>

namespace prunekernels {
namespace {

constexpr int64_t kGatheredBytes = 192 << 10;  // of a task: half of a small L2
constexpr int64_t kPatchBytes = 256 << 10;     // of a task
constexpr int64_t kResultBytes = 16 << 10;     // that are scattered at a time: less than an L1,
constexpr int64_t kManyBytes = 64 << 10;       // and more where the packed weights
constexpr int64_t kWeightBytes = 512 << 10;    // are larger than this, which are read once for them
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kFlatTiles = 16;  // of a task where pixels have no neighbours
constexpr int64_t kShortRow = 7;    // of results, up to which patches pay
constexpr int64_t kHalf = kPixelBlock / 2;

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
int64_t bytes(int64_t elements) { return elements * static_cast<int64_t>(sizeof(uint16_t)); }

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
      blocks_(blocks_of(out_.live, kPixelBlock)),
      most_pixels_(out_.live <= kHalf ? kernels_.most_half_pixels : kernels_.most_pixels),
      writes_in_place_(out_.live == out_.channels && out_.live % kHalf == 0),
      y_pixel_(writes_in_place_     ? out_.channels
               : out_.live <= kHalf ? kHalf
                                    : blocks_ * kPixelBlock) {
  const bool flat = flatten(s, rows_, columns_, images_);
  const bool phases = rows_.phase_count() * columns_.phase_count() > 1;
  block_columns_ = flat ? std::min(columns_.result, kFlatTiles * most_pixels_) : columns_.steps();
  column_blocks_ = blocks_of(columns_.steps(), block_columns_);
  pitch_ = columns_.reach(block_columns_) * pixel_;
  list_taps(s.S);
  if (!flat && !phases && columns_.result <= kShortRow && blocks_ > 1)
    plan_patches(threads);
  else
    plan_rows(threads);
  const int64_t most = most_pixels_ * columns_.phase_count();
  const int64_t together = bytes(2 * weight_words()) > kWeightBytes ? kManyBytes : kResultBytes;
  result_pixels_ = std::max(most, together / bytes(blocks_ * kPixelBlock) / most * most);
}

void PixelConv::list_taps(int64_t columns) {
  for (const PixelAxis::Phase& row_phase : rows_.phases)
    for (const PixelAxis::Phase& column_phase : columns_.phases) {
      const std::vector<PixelAxis::Tap>& taps = column_phase.taps;
      const int64_t count = static_cast<int64_t>(taps.size()), run = columns_.spacing == 1 ? count : 1;
      Part part{static_cast<int64_t>(order_.size()), static_cast<int64_t>(runs_.size()), 0, run * pairs_};
      for (const PixelAxis::Tap& row : row_phase.taps)
        for (int64_t i = 0; i < count; ++i) {
          order_.push_back(row.index * columns + taps[i].index);
          if (i % run) continue;
          const int64_t at = (row.offset - rows_.low) * pitch_ + (taps[i].offset - columns_.low) * pixel_;
          runs_.push_back(static_cast<int32_t>(at));
          ++part.runs;
        }
      parts_.push_back(part);
    }
}

// A task is a few rows of an image.
void PixelConv::plan_rows(int64_t threads) {
  tile_pixel_ = columns_.stride * pixel_;
  block_rows_ = rows_.steps();
  const auto too_much = [&] {
    const bool few = images_ * blocks_of(rows_.steps(), block_rows_) * column_blocks_ < kTasksPerThread * threads;
    return few || bytes(window_elements()) > kGatheredBytes;
  };
  while (block_rows_ > 1 && too_much()) block_rows_ = (block_rows_ + 1) / 2;
  row_blocks_ = blocks_of(rows_.steps(), block_rows_);
  tasks_ = images_ * row_blocks_ * column_blocks_;
}

// A task is a few tiles of the pixels of all images.
void PixelConv::plan_patches(int64_t threads) {
  tile_pixel_ = static_cast<int64_t>(order_.size()) * pixel_;
  patch_ = {0, 0, 1, static_cast<int64_t>(order_.size()) * pairs_};
  block_rows_ = rows_.result;
  const int64_t image = rows_.result * columns_.result, pixels = images_ * image;
  int64_t tiles = std::max<int64_t>(1, kPatchBytes / bytes(most_pixels_ * tile_pixel_));
  while (tiles > 1 && blocks_of(pixels, tiles * most_pixels_) < kTasksPerThread * threads) --tiles;
  patch_pixels_ = std::min(pixels, tiles * most_pixels_);
  images_at_once_ = std::min(images_, (patch_pixels_ + image - 2) / image + 1);
  tasks_ = blocks_of(pixels, patch_pixels_);
}

int64_t PixelConv::pack_scratch() const {
  const int64_t taps = static_cast<int64_t>(order_.size());
  return (forward_ ? kHalf * taps * pixel_ : 2 * taps * out_.live) + kPixelBlock;
}

// Rows of the weight are filters, and in them the channels of a tap lie side by side. Forward, a result is a row: its
// channels are gathered, and their pairs go to the result's lane; a piece is a block of results. Backward, an operand
// is a row: the channels of two rows, which are results, are gathered and interleaved; a piece is such a pair.
void PixelConv::pack_weights(const uint16_t* weight, uint32_t* packed, int64_t begin, int64_t end,
                             uint16_t* scratch) const {
  const int64_t taps = static_cast<int64_t>(order_.size());
  const auto gather = [&](int32_t filter, const ChannelList& list, uint16_t* to, int64_t to_tap) {
    kernels_.gather(weight + filter * taps * list.channels, list.channels, list.channels, list.bits, list.live, to,
                    to_tap, taps);
  };
  if (forward_) {
    for (int64_t half = 2 * begin; half < 2 * end; ++half) {
      const int64_t first = half * kHalf, count = std::clamp<int64_t>(out_.live - first, 0, kHalf);
      uint32_t* const to = packed + half / 2 * block_words() + half % 2 * kHalf;
      if (count < kHalf) std::memset(scratch, 0, bytes(kHalf * taps * pixel_));
      for (int64_t i = 0; i < count; ++i) gather(out_.index[first + i], in_, scratch + i * taps * pixel_, pixel_);
      for (int64_t tap = 0; tap < taps; ++tap)
        kernels_.lanes(scratch + order_[tap] * pixel_, taps * pixel_, pairs_, to + tap * pairs_ * kPixelBlock);
    }
    return;
  }
  for (int64_t j = begin; j < end; ++j) {
    const int64_t rows = std::min<int64_t>(2, in_.live - 2 * j), row = taps * out_.live;
    for (int64_t i = 0; i < rows; ++i) gather(in_.index[2 * j + i], out_, scratch + i * row, out_.live);
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t block = 0; block < blocks_; ++block)  // behind the last result is no matter what
        kernels_.interleave(scratch + order_[tap] * out_.live + block * kPixelBlock, row, rows, kPixelBlock,
                            packed + block * block_words() + (tap * pairs_ + j) * kPixelBlock);
  }
}

// Gathered rows from first_row on, from first_column on.
void PixelConv::gather(const uint16_t* image, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns,
                       uint16_t* to) const {
  for (int64_t r = first_row; r < first_row + rows; ++r, to += pitch_) {
    const int64_t row = r * rows_.step - rows_.padding;
    if (row < 0 || row >= rows_.operand)
      std::memset(to, 0, bytes(columns * pixel_));
    else
      columns_.gather(kernels_, in_, image + row * columns_.operand * in_.channels, first_column, columns, to, pixel_);
  }
}

void PixelConv::run(const uint16_t* operand, const uint32_t* weights, const float* start, uint16_t* result,
                    int64_t task, uint16_t* scratch) const {
  Work work{weights, start, scratch + gathered_elements() + patch_elements(), {}, {}};
  if (patch_pixels_)
    run_patches(operand, result, task, scratch, work);
  else
    run_rows(operand, result, task, scratch, work);
  finish(work);
}

void PixelConv::run_rows(const uint16_t* operand, uint16_t* result, int64_t task, uint16_t* gathered,
                         Work& work) const {
  const int64_t image = task / (row_blocks_ * column_blocks_);
  const int64_t first_row = task / column_blocks_ % row_blocks_ * block_rows_;
  const int64_t first_column = task % column_blocks_ * block_columns_;
  const int64_t rows = std::min(block_rows_, rows_.steps() - first_row);
  const int64_t columns = std::min(block_columns_, columns_.steps() - first_column);
  gather(operand + image * rows_.operand * columns_.operand * in_.channels, first_row * rows_.stride + rows_.low,
         rows_.reach(rows), first_column * columns_.stride + columns_.low, columns_.reach(columns), gathered);
  for (int64_t row = 0; row < rows; ++row, gathered += rows_.stride * pitch_)
    for (int64_t phase = 0; phase < rows_.phase_count(); ++phase) {
      const int64_t at = (first_row + row) * rows_.phase_count() + phase;
      if (at < rows_.result)
        add_row(gathered, phase, first_column, columns,
                result + (image * rows_.result + at) * columns_.result * out_.channels, work);
    }
}

// Of a row of results, which starts at `to`: the results first..first + count of every phase of columns.
void PixelConv::add_row(const uint16_t* gathered, int64_t row_phase, int64_t first, int64_t count, uint16_t* to,
                        Work& work) const {
  const int64_t channels = out_.channels, phases = columns_.phase_count();
  const auto pixels_of = [&](int64_t steps) { return std::min(columns_.result - first * phases, steps * phases); };
  to += first * phases * channels;
  if (rows_.phases[row_phase].taps.empty()) {
    std::memset(to, 0, bytes(pixels_of(count) * channels));
    return;
  }
  const int64_t tiles = blocks_of(count, most_pixels_), size = count / tiles, larger = count % tiles;
  for (int64_t t = 0, begin = 0; t < tiles; ++t) {
    const int64_t end = begin + size + (t < larger), before = begin * phases;
    uint16_t* const y = add_span(to + before * channels, pixels_of(end) - before, work);
    for (int64_t phase = 0; phase < phases; ++phase) {
      const int64_t pixels = std::min(columns_.phases[phase].results - first, end) - begin;
      if (pixels > 0)
        work.tiles.push_back(
            {gathered + begin * tile_pixel_, y + phase * y_pixel_, &parts_[row_phase * phases + phase], pixels});
    }
    begin = end;
  }
}

void PixelConv::run_patches(const uint16_t* operand, uint16_t* result, int64_t task, uint16_t* gathered,
                            Work& work) const {
  const int64_t image_pixels = rows_.result * columns_.result, first = task * patch_pixels_;
  const int64_t count = std::min(patch_pixels_, images_ * image_pixels - first);
  const int64_t first_image = first / image_pixels, last_image = (first + count - 1) / image_pixels;
  for (int64_t image = first_image; image <= last_image; ++image)
    gather(operand + image * rows_.operand * columns_.operand * in_.channels, rows_.low, rows_.reach(rows_.result),
           columns_.low, columns_.reach(columns_.result), gathered + (image - first_image) * window_elements());
  uint16_t* const patches = gathered + gathered_elements() - kMostPixels * tile_pixel_;
  uint16_t* to = patches;
  const int64_t run = 2 * parts_[0].pairs;
  for (int64_t pixel = first; pixel < first + count; ++pixel) {
    const int64_t row = pixel % image_pixels / columns_.result, column = pixel % columns_.result;
    const uint16_t* const from = gathered + (pixel / image_pixels - first_image) * window_elements() +
                                 (row * rows_.stride) * pitch_ + column * columns_.stride * pixel_;
    for (const int32_t at : runs_) to = std::copy_n(from + at, run, to);
  }
  const int64_t tiles = blocks_of(count, most_pixels_);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = count * t / tiles, pixels = count * (t + 1) / tiles - begin;
    uint16_t* const y = add_span(result + (first + begin) * out_.channels, pixels, work);
    work.tiles.push_back({patches + begin * tile_pixel_, y, &patch_, pixels});
  }
}

// Where results that go to neighbouring places may be written.
uint16_t* PixelConv::add_span(uint16_t* to, int64_t pixels, Work& work) const {
  if (work.pixels + pixels > result_pixels_) finish(work);
  uint16_t* const at = writes_in_place_ ? to : work.results + work.pixels * y_pixel_;
  if (!work.spans.empty() && work.spans.back().to + work.spans.back().pixels * out_.channels == to)
    work.spans.back().pixels += pixels;
  else
    work.spans.push_back({to, pixels});
  work.pixels += pixels;
  return at;
}

void PixelConv::finish(Work& work) const {
  PixelTile tile{};
  tile.x_pixel = tile_pixel_, tile.y_pixel = columns_.phase_count() * y_pixel_;
  for (int64_t block = 0; block < blocks_; ++block) {
    const auto& kernels = out_.live - block * kPixelBlock <= kHalf ? kernels_.conv_half : kernels_.conv;
    tile.start = work.start + block * kPixelBlock;
    for (const Tile& t : work.tiles) {
      tile.x = t.x, tile.y = t.y + block * kPixelBlock;
      tile.taps = runs_.data() + t.part->first_run, tile.tap_count = t.part->runs, tile.pairs = t.part->pairs;
      tile.weights = work.weights + block * block_words() + t.part->first_tap * pairs_ * kPixelBlock;
      kernels[t.pixels](tile);
    }
  }
  const uint16_t* from = work.results;
  for (const Span& span : work.spans) {
    if (!writes_in_place_) kernels_.scatter(from, y_pixel_, out_.bits, span.to, out_.channels, span.pixels);
    from += span.pixels * y_pixel_;
  }
  work.tiles.clear(), work.spans.clear(), work.pixels = 0;
}

}  // namespace prunekernels
