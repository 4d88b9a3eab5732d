// How a plane convolution is cut into blocks of rows, lists and packed weights; plane_conv_run.cpp runs it.
#include "cpu/kernels/plane_conv.h"

#include <algorithm>

namespace prunekernels {
namespace {

// Limits of a block of rows.
constexpr int64_t kPackedFloats = 256 << 10;  // a good part of L2
constexpr int64_t kPositions = 8 << 10;       // the sums of 8 filters stay in L2 beside it

PlaneLayout plane_layout(PlaneConv::Direction direction, const ConvShape& s) {
  if (direction == PlaneConv::kForward) return {forward_axis(s, 0), forward_axis(s, 1)};
  return {grad_input_axis(s, 0), grad_input_axis(s, 1)};
}

std::vector<int32_t> operands(PlaneConv::Direction direction, const MaskTable& mask) {
  return direction == PlaneConv::kForward ? without_padding(mask.in_index(), 0, mask.in_count())
                                          : without_padding(mask.out_index(), 0, mask.out_count());
}

// Clock cycles of one step of a tile: a cycle does two multiply-adds and two loads; the next step has to wait four
// cycles for the sums of this one.
double step_cycles(int filters, int64_t vectors) {
  return std::max({4.0, filters * vectors / 2.0, (filters + vectors) / 2.0}) + 0.5;
}

double run_cycles(const Microkernels& kernels, int filters, int64_t vectors) {
  const int64_t tiles = divide_up(vectors, kernels.conv_vectors[filters]), whole = vectors % tiles;
  return whole * step_cycles(filters, vectors / tiles + 1) + (tiles - whole) * step_cycles(filters, vectors / tiles);
}

}  // namespace

PlaneConv::PlaneConv(Direction direction, const ConvShape& shape, const MaskTable& mask, bool shared,
                     LaneAxis lane_axis, int64_t threads)
    : direction_(direction),
      shared_(shared),
      shape_(shape),
      mask_(mask),
      lane_axis_(lane_axis),
      kernels_(microkernels()),
      planes_(plane_layout(direction, shape), operands(direction, mask), direction == kForward ? shape.C : shape.K,
              lane_axis, kernels_),
      layout_(planes_.layout()),
      group_images_(lane_axis == LaneAxis::images ? kernels_.lanes : images_that_fit(threads)),
      groups_(divide_up(shape.N, group_images_)) {
  const int32_t* slot = forward() ? mask.out_slot() : mask.in_slot();
  const int64_t filters = forward() ? shape.K : shape.C;
  for (int32_t f = 0; f < filters; ++f)
    if (slot[f] < 0) dead_.push_back(f);
  cut_rows(threads);
  for (const AxisClass& rows : layout_.rows.classes)
    for (const AxisClass& columns : layout_.columns.classes) {
      Class c{};
      c.rows = &rows, c.columns = &columns;
      add_taps(c);
      find_window(c);
      for (int i = 1; i <= kMaxFilters; ++i) c.by_row[i] = pays_by_row(columns, i);
      if (!c.tap.empty() && lane_axis_ == LaneAxis::images)
        for (int64_t r = 0; r <= block_rows_; ++r) c.grid.push_back(grid_of(c, r));
      classes_.push_back(c);
    }
  if (shared)
    for (int64_t g = 0; g < mask[kLiveGroups]; ++g) add_shared(g);
  else
    add_own();
  int64_t taps = 0;
  for (const Class& c : classes_) taps += static_cast<int64_t>(c.tap.size());
  for (Block& b : blocks_) {
    b.weight = weight_floats_;
    weight_floats_ += b.list.count * b.filters * taps;
  }
}

// Sorted by offset: in the input gradient that is the kernel turned round.
void PlaneConv::add_taps(Class& c) const {
  std::vector<std::pair<int32_t, int32_t>> taps;
  for (const Tap& r : c.rows->taps)
    for (const Tap& s : c.columns->taps)
      taps.emplace_back(static_cast<int32_t>(planes_.tap_offset(r, s)),
                        static_cast<int32_t>(r.index * shape_.S + s.index));
  std::sort(taps.begin(), taps.end());
  for (const auto& [offset, tap] : taps) c.offset.push_back(offset), c.tap.push_back(tap);
}

void PlaneConv::find_window(Class& c) const {
  const int64_t H = layout_.rows.operand, W = layout_.columns.operand;
  c.window =
      lane_axis_ == LaneAxis::images && c.offset.size() == 9 && c.rows->taps.size() == 3 && kernels_.window[1][1];
  for (int64_t t = 0; c.window && t < 9; ++t)
    c.window = c.offset[t] == (t / 3 * layout_.pitch + t % 3) * kernels_.lanes;
  const bool around = layout_.low_row == -1 && layout_.low_column == -1 && c.rows->count == H && c.columns->count == W;
  c.whole = c.window && around && row_blocks_ == 1 && H <= kMaxRows && W <= kMaxRows && kernels_.window_whole[H][W];
}

bool PlaneConv::pays_by_row(const AxisClass& columns, int filters) const {
  if (lane_axis_ == LaneAxis::pixels || !kernels_.conv_vectors[filters]) return false;
  return block_rows_ * run_cycles(kernels_, filters, columns.count) <=
         run_cycles(kernels_, filters, layout_.positions(block_rows_, columns.count));
}

TileGrid PlaneConv::grid_of(const Class& c, int64_t rows) const {
  const auto span = [](const std::vector<Tap>& taps) {
    int64_t low = taps.front().at, high = low;
    for (const Tap& t : taps) low = std::min(low, t.at), high = std::max(high, t.at);
    return high - low;
  };
  const int64_t columns = c.columns->count, over = span(c.rows->taps), beside = span(c.columns->taps);
  const int64_t taps = static_cast<int64_t>(c.tap.size());
  if (c.whole) return {1, 1};
  if (c.window)
    return best_grid(rows, columns, over, beside, taps, kMaxRows, kMaxWindowVectors,
                     [&](int64_t height, int64_t width) { return kernels_.window[height][width] != nullptr; });
  return best_grid(rows, columns, over, beside, taps, kMaxRows, kernels_.most_row_vectors,
                   [&](int64_t height, int64_t width) { return height * width <= kernels_.rows_vectors; });
}

// LaneAxis::pixels: planes without gaps whose size is no multiple of a vector are joined, several images to one plane.
int64_t PlaneConv::images_that_fit(int64_t threads) const {
  const int64_t pixels = layout_.rows.longest() * layout_.columns.longest();
  if (!layout_.gapless() || pixels % kernels_.lanes == 0 || shape_.N <= threads) return 1;
  const int64_t floats = pixels * std::max<int64_t>(1, static_cast<int64_t>(planes_.live().size()) * layout_.phases);
  const int64_t fit = std::max<int64_t>(1, std::min(kPackedFloats / floats, kPositions / pixels));
  return divide_up(shape_.N, divide_up(divide_up(shape_.N, fit), threads) * threads);
}

// Cuts the planes into blocks of rows that fit into L2, and into enough tasks for the threads.
void PlaneConv::cut_rows(int64_t threads) {
  const int64_t rows = layout_.rows.longest(), live = static_cast<int64_t>(planes_.live().size());
  const int64_t pitch = layout_.pitch * planes_.cell(),
                row_floats = std::max<int64_t>(1, live * layout_.phases * pitch);
  const int64_t halo = row_floats * layout_.extra_rows;
  const int64_t fit = std::min(std::max(kPackedFloats - halo, halo) / row_floats, kPositions / pitch);
  block_rows_ = balanced_rows(rows, fit, groups_, threads);
  row_blocks_ = divide_up(rows, block_rows_);
  const bool joined = lane_axis_ == LaneAxis::pixels && group_images_ > 1;
  if (joined) row_blocks_ = 1, block_rows_ = rows;
  parts_ = divide_up(threads, groups_ * row_blocks_);

  planes_.set_block(block_rows_, joined ? group_images_ : 1);
  const auto &row_classes = layout_.rows.classes, &column_classes = layout_.columns.classes;
  const int64_t classes = static_cast<int64_t>(row_classes.size() * column_classes.size());
  const int64_t slack = lane_axis_ == LaneAxis::images ? 0 : kMaxVectors * kernels_.lanes;
  stores_in_place_ = lane_axis_ == LaneAxis::pixels && !joined && classes == 1 &&
                     layout_.pitch == layout_.columns.result && layout_.phases > 0;
  const int64_t class_cells =
      layout_.positions(block_rows_ * (joined ? group_images_ : 1), layout_.columns.longest()) + slack;
  class_floats_ = class_cells * planes_.cell();
  sums_floats_ = stores_in_place_ ? 0 : kMaxFilters * classes * class_floats_;
  if (lane_axis_ == LaneAxis::pixels) return;
  const int64_t every = row_classes[0].every;
  for (int64_t y = 0; y < block_rows_ * every; ++y)
    for (int64_t x = 0; x < layout_.columns.result; ++x) {
      const int64_t down = every, across = column_classes[0].every;
      const int64_t place = y % down * static_cast<int64_t>(column_classes.size()) + x % across;
      cells_.push_back(static_cast<int32_t>(place * kMaxFilters * class_cells + y / down * layout_.pitch + x / across));
    }
}

PlaneConv::List PlaneConv::add_list(const std::vector<int32_t>& operands) {
  const List list{static_cast<int64_t>(operands_.size()), static_cast<int64_t>(operands.size())};
  for (const int32_t operand : operands) {
    operands_.push_back(operand);
    channels_.push_back(static_cast<int32_t>(planes_.channel_offset(planes_.place(operand))));
  }
  return list;
}

void PlaneConv::add_shared(int64_t group) {
  const auto outs = without_padding(mask_.out_index(), group * mask_[kOutPerGroup], (group + 1) * mask_[kOutPerGroup]);
  const auto ins = without_padding(mask_.in_index(), group * mask_[kInPerGroup], (group + 1) * mask_[kInPerGroup]);
  const std::vector<int32_t>& filters = forward() ? outs : ins;
  const List list = add_list(forward() ? ins : outs);
  const int64_t count = static_cast<int64_t>(filters.size()), blocks = divide_up(count, kernels_.most_filters);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = count * b / blocks, end = count * (b + 1) / blocks;
    Block block{static_cast<int>(end - begin), {}, list, 0};
    std::copy_n(filters.data() + begin, block.filters, block.filter);
    blocks_.push_back(block);
  }
}

void PlaneConv::add_own() {
  const int64_t Cg = shape_.channels_per_group(), Kg = shape_.K / shape_.G;
  std::vector<std::vector<int32_t>> lists(forward() ? shape_.K : shape_.C);
  for (int32_t k = 0; k < shape_.K; ++k)
    mask_.each_live_channel(k, [&](int64_t c) {
      const int32_t channel = static_cast<int32_t>(k / Kg * Cg + c);
      lists[forward() ? k : channel].push_back(forward() ? channel : k);
    });
  for (size_t f = 0; f < lists.size(); ++f)
    if (!lists[f].empty()) blocks_.push_back({1, {static_cast<int32_t>(f)}, add_list(lists[f]), 0});
}

void PlaneConv::pack_weights(const float* weight, const WeightLayout& layout, float* packed, int64_t begin,
                             int64_t end) const {
  for (int64_t b = begin; b < end; ++b) pack_block(blocks_[b], weight, layout, packed + blocks_[b].weight);
}

void PlaneConv::pack_block(const Block& block, const float* weight, const WeightLayout& layout, float* to) const {
  const int64_t Cg = shape_.channels_per_group();
  const auto filter_at = [&](int64_t k) { return k * layout.row; };
  const auto channel_at = [&](int64_t c) { return c % Cg * layout.channel; };
  const int32_t* operands = operands_.data() + block.list.first;
  int64_t at[kMaxFilters];
  for (int i = 0; i < block.filters; ++i) at[i] = forward() ? filter_at(block.filter[i]) : channel_at(block.filter[i]);
  for (const Class& c : classes_) {
    const int64_t taps = static_cast<int64_t>(c.tap.size());
    if (!shared_ && layout.tap == 1 && shape_.G == 1) {
      kernels_.pack_list(weight + at[0], forward() ? layout.channel : layout.row, shape_.taps(), operands,
                         block.list.count, c.tap.data(), taps, to);
      to += block.list.count * taps;
      continue;
    }
    for (int64_t j = 0; j < block.list.count; ++j) {
      const int32_t operand = operands[j];
      const float* kernels = weight + (forward() ? channel_at(operand) : filter_at(operand));
      const auto live = [&](int i) {
        return forward() ? mask_.pair(block.filter[i], operand % Cg) : mask_.pair(operand, block.filter[i] % Cg);
      };
      for (const int32_t r : c.tap) {
        const float* tap = kernels + r * layout.tap;
        if (!shared_ || mask_[kPairsFull])
          for (int i = 0; i < block.filters; ++i) *to++ = tap[at[i]];
        else
          for (int i = 0; i < block.filters; ++i) *to++ = live(i) ? tap[at[i]] : 0.f;
      }
    }
  }
}

}  // namespace prunekernels
