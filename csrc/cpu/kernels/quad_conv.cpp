#include "cpu/kernels/quad_conv.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace prunekernels {
namespace {

constexpr int64_t kPlaneBytes = 384 << 10;  // of a task: a good part of L2
constexpr int64_t kPositions = 2 << 10;     // of a task
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kAhead = 2;  // pairs, whose weights are prefetched

PlaneLayout layout_of(bool forward, const ConvShape& s) {
  if (forward) return {forward_axis(s, 0), forward_axis(s, 1)};
  return {grad_input_axis(s, 0), grad_input_axis(s, 1)};
}

PixelBlocks blocks_of(const PlaneLayout& layout, int64_t planes, int64_t images, int64_t threads) {
  const int64_t fit = kPlaneBytes / 4 / std::max<int64_t>(1, planes * layout.phases);
  const int64_t rows = layout.rows.longest();
  return {images,
          rows,
          layout.pitch,
          (rows + layout.extra_rows) * layout.pitch,
          std::min(fit, kPositions),
          kTasksPerThread * threads};
}

}  // namespace

QuadConv::QuadConv(bool forward, const ConvShape& s, const MaskTable& mask, TileLists lists, const ChannelList& filters,
                   const ChannelList& channels, int64_t threads)
    : kernels_(quad_kernels()),
      mask_(mask),
      forward_(forward),
      in_(forward ? channels : filters),
      out_(forward ? filters : channels),
      taps_(s.taps()),
      lists_(std::move(lists)),
      planes_(layout_of(forward_, s), in_, PlaneCell::pair),
      blocks_(blocks_of(planes_.layout(), planes_.count(), s.N, threads)) {
  writes_in_place_ = out_.live == out_.channels && out_.live == result_pairs() * 2;
  planes_.set_block(blocks_.images, blocks_.rows);
  for (const int32_t pair : lists_.chunks) pairs_.push_back(static_cast<int32_t>(planes_.plane(pair)));
  int64_t weights = 0;
  for (const AxisClass& rows : planes_.layout().rows.classes)
    for (const AxisClass& columns : planes_.layout().columns.classes) {
      Class c{&rows, &columns, {}, {}, weights};
      for (const Tap& r : rows.taps)
        for (const Tap& t : columns.taps) {
          c.tap.push_back(static_cast<int32_t>(r.index * s.S + t.index));
          c.offset.push_back(static_cast<int32_t>(planes_.tap_offset(r, t)));
        }
      weights += static_cast<int64_t>(lists_.chunks.size() * c.tap.size()) * kQuad;
      classes_.push_back(c);
    }
}

// A word's halves belong to two operands. Forward they are channels of the results' rows, which are read one after the
// other. Backward they are rows, of whose cache lines several quads take their channels.
void QuadConv::pack_weights(const uint16_t* weight, uint32_t* packed, int64_t begin, int64_t end, uint16_t*) const {
  const int64_t first = begin * kPackQuads, last = std::min(end * kPackQuads, quads());
  if (forward_) {
    for (int64_t quad = first; quad < last; ++quad)
      pack(weight, packed, quad, lists_.first[quad], lists_.first[quad + 1]);
    return;
  }
  for (int64_t base = first; base < last; base += kPackQuads) {
    const int64_t quads = std::min(kPackQuads, last - base);
    int32_t next[kPackQuads];
    std::copy_n(lists_.first.begin() + base, quads, next);
    for (int32_t pair = 0; pair < planes_.count(); ++pair) {
      for (int64_t row = 2 * (pair + kAhead); row < std::min(2 * (pair + kAhead + 1), in_.live); ++row)
        for (int64_t tap = 0; tap < taps_; ++tap)
          __builtin_prefetch(weight + (in_.index[row] * taps_ + tap) * out_.channels + out_.index[base * kQuad]);
      for (int64_t q = 0; q < quads; ++q)
        if (next[q] < lists_.first[base + q + 1] && lists_.chunks[next[q]] == pair) {
          pack(weight, packed, base + q, next[q], next[q] + 1);
          ++next[q];
        }
    }
  }
}

// Entries begin..end of a quad's list.
void QuadConv::pack(const uint16_t* weight, uint32_t* packed, int64_t quad, int32_t begin, int32_t end) const {
  struct Entry {
    int64_t low[kQuad], high[kQuad];
    uint32_t live[kQuad];
  };
  constexpr int32_t kEntries = 32;  // at a time
  const int64_t C = forward_ ? in_.channels : out_.channels, count = std::min<int64_t>(kQuad, out_.live - quad * kQuad);
  const auto place = [&](int64_t result, int64_t operand) {
    return forward_ ? result * taps_ * C + operand : operand * taps_ * C + result;
  };
  const auto live = [&](int64_t result, int64_t operand) {
    return forward_ ? mask_.pair(result, operand) : mask_.pair(operand, result);
  };
  for (; begin < end; begin += kEntries) {
    Entry entries[kEntries];
    const int32_t these = std::min(kEntries, end - begin);
    for (int32_t i = 0; i < these; ++i) {
      const int64_t pair = lists_.chunks[begin + i];
      const int64_t low = in_.index[2 * pair], high = 2 * pair + 1 < in_.live ? in_.index[2 * pair + 1] : low;
      for (int64_t f = 0; f < kQuad; ++f) {
        const int64_t result = out_.index[quad * kQuad + (f < count ? f : 0)];
        entries[i].low[f] = place(result, low), entries[i].high[f] = place(result, high);
        entries[i].live[f] =
            f >= count ? 0 : 0xffff * live(result, low) | 0xffff0000 * (high > low && live(result, high));
      }
    }
    for (const Class& c : classes_) {
      const int64_t taps = static_cast<int64_t>(c.tap.size());
      for (int64_t t = 0; t < taps; ++t) {
        const uint16_t *const from = weight + c.tap[t] * C, *const next = weight + c.tap[t + 1 < taps ? t + 1 : t] * C;
        uint32_t* to = packed + c.weights + (begin * taps + t) * kQuad;
        for (int32_t i = 0; i < these; ++i, to += taps * kQuad) {
          const Entry& e = entries[i];
          for (int f = 0; forward_ && f < kQuad; ++f) __builtin_prefetch(next + e.low[f]);
          for (int f = 0; f < kQuad; ++f)
            to[f] = (from[e.low[f]] | static_cast<uint32_t>(from[e.high[f]]) << 16) & e.live[f];
        }
      }
    }
  }
}

void QuadConv::compute(const Class& c, const Tile& tile, const uint32_t* planes, const uint32_t* weights,
                       const float* start, uint32_t* sums) const {
  const int64_t taps = static_cast<int64_t>(c.tap.size());
  QuadTile quad{planes + tile.first * kQuadLanes, nullptr, c.offset.data(), 0, taps, nullptr, nullptr, nullptr,
                kQuadVectors * kQuadLanes};
  for (int64_t q = 0; q < quads(); ++q) {
    quad.pairs = pairs_.data() + lists_.first[q];
    quad.pair_count = lists_.first[q + 1] - lists_.first[q];
    quad.weights = weights + c.weights + lists_.first[q] * taps * kQuad;
    quad.start = start + q * kQuad;
    quad.y = sums + q * 2 * quad.y_plane;
    kernels_.conv[tile.count](quad);
  }
}

// Calls visit(position in the tile, image of the block, row of the class, its column, pixels) for each stretch of
// results.
template <typename Visit>
void QuadConv::each_run(const Class& c, const Tile& tile, const PixelBlock& block, Visit visit) const {
  const int64_t pitch = planes_.layout().pitch, begin = tile.first * kQuadLanes;
  if (planes_.layout().in_place && c.rows->every == 1 && c.columns->every == 1) {
    const int64_t pixels = block.images * block.rows * pitch - begin;
    return visit(0, 0, 0, begin, std::min(pixels, tile.count * kQuadLanes));
  }
  const int64_t rows = std::min(block.rows, c.rows->count - block.first_row);
  for (int64_t at = begin, next; at < begin + tile.count * kQuadLanes; at = next) {
    const int64_t line = at / pitch, column = at % pitch;
    next = std::min((line + 1) * pitch, begin + tile.count * kQuadLanes);
    const int64_t image = line / planes_.image_rows(), row = line % planes_.image_rows();
    const int64_t pixels = std::min(next - at, c.columns->count - column);
    if (image < block.images && row < rows && pixels > 0) visit(at - begin, image, row, column, pixels);
  }
}

uint16_t* QuadConv::result_pixel(const Class& c, const PixelBlock& block, int64_t image, int64_t row, int64_t column,
                                 uint16_t* result) const {
  const Axis &down = planes_.layout().rows, &across = planes_.layout().columns;
  const int64_t y = c.rows->first + c.rows->every * (block.first_row + row);
  const int64_t x = c.columns->first + c.columns->every * column;
  return result + (((block.image + image) * down.result + y) * across.result + x) * out_.channels;
}

void QuadConv::write(const Class& c, const Tile& tile, const PixelBlock& block, const uint32_t* sums, uint16_t* pixels,
                     uint16_t* result) const {
  const int64_t width = result_pairs() * 2, channels = out_.channels, every = c.columns->every;
  const auto turn = [&](int64_t at, int64_t count, uint16_t* to, int64_t pixel) {
    kernels_.to_pixels(sums + at, kQuadVectors * kQuadLanes, result_pairs(), count, to, pixel);
  };
  const bool in_place =
      writes_in_place_ && planes_.layout().in_place && every == 1;  // rows of a few pixels would waste vectors
  const auto scatter = pixel_kernels().scatter;
  if (!in_place) turn(0, tile.count * kQuadLanes, pixels, width);
  each_run(c, tile, block, [&](int64_t at, int64_t image, int64_t row, int64_t column, int64_t count) {
    uint16_t* const to = result_pixel(c, block, image, row, column, result);
    if (in_place) return turn(at, count, to, channels);
    if (every == 1) return scatter(pixels + at * width, width, out_.bits, to, channels, count);
    for (int64_t i = 0; i < count; ++i)
      scatter(pixels + (at + i) * width, width, out_.bits, to + i * every * channels, channels, 1);
  });
}

void QuadConv::write_zeros(const Class& c, const PixelBlock& block, uint16_t* result) const {
  const int64_t rows = std::min(block.rows, c.rows->count - block.first_row);
  for (int64_t image = 0; image < block.images; ++image)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < c.columns->count; ++column)
        std::memset(result_pixel(c, block, image, row, column, result), 0, out_.channels * sizeof(*result));
}

void QuadConv::run(const uint16_t* operand, const uint32_t* weights, const float* start, uint16_t* result, int64_t task,
                   uint16_t* scratch) const {
  const PixelBlock block = blocks_[task];
  uint16_t* const line = scratch + planes_.elements();
  uint16_t* const pixels = line + planes_.line_elements();
  uint32_t* const sums = reinterpret_cast<uint32_t*>(pixels + result_elements() / 2);
  planes_.pack(operand, block, scratch, line);
  for (const Class& c : classes_) {
    const int64_t rows = std::min(block.rows, c.rows->count - block.first_row);
    if (rows < 1) continue;
    if (c.tap.empty()) {
      write_zeros(c, block, result);
      continue;
    }
    const int64_t positions = planes_.positions({block.image, block.images, block.first_row, rows}, c.columns->count);
    const int64_t vectors = (positions + kQuadLanes - 1) / kQuadLanes;
    const int64_t tiles = (vectors + kQuadVectors - 1) / kQuadVectors;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = vectors * t / tiles, end = vectors * (t + 1) / tiles;
      const Tile tile{first, end - first};
      compute(c, tile, reinterpret_cast<const uint32_t*>(scratch), weights, start, sums);
      write(c, tile, block, sums, pixels, result);
    }
  }
}

}  // namespace prunekernels
