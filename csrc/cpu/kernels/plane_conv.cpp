// How a plane convolution is cut into blocks of rows, lists and packed weights; plane_conv_run.cpp runs it.
#include "cpu/kernels/plane_conv.h"

#include <algorithm>
#include <utility>

namespace prunekernels {
namespace {

// Limits of a block of rows.
constexpr int64_t kPackedFloats = 256 << 10;  // a good part of L2
constexpr int64_t kPositions = 8 << 10;       // the sums of 8 filters stay in L2 beside it
// Where not even kFewRows rows fit (with kManyChannels, into kTightFloats), channels are cut into chunks of which
// kChunkRows rows do. The sums then wait in memory, which costs least if each chunk has many channels.
constexpr int64_t kFewRows = 2, kTightFloats = 192 << 10, kManyChannels = 128;
constexpr int64_t kChunkRows = 4, kChunkFloats = 144 << 10;

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

PlaneConv::PlaneConv(Direction direction, const ConvShape& shape, const MaskTable& mask, bool shared, Lanes lanes,
                     int64_t threads)
    : direction_(direction),
      shared_(shared),
      shape_(shape),
      mask_(mask),
      lane_axis_(lanes.axis),
      kernels_(microkernels()),
      planes_(plane_layout(direction, shape), operands(direction, mask), direction == kForward ? shape.C : shape.K,
              shape.N, lanes, kernels_),
      layout_(planes_.layout()) {
  const std::vector<int64_t> bounds =
      planes_.stretches(forward() ? shape.channels_per_group() : shape.K / shape.G, shape.C + shape.K);
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    stretches_.push_back({bounds[i], bounds[i + 1], 0, 0});
    most_channels_ = std::max(most_channels_, bounds[i + 1] - bounds[i]);
  }
  group_images_ = lane_axis_ == LaneAxis::images ? kernels_.lanes : images_that_fit(threads);
  groups_ = divide_up(planes_.bands().units(), group_images_);
  const int32_t* slot = forward() ? mask.out_slot() : mask.in_slot();
  const int64_t filters = forward() ? shape.K : shape.C;
  for (int32_t f = 0; f < filters; ++f)
    if (slot[f] < 0) dead_.push_back(f);
  cut_rows(threads);
  add_classes();
  if (shared)
    for (int64_t g = 0; g < mask[kLiveGroups]; ++g) add_shared(g);
  else
    add_own();
  find_channels();
  share_blocks();
  cut_lists();
  int64_t taps = 0;
  for (const Class& c : classes_) taps += static_cast<int64_t>(c.tap.size());
  for (Block& b : blocks_) {
    b.weight = weight_floats_;
    weight_floats_ += b.list.count * b.filters * taps;
  }
}

void PlaneConv::add_classes() {
  for (const AxisClass& rows : layout_.rows.classes)
    for (const AxisClass& columns : layout_.columns.classes) {
      Class c{};
      c.rows = &rows, c.columns = &columns;
      if (turns_window()) {
        c.window = Window::turned;
        for (int32_t t = 0; t < 9; ++t) c.tap.push_back(t);
      } else {
        add_taps(c);
        find_window(c);
      }
      for (int i = 1; i <= kMaxFilters; ++i) c.by_row[i] = pays_by_row(columns, i);
      if (!c.tap.empty() && lane_axis_ == LaneAxis::images)
        for (int64_t r = 0; r <= block_rows_; ++r) c.grid.push_back(grid_of(c, r));
      classes_.push_back(c);
      if (turns_window()) return;
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

// Whether the four classes of results, of even and odd rows and columns, are computed as one. Padding 1 alone gives
// each the taps that microkernels_window.h expects.
bool PlaneConv::turns_window() const {
  const ConvShape& s = shape_;
  bool fits = direction_ == kGradInput && !shared_ && lane_axis_ == LaneAxis::images && kernels_.window_turned[1][1];
  for (int axis = 0; axis < 2; ++axis)
    fits = fits && (axis ? s.S : s.R) == 3 && s.stride[axis] == 2 && s.padding[axis] == 1 && s.dilation[axis] == 1 &&
           (axis ? s.W : s.H) > 1;
  return fits;
}

void PlaneConv::find_window(Class& c) const {
  const int64_t H = layout_.rows.operand, W = layout_.columns.operand, lanes = kernels_.lanes;
  const int64_t step = layout_.rows.step;
  c.window = Window::none;
  if (lane_axis_ == LaneAxis::pixels || c.tap.size() != 9 || c.rows->taps.size() != 3 || layout_.columns.step != step ||
      step > 2 || !kernels_.window[1][1])
    return;
  std::vector<int32_t> tap, offset;
  for (int64_t t = 0; t < 9; ++t) {
    const int64_t row = t / 3, column = t % 3, phase = row % step * step + column % step;
    const int64_t place = phase * planes_.phase_floats() + (row / step * layout_.pitch + column / step) * lanes;
    const auto found = std::find(c.offset.begin(), c.offset.end(), place);
    if (found == c.offset.end()) return;
    offset.push_back(*found), tap.push_back(c.tap[found - c.offset.begin()]);
  }
  c.offset = offset, c.tap = tap;
  const bool around = layout_.low_row == -1 && layout_.low_column == -1 && c.rows->count == H && c.columns->count == W;
  const bool whole = step == 1 && around && row_blocks_ == 1 && planes_.bands().bands == 1 && H <= kMaxRows &&
                     W <= kMaxRows && kernels_.window_whole[H][W];
  c.window = whole ? Window::whole : step == 2 ? Window::step2 : Window::step1;
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
  const int64_t columns = c.columns->count, taps = static_cast<int64_t>(c.tap.size());
  const auto has = [&](int64_t height, int64_t width) { return own_kernel(c, height, width) != nullptr; };
  switch (c.window) {
    case Window::none:
      return best_grid(rows, columns, span(c.rows->taps), span(c.columns->taps), taps, kMaxRows,
                       kernels_.most_row_vectors, has);
    case Window::whole:
      return {1, 1};
    case Window::step1:
      return best_grid(rows, columns, 2, 2, taps, kMaxRows, kMaxWindowVectors, has);
    case Window::step2:
      return best_grid(rows, columns, 1, 1, taps, kMaxRows, kMaxWindowVectors, has, 2);
    case Window::turned:
      return best_grid(rows, columns, 1, 1, taps, kMaxRows, kMaxWindowVectors, has, 1, 2);
  }
  return {1, 1};
}

// Null where there is none.
Microkernels::Conv PlaneConv::own_kernel(const Class& c, int64_t height, int64_t width) const {
  switch (c.window) {
    case Window::none:
      return kernels_.conv_rows[height][width];
    case Window::step1:
      return kernels_.window[height][width];
    case Window::whole:
      return kernels_.window_whole[height][width];
    case Window::step2:
      return kernels_.window2[height][width];
    case Window::turned:
      return kernels_.window_turned[height][width];
  }
  return nullptr;
}

// LaneAxis::pixels: planes without gaps whose size is no multiple of a vector are joined, several images to one plane.
int64_t PlaneConv::images_that_fit(int64_t threads) const {
  const int64_t pixels = layout_.rows.longest() * layout_.columns.longest();
  if (!layout_.gapless() || pixels % kernels_.lanes == 0 || shape_.N <= threads) return 1;
  const int64_t floats = pixels * std::max<int64_t>(1, most_channels_ * layout_.phases);
  const int64_t fit = std::max<int64_t>(1, std::min(kPackedFloats / floats, kPositions / pixels));
  return divide_up(shape_.N, divide_up(divide_up(shape_.N, fit), threads) * threads);
}

// Cuts the planes into blocks of rows that fit into L2, and into enough tasks for the threads.
void PlaneConv::cut_rows(int64_t threads) {
  const int64_t rows = planes_.bands().rows;
  const int64_t pitch = layout_.pitch * planes_.cell(),
                row_floats = std::max<int64_t>(1, most_channels_ * layout_.phases * pitch);
  const int64_t halo = row_floats * layout_.extra_rows;
  int64_t fit = std::min(std::max(kPackedFloats - halo, halo) / row_floats, kPositions / pitch);
  list_filters_ = shared_ ? kMaxFilters : 1;
  const int64_t few = (std::min(rows, kFewRows) + layout_.extra_rows) * row_floats;
  const bool tight = few > kPackedFloats || (few > kTightFloats && most_channels_ >= kManyChannels);
  if (!shared_ && lane_axis_ == LaneAxis::images && tight) {
    fit = std::min(rows, kChunkRows);
    chunks_ = std::clamp<int64_t>(divide_up((fit + layout_.extra_rows) * row_floats, kChunkFloats), 1, most_channels_);
  }
  block_rows_ = balanced_rows(rows, fit, groups_ * stretches(), threads);
  row_blocks_ = divide_up(rows, block_rows_);
  const bool joined = lane_axis_ == LaneAxis::pixels && group_images_ > 1;
  if (joined) row_blocks_ = 1, block_rows_ = rows;
  parts_ = divide_up(threads, groups_ * stretches() * row_blocks_);

  planes_.set_block(block_rows_, joined ? group_images_ : 1);
  const auto &row_classes = layout_.rows.classes, &column_classes = layout_.columns.classes;
  const int64_t classes = static_cast<int64_t>(row_classes.size() * column_classes.size());
  const int64_t slack = lane_axis_ == LaneAxis::images ? 0 : kMaxVectors * kernels_.lanes;
  stores_in_place_ = lane_axis_ == LaneAxis::pixels && !joined && classes == 1 &&
                     layout_.pitch == layout_.columns.result && layout_.phases > 0;
  const int64_t class_cells =
      layout_.positions(block_rows_ * (joined ? group_images_ : 1), layout_.columns.longest()) + slack;
  class_floats_ = class_cells * planes_.cell();
  block_sums_ = stores_in_place_ ? 0 : list_filters_ * classes * class_floats_;
  if (lane_axis_ == LaneAxis::pixels) return;
  const int64_t every = row_classes[0].every;
  for (int64_t y = 0; y < block_rows_ * every; ++y)
    for (int64_t x = 0; x < layout_.columns.result; ++x) {
      const int64_t down = every, across = column_classes[0].every;
      const int64_t place = y % down * static_cast<int64_t>(column_classes.size()) + x % across;
      cells_.push_back(
          static_cast<int32_t>(place * list_filters_ * class_cells + y / down * layout_.pitch + x / across));
    }
}

// Where the planes of `operands`, of one group and in ascending order, lie in a packed block.
PlaneConv::List PlaneConv::add_list(const std::vector<int32_t>& operands) {
  const List list{static_cast<int64_t>(operands_.size()), static_cast<int64_t>(operands.size())};
  operands_.insert(operands_.end(), operands.begin(), operands.end());
  return list;
}

void PlaneConv::find_channels() {
  std::vector<int32_t> offset(planes_.live().empty() ? 0 : planes_.live().back() + 1);
  for (const Stretch& s : stretches_)
    for (int64_t i = 0; i < chunks_; ++i) {
      const auto [begin, end] = chunk(s, i);
      for (int64_t place = begin; place < end; ++place)
        offset[planes_.live()[place]] = static_cast<int32_t>(planes_.channel_offset(place, begin));
    }
  channels_.resize(operands_.size());
  for (size_t i = 0; i < operands_.size(); ++i) channels_[i] = offset[operands_[i]];
}

// Blocks and stretches are both in ascending order of groups.
void PlaneConv::share_blocks() {
  int64_t b = 0;
  for (Stretch& s : stretches_) {
    s.block = b;
    const auto inside = [&](const Block& block) { return planes_.place(operands_[block.list.first]) < s.end_place; };
    while (b < blocks() && inside(blocks_[b])) ++b;
    s.end_block = b;
  }
}

// Cuts the list of each block where chunks of channels begin, and gives all blocks of a task sums of their own.
void PlaneConv::cut_lists() {
  if (chunks_ == 1) return;
  int64_t most = 0;
  for (const Stretch& s : stretches_) {
    most = std::max(most, divide_up(s.end_block - s.block, parts_));
    for (int64_t b = s.block; b < s.end_block; ++b) {
      const List& list = blocks_[b].list;
      blocks_[b].cuts = static_cast<int64_t>(cuts_.size());
      int32_t at = 0;
      for (int64_t i = 0; i < chunks_; ++i) {
        cuts_.push_back(at);
        const int64_t end = chunk(s, i).second;
        while (at < list.count && planes_.place(operands_[list.first + at]) < end) ++at;
      }
      cuts_.push_back(at);
    }
  }
  sums_blocks_ = most;
}

void PlaneConv::add_shared(int64_t group) {
  const auto outs = without_padding(mask_.out_index(), group * mask_[kOutPerGroup], (group + 1) * mask_[kOutPerGroup]);
  const auto ins = without_padding(mask_.in_index(), group * mask_[kInPerGroup], (group + 1) * mask_[kInPerGroup]);
  const std::vector<int32_t>& filters = forward() ? outs : ins;
  const List list = add_list(forward() ? ins : outs);
  const int64_t count = static_cast<int64_t>(filters.size()), blocks = divide_up(count, kernels_.most_filters);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = count * b / blocks, end = count * (b + 1) / blocks;
    Block block{static_cast<int>(end - begin), {}, list, 0, 0};
    std::copy_n(filters.data() + begin, block.filters, block.filter);
    blocks_.push_back(block);
  }
}

void PlaneConv::add_own() {
  const int32_t Cg = static_cast<int32_t>(shape_.channels_per_group()), Kg = static_cast<int32_t>(shape_.K / shape_.G);
  const int32_t K = static_cast<int32_t>(shape_.K), C = static_cast<int32_t>(shape_.C);
  std::vector<int32_t> channels(mask_[kLivePairs]), end(K + 1, 0);  // of the kernels of each filter
  int32_t at = 0;
  for (int32_t k = 0; k < K; ++k) {
    mask_.each_live_channel(k, [&](int64_t c) { channels[at++] = k / Kg * Cg + static_cast<int32_t>(c); });
    end[k + 1] = at;
  }
  if (forward()) {
    operands_ = std::move(channels);
  } else {
    std::vector<int32_t> next(C + 1, 0);
    for (const int32_t c : channels) ++next[c + 1];
    for (int32_t c = 0; c < C; ++c) next[c + 1] += next[c];
    std::vector<int32_t> ends(next);
    operands_.resize(channels.size());
    for (int32_t k = 0; k < K; ++k)
      for (int32_t i = end[k]; i < end[k + 1]; ++i) operands_[next[channels[i]]++] = k;
    end = std::move(ends);
  }
  blocks_.reserve(end.size());
  for (size_t f = 0; f + 1 < end.size(); ++f)
    if (end[f] < end[f + 1]) blocks_.push_back({1, {static_cast<int32_t>(f)}, {end[f], end[f + 1] - end[f]}, 0, 0});
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
    if (!shared_ && layout.tap == 1) {
      // A row of weights has the channels of its group alone.
      const int64_t first = forward() ? block.filter[0] / (shape_.K / shape_.G) * Cg : 0;
      kernels_.pack_list(weight + at[0] - first * layout.channel, forward() ? layout.channel : layout.row,
                         shape_.taps(), operands, block.list.count, c.tap.data(), taps, to);
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
