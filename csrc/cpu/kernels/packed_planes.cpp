#include "cpu/kernels/packed_planes.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <numeric>

namespace prunekernels {
namespace {

constexpr int64_t kStretchFloats = 128 << 10;  // of whole planes of several groups

}  // namespace

std::vector<int32_t> without_padding(const int32_t* index, int64_t begin, int64_t end) {
  std::vector<int32_t> list;
  std::copy_if(index + begin, index + end, std::back_inserter(list), [](int32_t i) { return i >= 0; });
  return list;
}

int64_t balanced_rows(int64_t rows, int64_t fit, int64_t groups, int64_t threads) {
  fit = std::clamp<int64_t>(fit, 1, rows);
  const int64_t blocks = divide_up(rows, fit), rounds = threads / std::gcd(groups, threads);
  const int64_t fewer = blocks / rounds * rounds, more = fewer + rounds;
  if (blocks == fewer || groups * blocks >= 8 * threads) return divide_up(rows, blocks);
  if (fewer > 0 && divide_up(rows, fewer) * 4 <= fit * 5) return divide_up(rows, fewer);
  const bool even = rows % more == 0 || rows >= 4 * more;
  return divide_up(rows, even ? more : blocks);
}

PackedPlanes::PackedPlanes(PlaneLayout layout, std::vector<int32_t> live, int64_t channels, int64_t images, Lanes lanes,
                           const Microkernels& kernels)
    : layout_(std::move(layout)),
      live_(std::move(live)),
      place_(channels, -1),
      lane_axis_(lanes.axis),
      kernels_(kernels),
      bands_{images, lanes.bands, divide_up(layout_.rows.longest(), lanes.bands)},
      cell_(lanes.axis == LaneAxis::images ? kernels.lanes : 1),
      image_floats_(channels * layout_.rows.operand * layout_.columns.operand) {
  line_floats_ = (layout_.width + kernels.lanes) * layout_.columns.step;
  for (size_t i = 0; i < live_.size(); ++i) place_[live_[i]] = static_cast<int32_t>(i);
}

std::vector<int64_t> PackedPlanes::stretches(int64_t per_group, int64_t most) const {
  const int64_t plane = layout_.phases * (bands_.rows + layout_.extra_rows) * layout_.pitch * cell_;
  const int64_t fit = std::min(most, kStretchFloats / std::max<int64_t>(1, plane));
  const int64_t count = static_cast<int64_t>(live_.size());
  std::vector<int64_t> bounds(1, 0);
  const auto add = [&](int64_t end) {
    const int64_t begin = bounds.back(), parts = divide_up(end - begin, most);
    for (int64_t i = 1; i <= parts; ++i) bounds.push_back(begin + (end - begin) * i / parts);
  };
  int64_t last = 0;  // where a group ended
  for (int64_t i = 1; i <= count; ++i) {
    if (i < count && live_[i] / per_group == live_[i - 1] / per_group) continue;
    if (last > bounds.back() && i - bounds.back() > fit) add(last);
    last = i;
  }
  add(count);
  return bounds;
}

void PackedPlanes::set_block(int64_t rows, int64_t images) {
  const Axis &down = layout_.rows, &across = layout_.columns;
  // The last vector of a tile reads past the plane; what it computes there is thrown away.
  const int64_t slack = lane_axis_ == LaneAxis::images ? 0 : kMaxVectors * kernels_.lanes;
  block_rows_ = rows, block_images_ = images;
  phase_cells_ = divide_up(layout_.phase_floats(images * rows, slack), kernels_.lanes) * kernels_.lanes;
  channel_floats_ = in_place() ? down.operand * across.operand : layout_.phases * phase_cells_ * cell_;
  if (lane_axis_ == LaneAxis::pixels) return;
  const int64_t unread = layout_.phases * phase_cells_;  // the cell that takes pixels which no tap reads
  channel_floats_ += cell_;
  cells_.clear();
  for (int64_t y = 0; y < (rows + layout_.extra_rows) * down.step; ++y)
    for (int64_t x = 0; x < across.operand; ++x) {
      const int64_t right = x - layout_.low_column;
      int64_t cell = unread;
      if (right >= 0 && right < layout_.width * across.step) {
        const int phase = layout_.phase[y % down.step * across.step + right % across.step];
        if (phase >= 0) cell = phase * phase_cells_ + y / down.step * layout_.pitch + right / across.step;
      }
      cells_.push_back(static_cast<int32_t>(cell));
    }
}

// Copies one row into its phases of a packed plane, `at` floats into each. A null row is a row of padding.
void PackedPlanes::pack_row(const float* row, const int* phase, float* plane, int64_t at, float* lines) const {
  const Axis& columns = layout_.columns;
  const int64_t steps = columns.step, length = layout_.width * steps;
  float* line = steps == 1 ? plane + phase[0] * phase_cells_ + at : lines;
  const int64_t begin = std::clamp<int64_t>(-layout_.low_column, 0, length);
  const int64_t end = row ? std::clamp<int64_t>(columns.operand - layout_.low_column, begin, length) : begin;
  kernels_.zero(line, begin);
  if (end > begin) kernels_.copy(row + layout_.low_column + begin, line + begin, end - begin);
  kernels_.zero(line + end, length - end);
  if (steps == 1) return;
  const auto to = [&](int64_t f) { return phase[f] < 0 ? lines + line_floats_ : plane + phase[f] * phase_cells_ + at; };
  if (steps == 2) return kernels_.split(line, to(0), to(1), length);
  for (int64_t f = 0; f < steps; ++f)
    for (int64_t m = 0; phase[f] >= 0 && m < layout_.width; ++m) to(f)[m] = line[m * steps + f];
}

void PackedPlanes::pack_pixels(const float* plane, const PlaneBlock& block, float* to, float* lines) const {
  const Axis &down = layout_.rows, &across = layout_.columns;
  const int64_t first_row = block.first_row, rows = block.rows, packed_rows = rows + layout_.extra_rows;
  const int64_t used = (block.count * packed_rows - 1) * layout_.pitch + layout_.width;
  if (layout_.in_place) {
    for (int64_t n = 0; n < block.count; ++n)
      kernels_.copy(plane + n * image_floats_ + first_row * layout_.pitch, to + n * rows * layout_.pitch,
                    rows * layout_.pitch);
    return kernels_.zero(to + used, phase_cells_ - used);
  }
  for (int64_t f = 0; f < down.step; ++f) {
    const int* phase = &layout_.phase[f * across.step];
    if (std::all_of(phase, phase + across.step, [](int p) { return p < 0; })) continue;
    for (int64_t n = 0; n < block.count; ++n)
      for (int64_t u = 0; u < packed_rows; ++u) {
        const int64_t y = operand_row(first_row, u, f);
        const float* row = y >= 0 && y < down.operand ? plane + n * image_floats_ + y * across.operand : nullptr;
        pack_row(row, phase, to, (n * packed_rows + u) * layout_.pitch, lines);
      }
  }
  for (int p = 0; p < layout_.phases; ++p) kernels_.zero(to + p * phase_cells_ + used, phase_cells_ - used);
}

void PackedPlanes::pad(int64_t channels, float* packed) const {
  if (lane_axis_ == LaneAxis::pixels) return;
  const Axis &down = layout_.rows, &across = layout_.columns;
  const int64_t width = layout_.width, rows = block_rows_ + layout_.extra_rows;
  for (int64_t g = 0; g < across.step; ++g) {
    const int64_t begin = std::clamp<int64_t>(divide_up(-layout_.low_column - g, across.step), 0, width);
    const int64_t end =
        std::clamp<int64_t>(divide_up(across.operand - layout_.low_column - g, across.step), begin, width);
    for (int64_t f = 0; f < down.step; ++f) {
      const int phase = layout_.phase[f * across.step + g];
      if (phase < 0) continue;
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t u = 0; u < rows; ++u) {
          float* row = packed + c * channel_floats_ + (phase * phase_cells_ + u * layout_.pitch) * cell_;
          kernels_.zero(row, begin * cell_);
          kernels_.zero(row + end * cell_, (width - end) * cell_);
        }
    }
  }
}

// Packs the operand's rows fresh..all of the block; runs begin with the first of them.
void PackedPlanes::pack_images(const float* plane, const LaneRuns& runs, int64_t fresh, int64_t all, int64_t ahead,
                               float* to) const {
  const Axis &down = layout_.rows, &across = layout_.columns;
  const auto zero = [&](int64_t y) {  // a row of padding
    for (int64_t g = 0; g < across.step; ++g)
      if (const int phase = layout_.phase[y % down.step * across.step + g]; phase >= 0)
        kernels_.zero(to + (phase * phase_cells_ + y / down.step * layout_.pitch) * cell_, layout_.width * cell_);
  };
  const int64_t columns = across.operand;
  for (int64_t y = fresh; y < all && (y - fresh) * columns < runs.any_begin; ++y) zero(y);
  for (int64_t y = fresh + divide_up(runs.any_end, columns); y < all; ++y) zero(y);
  kernels_.images_to_lanes(plane, runs, &cells_[fresh * columns], to, ahead);
}

void PackedPlanes::pack(const float* operand, const PlaneBlock& block, bool follows, float* packed,
                        float* lines) const {
  const Axis &down = layout_.rows, &across = layout_.columns;
  const int64_t pixels = down.operand * across.operand;
  if (lane_axis_ == LaneAxis::pixels) {
    for (int64_t place = block.place; place < block.end_place; ++place, packed += channel_floats_)
      pack_pixels(operand + block.first * image_floats_ + live_[place] * pixels, block, packed, lines);
    return;
  }
  const int64_t reach = down.highest_tap() - layout_.low_row + 1;  // rows that one row of outputs reads
  const int64_t fresh = follows ? std::max<int64_t>(0, reach - down.step) : 0;
  const int64_t all = (block.rows - 1) * down.step + reach, top = layout_.low_row + block.first_row * down.step;
  const LaneRuns runs = bands_.runs(block.first, block.count, down.step, top + fresh, top + all, down.operand,
                                    across.operand, image_floats_, kernels_.lanes);
  const int64_t kept = ((layout_.extra_rows - 1) * layout_.pitch + layout_.width) * cell_;
  for (int64_t place = block.place; place < block.end_place; ++place, packed += channel_floats_) {
    for (int p = 0; fresh > 0 && p < layout_.phases; ++p) {
      float* phase = packed + p * phase_cells_ * cell_;
      std::memmove(phase, phase + block_rows_ * layout_.pitch * cell_, kept * sizeof(float));
    }
    const int64_t next = place + 1 < block.end_place ? live_[place + 1] - live_[place] : 0;
    pack_images(operand + live_[place] * pixels, runs, fresh, all, next * pixels, packed);
  }
}

}  // namespace prunekernels
