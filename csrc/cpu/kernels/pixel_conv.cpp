#include "cpu/kernels/pixel_conv.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

namespace prunekernels {
namespace {

constexpr int64_t kGatheredBytes = 192 << 10;  // of a task: half of a small L2
constexpr int64_t kPatchBytes = 256 << 10;     // of a task
constexpr int64_t kResultBytes = 16 << 10;     // that are scattered at a time: less than an L1,
constexpr int64_t kManyBytes = 64 << 10;       // and more where the packed weights
constexpr int64_t kWeightBytes = 512 << 10;    // are larger than this, which are read once for them
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kFlatTiles = 16;         // of a task where pixels have no neighbours,
constexpr int64_t kFlatBytes = 512 << 10;  // or fewer, if these would be more
constexpr int64_t kShortRow = 7;           // of results, up to which patches pay
constexpr int64_t kHalf = kPixelBlock / 2;

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
int64_t bytes(int64_t elements) { return elements * static_cast<int64_t>(sizeof(uint16_t)); }
int64_t pairs_of(int64_t channels) { return (channels + 1) / 2; }

bool read_all(const ResultBlocks& all, int64_t operands) {
  return std::all_of(all.blocks.begin(), all.blocks.end(),
                     [&](const ResultBlock& block) { return block.listed() == pairs_of(operands); });
}

}  // namespace

EveryChannel::EveryChannel(int64_t channels) : index(channels), bits((channels + 63) / 64, ~uint64_t{0}) {
  std::iota(index.begin(), index.end(), 0);
}

PixelConv::PixelConv(Direction direction, const ConvShape& s, const MaskTable* mask, ResultBlocks blocks,
                     const ChannelList& filters, const ChannelList& channels, int64_t threads)
    : forward_(direction == kForward),
      in_(forward_ ? channels : filters),
      live_(forward_ ? filters : channels),
      spread_(!mask && live_.channels % kHalf == 0 && live_.channels < live_.live + kHalf &&
              read_all(blocks, in_.live)),
      every_(spread_ ? live_.channels : 0),
      out_(spread_ ? every_.list() : live_),
      kernels_(read_all(blocks, in_.live) ? pixel_kernels() : vector_pixel_kernels()),
      mask_(mask ? std::optional<MaskTable>(*mask) : std::nullopt),
      rows_(s, 0, forward_),
      columns_(s, 1, forward_),
      images_(s.N) {
  if (spread_) blocks = whole_blocks(out_.live, in_.live);
  const bool flat = flatten(s, rows_, columns_, images_);
  const bool phases = rows_.phase_count() * columns_.phase_count() > 1;
  const bool patches = !flat && !phases && columns_.result <= kShortRow && blocks.blocks.size() > 1;
  run_pixels_ = patches ? s.taps() : common_run();
  pairs_ = kernels_.padded ? kernels_.padded(pairs_of(in_.live), run_pixels_) : pairs_of(in_.live);
  pixel_ = 2 * pairs_;
  take(std::move(blocks), s.taps());
  reads_in_place_ = flat && in_.live == in_.channels && in_.live == pixel_;
  block_columns_ = flat ? std::min(columns_.result, kFlatTiles * most_pixels_) : columns_.steps();
  while (flat && block_columns_ > most_pixels_ && bytes(block_columns_ * pixel_) > kFlatBytes)
    block_columns_ = (block_columns_ + 1) / 2;
  column_blocks_ = blocks_of(columns_.steps(), block_columns_);
  pitch_ = columns_.reach(block_columns_) * pixel_;
  if (patches)
    plan_patches(s.taps(), threads);
  else
    plan_rows(threads);
  const int64_t filled = blocks_.back().first + (blocks_.back().half() ? kHalf : kPixelBlock);
  writes_in_place_ = out_.live == out_.channels && filled <= out_.live && !joins_rows_;
  y_pixel_ = writes_in_place_ ? out_.channels : filled;
  const int64_t most = most_pixels_ * columns_.phase_count();
  const int64_t together = bytes(2 * weight_words()) > kWeightBytes ? kManyBytes : kResultBytes;
  result_pixels_ = std::max(most, together / bytes(y_pixel_) / most * most);
  list_taps(s.S);
}

void PixelConv::take(ResultBlocks blocks, int64_t taps) {
  const bool padded = pairs_ > pairs_of(in_.live);  // then all blocks read all pairs, and the zeros behind them too
  listed_ = std::move(blocks.pairs);
  if (padded) {
    listed_.resize(pairs_);
    std::iota(listed_.begin(), listed_.end(), 0);
  }
  for (ResultBlock& block : blocks.blocks) {
    if (padded) block.begin = 0, block.end = block.run = pairs_;
    blocks_.push_back({block, words_, 0});
    words_ += taps * block.listed() * kPixelBlock;
  }
  const bool halves = std::all_of(blocks_.begin(), blocks_.end(), [](const Block& block) { return block.half(); });
  most_pixels_ = halves ? kernels_.most_half_pixels : kernels_.most_pixels;
  width_ = blocks_.back().first + kPixelBlock;
}

// The largest number of taps that divides all runs of rows.
int64_t PixelConv::common_run() const {
  int64_t common = 0;
  for (const PixelAxis::Phase& phase : columns_.phases)
    common = std::gcd(common, static_cast<int64_t>(phase.taps.size()));
  return columns_.spacing == 1 ? std::max<int64_t>(1, common) : 1;
}

void PixelConv::list_taps(int64_t columns) {
  patch_run_ = columns_.spacing == 1 ? columns_.phases[0].taps.size() : 1;
  for (const PixelAxis::Phase& row_phase : rows_.phases)
    for (const PixelAxis::Phase& column_phase : columns_.phases)
      for (const PixelAxis::Tap& row : row_phase.taps)
        for (const PixelAxis::Tap& column : column_phase.taps) {
          order_.push_back(row.index * columns + column.index);
          if (!patch_pixels_) continue;
          const int64_t at = (row.offset - rows_.low) * pitch_ + (column.offset - columns_.low) * pixel_;
          patch_taps_.push_back(static_cast<int32_t>(at));
        }
  const auto count = static_cast<int64_t>(blocks_.size());
  if (std::any_of(blocks_.begin(), blocks_.end(), [&](const Block& block) { return !is_whole(block); }))
    place_.assign(pairs_ * count, -1);
  for (int64_t b = 0; b < count; ++b) {
    Block& block = blocks_[b];
    block.first_part = static_cast<int64_t>(parts_.size());
    if (patch_pixels_)
      add_patch(block);
    else
      add_parts(block);
    for (int64_t i = block.begin; !place_.empty() && i < block.end; ++i)
      place_[listed_[i] * count + b] = static_cast<int32_t>(i - block.begin);
  }
}

void PixelConv::add_parts(const ResultBlock& block) {
  int64_t words = 0;
  for (const PixelAxis::Phase& row_phase : rows_.phases)
    for (const PixelAxis::Phase& column_phase : columns_.phases) {
      const std::vector<PixelAxis::Tap>& taps = column_phase.taps;
      const auto count = static_cast<int64_t>(taps.size());
      const int64_t together = is_whole(block) && columns_.spacing == 1 ? count : 1;
      Part part{words, static_cast<int64_t>(runs_.size()), 0, together * block.run};
      for (const PixelAxis::Tap& row : row_phase.taps)
        for (int64_t t = 0; t < count; t += together)
          for (int64_t i = block.begin; i < block.end; i += block.run) {
            const int64_t at = (row.offset - rows_.low) * pitch_ + (taps[t].offset - columns_.low) * pixel_;
            runs_.push_back(static_cast<int32_t>(at + 2 * listed_[i]));
            ++part.runs;
          }
      words += static_cast<int64_t>(row_phase.taps.size()) * count * block.listed() * kPixelBlock;
      parts_.push_back(part);
    }
}

void PixelConv::add_patch(const ResultBlock& block) {
  const auto taps = static_cast<int64_t>(order_.size());
  Part part{0, static_cast<int64_t>(runs_.size()), 1, taps * pairs_};
  if (is_whole(block)) {
    runs_.push_back(0);
  } else {
    part.runs = taps * block.listed() / block.run, part.pairs = block.run;
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t i = block.begin; i < block.end; i += block.run)
        runs_.push_back(static_cast<int32_t>(tap * pixel_ + 2 * listed_[i]));
  }
  parts_.push_back(part);
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
  joins_rows_ = kernels_.step && rows_.phase_count() * columns_.phase_count() == 1 && rows_.stride == 1 &&
                columns_.stride == 1 && 10 * cost(positions(block_rows_)) < 9 * block_rows_ * cost(block_columns_);
}

// Of tiles of kernels that work in steps: half a tile is bound by the loads of its weights.
int64_t PixelConv::cost(int64_t pixels) const {
  const int64_t tiles = std::max<int64_t>(1, blocks_of(pixels, most_pixels_));
  return tiles * (2 * blocks_of(pixels, tiles) <= most_pixels_ ? 3 : 4);
}

// A task is a few tiles of the pixels of all images.
void PixelConv::plan_patches(int64_t taps, int64_t threads) {
  tile_pixel_ = taps * pixel_;
  block_rows_ = rows_.result;
  const int64_t image = rows_.result * columns_.result, pixels = images_ * image;
  int64_t tiles = std::max<int64_t>(1, kPatchBytes / bytes(most_pixels_ * tile_pixel_));
  while (tiles > 1 && blocks_of(pixels, tiles * most_pixels_) < kTasksPerThread * threads) --tiles;
  patch_pixels_ = std::min(pixels, tiles * most_pixels_);
  images_at_once_ = std::min(images_, (patch_pixels_ + image - 2) / image + 1);
  tasks_ = blocks_of(pixels, patch_pixels_);
}

int64_t PixelConv::pack_scratch() const {
  const auto taps = static_cast<int64_t>(order_.size());
  const int64_t row = forward_ ? pixel_ : out_.live, rows = forward_ ? kHalf : 2;
  return rows * taps * row + kPixelBlock + (mask_ ? row : 0);
}

// Rows of the weight are filters, and in them the channels of a tap lie side by side. Forward, a result is a row: its
// channels are gathered, and their pairs go to the result's lane; a piece is a block of results. Backward, an operand
// is a row: the channels of two rows, which are results, are gathered and interleaved; a piece is such a pair.
void PixelConv::pack_weights(const uint16_t* weight, uint32_t* packed, int64_t begin, int64_t end,
                             uint16_t* scratch) const {
  for (int64_t piece = begin; piece < end; ++piece)
    if (forward_)
      pack_forward(weight, packed + blocks_[piece].words, blocks_[piece], scratch);
    else
      pack_backward(weight, packed, piece, scratch);
}

// The listed channels of `count` filters, zeros where kernels are dead: [filter][tap][to_tap]. Behind them is room for
// a row of one tap.
void PixelConv::gather_rows(const int32_t* filters, int64_t count, const ChannelList& list, const uint16_t* weight,
                            uint16_t* to, int64_t to_tap) const {
  const auto taps = static_cast<int64_t>(order_.size());
  uint16_t* const live = to + pack_scratch() - to_tap;
  for (int64_t i = 0; i < count; ++i) {
    uint16_t* row = to + i * taps * to_tap;
    kernels_.gather(weight + filters[i] * taps * list.channels, list.channels, list.channels, list.bits, list.live, row,
                    to_tap, taps);
    if (!mask_) continue;
    for (int64_t j = 0; j < list.live; ++j) live[j] = mask_->pair(filters[i], list.index[j]) ? 0xffff : 0;
    for (int64_t tap = 0; tap < taps; ++tap, row += to_tap)
      for (int64_t j = 0; j < list.live; ++j) row[j] &= live[j];
  }
}

void PixelConv::pack_forward(const uint16_t* weight, uint32_t* packed, const Block& block, uint16_t* scratch) const {
  const auto taps = static_cast<int64_t>(order_.size());
  const bool as_they_are = in_.live == in_.channels && in_.live == pixel_ && out_.live == out_.channels && !mask_;
  for (int64_t first = 0; first < block.count; first += kHalf) {
    const int64_t count = std::min(block.count - first, kHalf);
    const int32_t* const filters = out_.index + block.first + first;
    const bool in_place = as_they_are && count == kHalf;
    const uint16_t* const rows = in_place ? weight + filters[0] * taps * pixel_ : scratch;
    if (count < kHalf) std::memset(scratch, 0, bytes(kHalf * taps * pixel_));
    if (!in_place) gather_rows(filters, count, in_, weight, scratch, pixel_);
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t i = block.begin; i < block.end; i += block.run)
        kernels_.lanes(rows + order_[tap] * pixel_ + 2 * listed_[i], taps * pixel_, block.run,
                       packed + first + (tap * block.listed() + i - block.begin) * kPixelBlock);
  }
}

void PixelConv::pack_backward(const uint16_t* weight, uint32_t* packed, int64_t pair, uint16_t* scratch) const {
  const auto taps = static_cast<int64_t>(order_.size()), blocks = static_cast<int64_t>(blocks_.size());
  const int64_t rows = std::clamp<int64_t>(in_.live - 2 * pair, 0, 2);
  gather_rows(in_.index + 2 * pair, rows, out_, weight, scratch, out_.live);
  for (int64_t b = 0; b < blocks; ++b) {
    const Block& block = blocks_[b];
    const int64_t place = place_.empty() ? pair : place_[pair * blocks + b];
    for (int64_t tap = 0; place >= 0 && tap < taps; ++tap) {  // behind the last result is no matter what
      uint32_t* const to = packed + block.words + (tap * block.listed() + place) * kPixelBlock;
      if (rows)
        kernels_.interleave(scratch + order_[tap] * out_.live + block.first, taps * out_.live, rows, kPixelBlock, to);
      else
        std::memset(to, 0, kPixelBlock * sizeof(*to));
    }
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
  const PixelSection section(kernels_, run_pixels_ * pairs_);
  Work work{weights, start, scratch + gathered_elements() + patch_elements(), section.step, {}, {}};
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
  const uint16_t* from = gathered;
  if (reads_in_place_ && first_column + columns + kMostHalfPixels <= columns_.operand)
    from = operand + first_column * pixel_;
  else
    gather(operand + image * rows_.operand * columns_.operand * in_.channels, first_row * rows_.stride + rows_.low,
           rows_.reach(rows), first_column * columns_.stride + columns_.low, columns_.reach(columns), gathered);
  if (joins_rows_)
    return add_joined_rows(from, rows, result + (image * rows_.result + first_row) * columns_.result * out_.channels,
                           work);
  for (int64_t row = 0; row < rows; ++row, from += rows_.stride * pitch_)
    for (int64_t phase = 0; phase < rows_.phase_count(); ++phase) {
      const int64_t at = (first_row + row) * rows_.phase_count() + phase;
      if (at < rows_.result)
        add_row(from, phase, first_column, columns,
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
    uint16_t* const y = add_span(to + before * channels, pixels_of(end) - before, pixels_of(end) - before, work);
    for (int64_t phase = 0; phase < phases; ++phase) {
      const int64_t pixels = std::min(columns_.phases[phase].results - first, end) - begin;
      if (pixels > 0)
        work.tiles.push_back(
            {gathered + begin * tile_pixel_, y + phase * y_pixel_, row_phase * phases + phase, pixels});
    }
    begin = end;
  }
}

// Of whole rows of results, the first of which starts at `to`. Tiles go on from one row to the next: gathered rows lie
// close together, and what is computed in between, where a row has no more results, goes nowhere.
void PixelConv::add_joined_rows(const uint16_t* gathered, int64_t rows, uint16_t* to, Work& work) const {
  const int64_t count = positions(rows), tiles = blocks_of(count, most_pixels_);
  const int64_t columns = columns_.result, wide = columns_.reach(columns);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = count * t / tiles, end = count * (t + 1) / tiles;
    uint16_t* y = nullptr;
    for (int64_t at = begin, next; at < end; at = next) {
      const int64_t row = at / wide, column = at % wide;
      next = std::min(end, row * wide + (column < columns ? columns : wide));
      uint16_t* const place = column < columns ? to + (row * columns + column) * out_.channels : nullptr;
      uint16_t* const span = add_span(place, next - at, at == begin ? end - begin : 0, work);
      if (at == begin) y = span;
    }
    work.tiles.push_back({gathered + begin * tile_pixel_, y, 0, end - begin});
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
  uint16_t* const patches = gathered + gathered_elements() - most_pixels_ * tile_pixel_;
  uint16_t* to = patches;
  for (int64_t pixel = first; pixel < first + count; ++pixel) {
    const int64_t row = pixel % image_pixels / columns_.result, column = pixel % columns_.result;
    const uint16_t* const from = gathered + (pixel / image_pixels - first_image) * window_elements() +
                                 (row * rows_.stride) * pitch_ + column * columns_.stride * pixel_;
    for (size_t i = 0; i < patch_taps_.size(); i += patch_run_)
      to = std::copy_n(from + patch_taps_[i], patch_run_ * pixel_, to);
  }
  const int64_t tiles = blocks_of(count, most_pixels_);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = count * t / tiles, pixels = count * (t + 1) / tiles - begin;
    uint16_t* const y = add_span(result + (first + begin) * out_.channels, pixels, pixels, work);
    work.tiles.push_back({patches + begin * tile_pixel_, y, 0, pixels});
  }
}

// Where results that go to neighbouring places, or nowhere (null), may be written; `room`: with those to come.
uint16_t* PixelConv::add_span(uint16_t* to, int64_t pixels, int64_t room, Work& work) const {
  if (work.pixels + room > result_pixels_) finish(work);
  uint16_t* const at = writes_in_place_ ? to : work.results + work.pixels * y_pixel_;
  if (to && !work.spans.empty() && work.spans.back().to &&
      work.spans.back().to + work.spans.back().pixels * out_.channels == to)
    work.spans.back().pixels += pixels;
  else
    work.spans.push_back({to, pixels});
  work.pixels += pixels;
  return at;
}

void PixelConv::finish(Work& work) const {
  PixelTile tile{};
  tile.x_pixel = tile_pixel_, tile.y_pixel = columns_.phase_count() * y_pixel_, tile.step = work.step;
  for (const Block& block : blocks_) {
    const auto& kernels = block.half() ? kernels_.conv_half : kernels_.conv;
    tile.start = work.start + block.first;
    tile.lanes = spread_ ? static_cast<uint32_t>(live_.bits[block.first >> 6] >> (block.first & 63)) : ~0u;
    for (const Tile& t : work.tiles) {
      const Part& part = parts_[block.first_part + t.part];
      tile.x = t.x, tile.y = t.y + block.first, tile.pixels = t.pixels;
      tile.taps = runs_.data() + part.first_run, tile.tap_count = part.runs, tile.pairs = part.pairs;
      tile.weights = work.weights + block.words + part.words;
      kernels[t.pixels](tile);
    }
  }
  const uint16_t* from = work.results;
  for (const Span& span : work.spans) {
    if (!writes_in_place_ && span.to) kernels_.scatter(from, y_pixel_, out_.bits, span.to, out_.channels, span.pixels);
    from += span.pixels * y_pixel_;
  }
  work.tiles.clear(), work.spans.clear(), work.pixels = 0;
}

}  // namespace prunekernels
