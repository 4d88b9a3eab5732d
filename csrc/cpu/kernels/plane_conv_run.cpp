// What one task of a plane convolution does: pack, compute block after block, unpack, write the zeros.
#include <algorithm>
#include <cstring>

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
  tile.y = &to;
  const int64_t lanes = kernels_.lanes, pitch = layout_.pitch;
  c.grid[rows].each(rows, c.columns->count,
                    [&](int64_t row, int64_t height, int64_t down, int64_t column, int64_t width, int64_t across) {
                      const auto kernel = c.whole    ? kernels_.window_whole[height][width]
                                          : c.window ? kernels_.window[height][width]
                                                     : kernels_.conv_rows[height][width];
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
  for (const Class& c : classes_) {
    const int64_t rows = std::min(pass.rows, c.rows->count - pass.first_row), columns = c.columns->count;
    const int64_t taps = static_cast<int64_t>(c.tap.size());
    int64_t positions = taps ? layout_.positions(rows, columns) : 0;
    if (positions > 0 && lane_axis_ == LaneAxis::pixels) positions += (pass.images - 1) * pass.rows * layout_.pitch;
    ConvTile tile{};
    tile.x = pass.x, tile.weights = weights, tile.start = pass.start ? start : nullptr;
    tile.channels = channels_.data() + block.list.first, tile.channel_count = block.list.count;
    tile.taps = c.offset.data(), tile.tap_count = taps;
    tile.last = lanes;
    for (int i = 0; i < block.filters; ++i)
      y[i] = stores_in_place_ ? pass.result + block.filter[i] * result_pixels() + pass.first_row * layout_.pitch
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
    sums += kMaxFilters * class_floats_;
  }
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
      for (int64_t n = 0; n < pass.images; ++n) {
        const AxisClass& rows = *classes_[first].rows;
        const int64_t count = std::min(pass.rows, rows.count - pass.first_row);
        const auto from = [&](size_t f, int64_t p) {
          const float* sums = pass.sums + (static_cast<int64_t>(first + f) * kMaxFilters + i) * class_floats_;
          return classes_[first + f].tap.empty() ? pass.zeros : sums + (n * pass.rows + p) * pitch;
        };
        float* plane = pass.result + n * pass.result_image + block.filter[i] * result_pixels();
        if (classes_.size() == 1 && pitch == length && layout_.phases > 0) {
          kernels_.copy(from(0, 0), plane + pass.first_row * length, count * length);
          continue;
        }
        for (int64_t p = 0; p < count; ++p) {
          float* row = plane + (rows.first + rows.every * (pass.first_row + p)) * length;
          if (columns == 1)
            kernels_.copy(from(0, p), row, length);
          else if (columns == 2)
            kernels_.merge(from(0, p), from(1, p), row, length);
          else
            for (int64_t q = 0; q < length; ++q) row[q] = from(q % columns, p)[q / columns];
        }
      }
}

std::pair<int64_t, int64_t> PlaneConv::result_rows(const Pass& pass) const {
  const int64_t every = layout_.rows.classes[0].every;
  return {pass.first_row * every, std::min((pass.first_row + pass.rows) * every, layout_.rows.result)};
}

void PlaneConv::unpack_images(const Block& block, const Pass& pass) const {
  const auto [begin, end] = result_rows(pass);
  const int64_t width = layout_.columns.result;
  for (int i = 0; i < block.filters; ++i)
    kernels_.lanes_to_images(pass.sums + i * class_floats_, cells_.data(), (end - begin) * width,
                             pass.result + block.filter[i] * result_pixels() + begin * width, pass.result_image,
                             pass.images);
}

void PlaneConv::write_zeros(int32_t filter, const Pass& pass) const {
  const auto [begin, end] = result_rows(pass);
  const int64_t width = layout_.columns.result;
  float* rows = pass.result + filter * result_pixels() + begin * width;
  for (int n = 0; n < pass.images; ++n)
    std::memset(rows + n * pass.result_image, 0, (end - begin) * width * sizeof(float));
}

void PlaneConv::run(const float* operand, const float* weights, float* result, const float* start, int64_t task,
                    float* scratch) const {
  const int64_t part = task % parts_, row_block = task / parts_ % row_blocks_, group = task / parts_ / row_blocks_;
  const int64_t operand_image = (forward() ? shape_.C : shape_.K) * layout_.rows.operand * layout_.columns.operand;
  const int64_t image = group * group_images_;
  const float* x = operand + image * operand_image;
  float *sums = scratch + planes_.floats(), *lines = sums + sums_floats_, *zeros = lines + planes_.line_floats();
  Pass pass;
  pass.images = static_cast<int>(std::min(group_images_, shape_.N - image));
  pass.first_row = row_block * block_rows_;
  pass.rows = std::min(block_rows_, layout_.rows.longest() - pass.first_row);
  pass.x = planes_.start(x, pass.first_row, scratch);
  pass.weights = weights;
  pass.start = start;
  pass.result_image = (forward() ? shape_.K : shape_.C) * result_pixels();
  pass.result = result + image * pass.result_image;
  pass.sums = sums;
  pass.zeros = zeros;
  std::fill(zeros, zeros + layout_.columns.result, 0.f);
  for (size_t i = 0; i < classes_.size() && lane_axis_ == LaneAxis::images; ++i)
    if (classes_[i].tap.empty()) kernels_.zero(sums + i * kMaxFilters * class_floats_, kMaxFilters * class_floats_);
  if (!planes_.in_place()) planes_.pack(x, operand_image, pass.images, pass.first_row, pass.rows, scratch, lines);
  const auto share = [&](int64_t count, int64_t p) { return count * p / parts_; };
  pass.first = blocks_.data() + share(blocks(), part);
  for (int64_t b = share(blocks(), part); b < share(blocks(), part + 1); ++b) compute(blocks_[b], pass);
  const int64_t dead = static_cast<int64_t>(dead_.size());
  for (int64_t d = share(dead, part); d < share(dead, part + 1); ++d) write_zeros(dead_[d], pass);
}

}  // namespace prunekernels
