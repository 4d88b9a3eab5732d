// What one task of a plane convolution does: pack, compute block after block, unpack, write the zeros.
#include <algorithm>
#include <cstring>
#include <tuple>

#include "cpu/kernels/plane_conv.h"

namespace prunekernels {
namespace {

void prefetch_next(const ConvTile& tile, int64_t floats, int64_t lanes) {
  for (int64_t c = 0; c < tile.channel_count; ++c)
    for (int64_t p = 0; p < floats; p += lanes) __builtin_prefetch(tile.x + tile.channels[c] + floats + p);
}

}  // namespace

// Computes `vectors` vectors of positions from tile.x on, in tiles of about equal size. y: [filters], where the results
// of each begin.
void PlaneConv::tiles(const Block& block, const ConvTile& tile, int64_t vectors, float* const* y, bool prefetch) const {
  const int64_t tiles = divide_up(vectors, kernels_.conv_vectors[block.filters]);
  float* to[kMaxFilters];
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = vectors * t / tiles, count = vectors * (t + 1) / tiles - first;
    for (int i = 0; i < block.filters; ++i) to[i] = y[i] + first * kernels_.lanes;
    ConvTile here = tile;
    here.x += first * kernels_.lanes;
    here.y = to;
    if (prefetch && t + 1 < tiles) prefetch_next(here, count * kernels_.lanes, kernels_.lanes);
    const bool part = t + 1 == tiles && tile.last < kernels_.lanes;
    (part ? kernels_.conv_part : kernels_.conv)[block.filters][count](here);
  }
}

// Computes all rows of one filter, in tiles of several rows.
void PlaneConv::own_tiles(ConvTile tile, const Class& c, int64_t rows, float* y) const {
  const float* x = tile.x;
  float* to;
  tile.x_row = tile.y_row = layout_.pitch * kernels_.lanes;
  tile.x_phase = planes_.phase_floats(), tile.y_class = class_floats_;
  tile.y = &to;
  const int64_t lanes = kernels_.lanes, pitch = layout_.pitch;
  c.grid[rows].each(rows, c.columns->count,
                    [&](int64_t row, int64_t height, int64_t down, int64_t column, int64_t width, int64_t across) {
                      const auto kernel = own_kernel(c, height, width);
                      for (int64_t i = 0; i < down; ++i)
                        for (int64_t j = 0; j < across; ++j) {
                          const int64_t at = ((row + i * height) * pitch + column + j * width) * lanes;
                          tile.x = x + at, to = y + at;
                          kernel(tile);
                        }
                    });
}

void PlaneConv::compute(const Block& block, const Pass& pass) const {
  const float* weights = pass.weights + block.weight;
  const int lanes = kernels_.lanes;
  float start[kMaxFilters], *y[kMaxFilters];
  for (int i = 0; i < block.filters; ++i) start[i] = pass.start ? pass.start[block.filter[i]] : 0.f;
  float* sums = pass.sums;
  const int64_t skipped = chunks_ > 1 ? cuts_[block.cuts + pass.chunk] : 0,
                count = chunks_ > 1 ? cuts_[block.cuts + pass.chunk + 1] - skipped : block.list.count;
  if (count == 0 && pass.chunk > 0 && pass.chunk + 1 < chunks_) return;
  for (const Class& c : classes_) {
    // Of bands, the last one is shorter; what is computed below it is not written.
    const bool bands = planes_.bands().bands > 1;
    const int64_t rows = bands ? pass.in.rows : std::min(pass.in.rows, c.rows->count - pass.in.first_row);
    const int64_t columns = c.columns->count;
    const int64_t taps = static_cast<int64_t>(c.tap.size());
    int64_t positions = taps ? layout_.positions(rows, columns) : 0;
    if (positions > 0 && lane_axis_ == LaneAxis::pixels)
      positions += (pass.in.count - 1) * pass.in.rows * layout_.pitch;
    ConvTile tile{};
    tile.x = pass.x, tile.weights = weights + skipped * taps * block.filters;
    tile.start = pass.start ? start : nullptr, tile.adds = pass.chunk > 0;
    tile.channels = channels_.data() + block.list.first + skipped, tile.channel_count = count;
    tile.taps = c.offset.data(), tile.tap_count = taps;
    tile.last = lanes;
    for (int i = 0; i < block.filters; ++i)
      y[i] = stores_in_place_ ? pass.result + block.filter[i] * result_pixels() + pass.in.first_row * layout_.pitch
                              : sums + i * class_floats_;
    if (positions < 1) {
    } else if (lane_axis_ == LaneAxis::pixels) {
      const int64_t vectors = divide_up(positions, lanes);
      if (planes_.in_place() || stores_in_place_) tile.last = static_cast<int>(positions - (vectors - 1) * lanes);
      tiles(block, tile, vectors, y, planes_.in_place() && &block == pass.first);
    } else if (block.filters == 1) {
      own_tiles(tile, c, rows, y[0]);
    } else if (!c.by_row[block.filters]) {
      tiles(block, tile, positions, y, false);
    } else {
      for (int64_t p = 0; p < rows; ++p) {
        tiles(block, tile, columns, y, false);
        tile.x += layout_.pitch * lanes;
        for (int i = 0; i < block.filters; ++i) y[i] += layout_.pitch * lanes;
      }
    }
    weights += block.list.count * taps * block.filters;
    sums += list_filters_ * class_floats_;
  }
  if (pass.chunk + 1 < chunks_) return;
  if (lane_axis_ == LaneAxis::images)
    unpack_images(block, pass);
  else if (!stores_in_place_)
    unpack_pixels(block, pass);
}

// Copies the sums of all classes into rows of the result and leaves out the garbage between rows.
void PlaneConv::unpack_pixels(const Block& block, const Pass& pass) const {
  const size_t columns = layout_.columns.classes.size();
  const int64_t length = layout_.columns.result, pitch = layout_.pitch;
  for (int i = 0; i < block.filters; ++i)
    for (size_t first = 0; first < classes_.size(); first += columns)
      for (int64_t n = 0; n < pass.in.count; ++n) {
        const AxisClass& rows = *classes_[first].rows;
        const int64_t first_row = pass.in.first_row, count = std::min(pass.in.rows, rows.count - first_row);
        const auto from = [&](size_t f, int64_t p) {
          const float* sums = pass.sums + (static_cast<int64_t>(first + f) * list_filters_ + i) * class_floats_;
          return classes_[first + f].tap.empty() ? pass.zeros : sums + (n * pass.in.rows + p) * pitch;
        };
        float* plane = pass.result + n * pass.result_image + block.filter[i] * result_pixels();
        if (classes_.size() == 1 && pitch == length && layout_.phases > 0) {
          kernels_.copy(from(0, 0), plane + first_row * length, count * length);
          continue;
        }
        for (int64_t p = 0; p < count; ++p) {
          float* row = plane + (rows.first + rows.every * (first_row + p)) * length;
          if (columns == 1)
            kernels_.copy(from(0, p), row, length);
          else if (columns == 2)
            kernels_.merge(from(0, p), from(1, p), row, length);
          else
            for (int64_t q = 0; q < length; ++q) row[q] = from(q % columns, p)[q / columns];
        }
      }
}

void PlaneConv::unpack_images(const Block& block, const Pass& pass) const {
  for (int i = 0; i < block.filters; ++i) {
    const int32_t filter = block.filter[i], next = i + 1 < block.filters     ? block.filter[i + 1]
                                                   : &block + 1 != pass.last ? (&block + 1)->filter[0]
                                                                             : filter;
    kernels_.lanes_to_images(pass.sums + i * class_floats_, cells_.data(), pass.result + filter * result_pixels(),
                             pass.out, (next - filter) * result_pixels());
  }
}

void PlaneConv::write_zeros(int32_t filter, const Pass& pass) const {
  float* plane = pass.result + filter * result_pixels();
  for (int n = 0; n < pass.in.count; ++n)
    if (lane_axis_ == LaneAxis::images) {
      std::memset(plane + pass.out.at[n], 0, pass.out.end[n] * sizeof(float));
    } else {
      const int64_t every = layout_.rows.classes[0].every, begin = pass.in.first_row * every;
      const int64_t end = std::min(begin + pass.in.rows * every, layout_.rows.result), width = layout_.columns.result;
      std::memset(plane + n * pass.result_image + begin * width, 0, (end - begin) * width * sizeof(float));
    }
}

void PlaneConv::run(const float* operand, const float* weights, float* result, const float* start, int64_t begin,
                    int64_t end, float* scratch) const {
  Pass pass{};
  pass.weights = weights;
  pass.start = start;
  pass.result_image = (forward() ? shape_.K : shape_.C) * result_pixels();
  pass.sums = scratch + planes_.floats(divide_up(most_channels_, chunks_));
  float *lines = pass.sums + sums_blocks_ * block_sums_, *zeros = lines + planes_.line_floats();
  std::fill(zeros, zeros + layout_.columns.result, 0.f);
  pass.zeros = zeros;
  const int64_t class_sums = list_filters_ * class_floats_;
  for (size_t i = 0; i < classes_.size() && lane_axis_ == LaneAxis::images; ++i)
    for (int64_t b = 0; classes_[i].tap.empty() && b < sums_blocks_; ++b)
      kernels_.zero(pass.sums + b * block_sums_ + static_cast<int64_t>(i) * class_sums, class_sums);
  planes_.pad(divide_up(most_channels_, chunks_), scratch);
  for (int64_t task = begin; task < end; ++task) run_task(operand, result, task, task > begin, pass, scratch, lines);
}

// follows: the task before has left its packed planes.
void PlaneConv::run_task(const float* operand, float* result, int64_t task, bool follows, Pass pass, float* packed,
                         float* lines) const {
  const int64_t part = task % parts_, row_block = task / parts_ % row_blocks_, outer = task / parts_ / row_blocks_;
  const int64_t stretch = outer % stretches(), first = outer / stretches() * group_images_;
  const Stretch& s = stretches_[stretch];
  pass.in = {first,
             static_cast<int>(std::min(group_images_, planes_.bands().units() - first)),
             row_block * block_rows_,
             0,
             s.place,
             s.end_place};
  pass.in.rows = std::min(block_rows_, planes_.bands().rows - pass.in.first_row);
  const int64_t operand_image = (forward() ? shape_.C : shape_.K) * layout_.rows.operand * layout_.columns.operand;
  pass.x = planes_.start(operand + first * operand_image, pass.in.first_row, packed);
  pass.result = result;
  if (lane_axis_ == LaneAxis::images) {
    const int64_t every = layout_.rows.classes[0].every;
    pass.out = planes_.bands().runs(first, pass.in.count, every, pass.in.first_row * every,
                                    (pass.in.first_row + pass.in.rows) * every, layout_.rows.result,
                                    layout_.columns.result, pass.result_image, kernels_.lanes);
  } else {
    pass.result += first * pass.result_image;
  }
  const auto share = [](int64_t count, int64_t p, int64_t parts) { return count * p / parts; };
  const int64_t count = s.end_block - s.block;
  const Block *begin = blocks_.data() + s.block + share(count, part, parts_),
              *end = blocks_.data() + s.block + share(count, part + 1, parts_);
  pass.first = begin, pass.last = end;
  float* const sums = pass.sums;
  for (pass.chunk = 0; pass.chunk < chunks_; ++pass.chunk) {
    std::tie(pass.in.place, pass.in.end_place) = chunk(s, pass.chunk);
    const bool packed_before = follows && part > 0 && chunks_ == 1;
    if (!planes_.in_place() && !packed_before)
      planes_.pack(operand, pass.in, follows && row_block > 0 && chunks_ == 1, packed, lines);
    for (const Block* b = begin; b < end; ++b) {
      if (chunks_ > 1) pass.sums = sums + (b - begin) * block_sums_;
      compute(*b, pass);
    }
  }
  const int64_t dead = static_cast<int64_t>(dead_.size()), parts = stretches() * parts_, own = stretch * parts_ + part;
  for (int64_t d = share(dead, own, parts); d < share(dead, own + 1, parts); ++d) write_zeros(dead_[d], pass);
}

}  // namespace prunekernels
