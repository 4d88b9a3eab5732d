#include "cpu/kernels/plane_grad_weight.h"

#include <algorithm>

namespace prunekernels {
namespace {

constexpr int64_t kPlaneFloats = 2048;        // of a block: the planes of one tile stay in L1
constexpr int64_t kImagesPlaneFloats = 4096;  // the same for LaneAxis::images, which reads one row after the other
constexpr int64_t kBlockFloats = 192 << 10;   // of a block: its planes stay in L2
constexpr int64_t kRows = 4, kFewRows = 2;    // of outputs in a block for which channels are cut; at larger strides

}  // namespace

PlaneGradWeight::PlaneGradWeight(const ConvShape& shape, const MaskTable& mask, bool shared, Lanes lane_use,
                                 int64_t threads)
    : shape_(shape),
      mask_(mask),
      shared_(shared),
      lane_axis_(lane_use.axis),
      kernels_(microkernels()),
      x_({forward_axis(shape, 0), forward_axis(shape, 1)}, without_padding(mask.in_index(), 0, mask.in_count()),
         shape.C, shape.N, lane_use, kernels_) {
  const bool three = shape.S == 3 && shape.dilation[1] == 1 && shape.stride[1] == 1,
             images = lane_axis_ == LaneAxis::images;
  taps_per_operand_ = three ? 3 : 1;
  filters_per_tile_ = !three ? kernels_.dot_filters : images ? kernels_.dot3_images_filters : kernels_.dot3_filters;

  const PlaneLayout& layout = x_.layout();
  const int64_t lanes = kernels_.lanes, pitch = layout.pitch * x_.cell();
  // Rows of a block are few enough for L1, and its channels for L2.
  const int64_t plane_rows = std::min(x_.bands().rows, shape.stride[0] > 1 ? kFewRows : kRows) + layout.extra_rows;
  const int64_t plane_floats = std::max<int64_t>(1, plane_rows * pitch * layout.phases);
  const bool cuts = images && !shared;
  const std::vector<int64_t> bounds =
      x_.stretches(shape.channels_per_group(), cuts ? std::max<int64_t>(1, kBlockFloats / plane_floats) : shape.C);
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    stretches_.push_back({bounds[i], bounds[i + 1], 0, 0});
    most_channels_ = std::max(most_channels_, bounds[i + 1] - bounds[i]);
  }
  const int64_t planes = images ? divide_up(x_.bands().units(), lanes) : shape.N;
  const int64_t channels = std::max<int64_t>(1, most_channels_ * layout.phases);
  const int64_t most =
      cuts ? kImagesPlaneFloats : std::min(images ? kImagesPlaneFloats : kPlaneFloats, kBlockFloats / channels);
  const int64_t fit_rows =
      cuts ? std::min(most, kBlockFloats / channels - layout.extra_rows * pitch) / pitch : most / pitch;
  const int64_t rows = x_.bands().rows, sharing = stretches() >= threads ? 1 : threads;
  block_rows_ = balanced_rows(rows, fit_rows, planes, sharing);
  row_blocks_ = divide_up(rows, block_rows_);
  const int64_t plane = (block_rows_ + layout.extra_rows) * pitch * channels;
  const int64_t planes_fit = std::min(most / (block_rows_ * pitch), cuts ? kBlockFloats / plane : most);
  const int64_t fit = std::clamp<int64_t>(planes_fit, 1, divide_up(planes, sharing));
  group_planes_ = row_blocks_ > 1 ? 1 : fit;
  groups_ = divide_up(planes, group_planes_);
  joined_ = !images && layout.gapless() && group_planes_ > 1 && shape.out_pixels() % lanes != 0;
  grad_in_place_ = !images && layout.pitch == shape.Q && !joined_;
  const int64_t positions = layout.positions(block_rows_, shape.Q) * (joined_ ? group_planes_ : 1);
  grad_floats_ = grad_in_place_ ? shape.out_pixels()
                 : images       ? block_rows_ * shape.Q * lanes
                                : divide_up(positions, lanes) * lanes;
  for (int32_t i = 0; images && i < block_rows_ * shape.Q; ++i) cells_.push_back(i);
  x_.set_block(block_rows_, joined_ ? group_planes_ : 1);
  find_window(shared);
  tile_of_.assign(stretches() * shape.K, -1);
  if (shared)
    for (int64_t g = 0; g < mask[kLiveGroups]; ++g) add_shared(g);
  else
    add_own();
}

void PlaneGradWeight::find_window(bool shared) {
  const ConvShape& s = shape_;
  const int64_t step = s.stride[0];
  window_ = !shared && lane_axis_ == LaneAxis::images && s.R == 3 && s.S == 3 && s.dilation[0] == 1 &&
            s.dilation[1] == 1 && s.stride[1] == step && step <= 2 && kernels_.dot_window[1][1];
  if (!window_) return;
  taps_per_operand_ = 9;
  const bool around = step == 1 && s.padding[0] == 1 && s.padding[1] == 1 && row_blocks_ == 1 && x_.bands().bands == 1;
  whole_ = around && s.P <= kMaxRows && s.Q <= kMaxRows && kernels_.dot_window_whole[s.P][s.Q];
  const auto has = [&](int64_t h, int64_t w) { return dot_window(h, w) != nullptr; };
  const int64_t lanes = kernels_.lanes, pitch = x_.layout().pitch;
  for (int64_t rows = 0; rows <= block_rows_; ++rows) {
    rectangles_.emplace_back();
    const TileGrid grid =
        whole_ ? TileGrid{1, 1} : best_grid(rows, s.Q, 3 - step, 3 - step, 9, kMaxRows, kMaxWindowVectors, has, step);
    if (rows > 0)
      grid.each(rows, s.Q,
                [&](int64_t row, int64_t height, int64_t down, int64_t column, int64_t width, int64_t across) {
                  rectangles_[rows].push_back({dot_window(height, width), (row * s.Q + column) * lanes,
                                               (row * pitch + column) * lanes, down, across});
                });
  }
}

// Null where there is none.
Microkernels::DotWindow PlaneGradWeight::dot_window(int64_t height, int64_t width) const {
  const auto& kernels = shape_.stride[0] == 2 ? kernels_.dot_window2 : kernels_.dot_window;
  return whole_ ? kernels_.dot_window_whole[height][width] : kernels[height][width];
}

int64_t PlaneGradWeight::scratch_floats() const {
  const int64_t copies = joined_ ? 1 : group_planes_, grads = grad_in_place_ ? 0 : kMaxDotFilters * grad_floats_;
  return copies * (x_.floats(most_channels_) + grads) + x_.line_floats();
}

void PlaneGradWeight::add_operands(const int32_t* channels, size_t count, const Stretch& stretch) {
  const auto &down = x_.layout().rows.classes[0].taps, &across = x_.layout().columns.classes[0].taps;
  const int64_t per_channel = shape_.taps() / taps_per_operand_, most = taps_per_operand_ > 1 ? 3 : kernels_.dot_xs;
  const int64_t all = static_cast<int64_t>(count) * per_channel, tiles = divide_up(all, most);
  for (int64_t t = 0; t < tiles; ++t) {
    Operands o{};
    for (int64_t i = all * t / tiles; i < all * (t + 1) / tiles; ++i, ++o.count) {
      const int32_t c = channels[i / per_channel];
      const int64_t tap = i % per_channel * taps_per_operand_;
      const Tap &r = down[tap / shape_.S], &s = across[tap % shape_.S];
      o.channel[o.count] = static_cast<int32_t>(c % shape_.channels_per_group());
      o.tap[o.count] = static_cast<int32_t>(r.index * shape_.S + s.index);
      o.offset[o.count] = x_.channel_offset(x_.place(c), stretch.place) + x_.tap_offset(r, s);
    }
    operands_.push_back(o);
  }
}

void PlaneGradWeight::add_filters(const int32_t* filters, int count, int64_t operands, int64_t end, int64_t stretch) {
  Filters f{count, {}, operands, end, partial_floats_};
  for (int i = 0; i < count; ++i) {
    f.filter[i] = filters[i];
    tile_of_[stretch * shape_.K + filters[i]] = static_cast<int32_t>(filters_.size());
  }
  for (int64_t o = f.operands; o < f.end; ++o)
    partial_floats_ += operands_[order_[o]].count * count * taps_per_operand_;
  filters_.push_back(f);
}

int64_t PlaneGradWeight::stretch_of(int32_t channel) const {
  const int64_t place = x_.place(channel);
  const auto holds = [&](const Stretch& s) { return place < s.end_place; };
  return std::find_if(stretches_.begin(), stretches_.end(), holds) - stretches_.begin();
}

void PlaneGradWeight::add_shared(int64_t group) {
  const auto filters =
      without_padding(mask_.out_index(), group * mask_[kOutPerGroup], (group + 1) * mask_[kOutPerGroup]);
  const auto channels = without_padding(mask_.in_index(), group * mask_[kInPerGroup], (group + 1) * mask_[kInPerGroup]);
  const int64_t first = static_cast<int64_t>(order_.size()), count = static_cast<int64_t>(filters.size());
  const int64_t stretch = stretch_of(channels[0]);
  add_operands(channels.data(), channels.size(), stretches_[stretch]);
  while (order_.size() < operands_.size()) order_.push_back(static_cast<int32_t>(order_.size()));
  const int64_t tiles = divide_up(count, filters_per_tile_);
  if (stretches_[stretch].end_tile == 0) stretches_[stretch].tile = static_cast<int64_t>(filters_.size());
  for (int64_t t = 0; t < tiles; ++t)
    add_filters(&filters[count * t / tiles], static_cast<int>(count * (t + 1) / tiles - count * t / tiles), first,
                static_cast<int64_t>(order_.size()), stretch);
  stretches_[stretch].end_tile = static_cast<int64_t>(filters_.size());
}

void PlaneGradWeight::add_own() {
  operands_.reserve(x_.live().size());
  filters_.reserve(shape_.K);
  for (const Stretch& s : stretches_)
    for (int64_t place = s.place; place < s.end_place; ++place) add_operands(&x_.live()[place], 1, s);
  // Channel after channel, all have equally many.
  const int32_t tiles =
      x_.live().empty() ? 0 : static_cast<int32_t>(operands_.size()) / static_cast<int32_t>(x_.live().size());
  const int32_t Cg = static_cast<int32_t>(shape_.channels_per_group()), Kg = static_cast<int32_t>(shape_.K / shape_.G);
  order_.resize(mask_[kLivePairs] * tiles);
  std::vector<int64_t> end(shape_.K + 1, 0);
  int64_t at = 0;
  for (int32_t k = 0; k < shape_.K; ++k) {
    const int32_t first = k / Kg * Cg;
    mask_.each_live_channel(k, [&](int64_t c) {
      const int32_t place = x_.place(first + static_cast<int32_t>(c));
      for (int32_t t = 0; t < tiles; ++t) order_[at++] = place * tiles + t;
    });
    end[k + 1] = at;
  }
  std::vector<int64_t> next(end.begin(), end.end() - 1);  // of each filter, what no stretch has taken yet
  for (int64_t i = 0; i < stretches(); ++i) {
    Stretch& s = stretches_[i];
    s.tile = static_cast<int64_t>(filters_.size());
    const bool any = s.place < s.end_place;
    const int32_t group = any ? x_.live()[s.place] / Cg : 0, end_group = any ? x_.live()[s.end_place - 1] / Cg + 1 : 0;
    for (int32_t k = group * Kg; k < end_group * Kg; ++k) {
      const int64_t own = next[k];
      while (next[k] < end[k + 1] && order_[next[k]] < s.end_place * tiles) ++next[k];
      if (next[k] > own) add_filters(&k, 1, own, next[k], i);
    }
    s.end_tile = static_cast<int64_t>(filters_.size());
  }
}

// plane [P, Q] of `images` images (or bands) from `first` on -> packed. LaneAxis::pixels: with the pitch of the packed
// input and zeros between the rows, so that what the input holds there adds nothing.
void PlaneGradWeight::pack_grad(const float* plane, int64_t first, int images, const Block& block,
                                float* packed) const {
  const int64_t pitch = x_.layout().pitch, Q = shape_.Q, rows = block.rows, image = shape_.K * shape_.out_pixels();
  if (lane_axis_ == LaneAxis::images) {
    const LaneRuns runs =
        x_.bands().runs(first, images, 1, block.first_row, block.first_row + rows, shape_.P, Q, image, kernels_.lanes);
    kernels_.images_to_lanes(plane, runs, cells_.data(), packed, block.ahead);
    // Rows below the last bands.
    return kernels_.zero(packed + runs.any_end * kernels_.lanes, (rows * Q - runs.any_end) * kernels_.lanes);
  }
  const float* from = plane + first * image + block.first_row * Q;
  float *to = packed, *end = packed + grad_floats_;
  for (int n = 0; n < images; ++n) {
    if (pitch == Q) {
      kernels_.copy(from + n * image, to, rows * Q);
      to += rows * Q;
    } else {
      for (int64_t p = 0; p < rows; ++p, to += pitch) {
        kernels_.copy(from + n * image + p * Q, to, Q);
        kernels_.zero(to + Q, std::min(pitch, end - to) - Q);
      }
    }
  }
  if (to < end) kernels_.zero(to, end - to);
}

// All nine taps of one filter and channel.
void PlaneGradWeight::dot_windows(DotTile& tile, float* out) const {
  const std::vector<Rectangle>& all = rectangles_[tile.rows];
  for (const Rectangle& r : all) {
    tile.begins = &r == &all.front(), tile.ends = &r == &all.back();
    r.kernel(tile, tile.g[0] + r.g, tile.x[0] + r.x, r.down, r.across, out);
  }
}

void PlaneGradWeight::compute(const Filters& f, const Block& block, float* partial) const {
  const int64_t x_image = shape_.C * shape_.in_pixels(), grad_image = shape_.K * shape_.out_pixels();
  const int lanes = kernels_.lanes;
  const int64_t tile_floats = kMaxDotFilters * grad_floats_, plane_images = lane_axis_ == LaneAxis::images ? lanes : 1;
  const float *grads[kMaxDotFilters], *xs[kMaxDotXs];
  for (int i = 0; i < f.count; ++i) {
    const float* grad = block.grad + f.filter[i] * shape_.out_pixels();
    float* packed = block.packed_grad + i * grad_floats_;
    grads[i] = grad_in_place_ ? grad + block.first * grad_image + block.first_row * shape_.Q : packed;
    if (grad_in_place_) continue;
    if (joined_) pack_grad(grad, block.first, static_cast<int>(block.images), block, packed);
    for (int64_t n = 0; !joined_ && n < block.planes; ++n)
      pack_grad(grad, block.first + n * plane_images,
                static_cast<int>(std::min(plane_images, block.images - n * plane_images)), block,
                packed + n * tile_floats);
  }
  DotTile tile{};
  tile.g = grads, tile.x = xs;
  tile.planes = joined_ ? 1 : block.planes;
  tile.g_plane = grad_in_place_ ? grad_image : tile_floats;
  tile.x_plane = x_.in_place() ? x_image : x_.floats(most_channels_);
  tile.last = lanes;
  if (lane_axis_ == LaneAxis::images) {
    tile.rows = block.rows, tile.vectors = shape_.Q;
    tile.g_row = shape_.Q * lanes, tile.x_row = x_.layout().pitch * lanes, tile.x_phase = x_.phase_floats();
  } else {
    tile.rows = 1, tile.vectors = divide_up(block.positions, lanes);
    if (x_.in_place() || grad_in_place_) tile.last = static_cast<int>(block.positions - (tile.vectors - 1) * lanes);
  }
  const auto& kernels = taps_per_operand_ == 1           ? kernels_.dot[f.count]
                        : lane_axis_ == LaneAxis::images ? kernels_.dot3_images[f.count]
                                                         : kernels_.dot3[f.count];
  tile.out = partial + f.dot;
  alignas(64) float carry[9 * kMaxLanes];
  tile.carry = carry;
  for (int64_t o = f.operands; o < f.end; ++o) {
    const Operands& operands = operands_[order_[o]];
    for (int j = 0; j < operands.count; ++j) xs[j] = block.x + operands.offset[j];
    if (window_)
      dot_windows(tile, tile.out);
    else
      kernels[operands.count](tile);
    tile.out += f.count * operands.count * taps_per_operand_;
  }
}

void PlaneGradWeight::run(const float* x, const float* grad, int64_t first, int64_t end, int64_t part, int64_t parts,
                          float* partial, float* scratch) const {
  const int64_t tiles = static_cast<int64_t>(filters_.size());
  const int64_t begin_tile = tiles * part / parts, end_tile = tiles * (part + 1) / parts;
  if (begin_tile == end_tile) return;
  std::fill(partial + filters_[begin_tile].dot, partial + (end_tile < tiles ? filters_[end_tile].dot : partial_floats_),
            0.f);
  const int64_t x_image = shape_.C * shape_.in_pixels();
  const int64_t copies = joined_ ? 1 : group_planes_, plane_floats = x_.floats(most_channels_),
                plane_images = lane_axis_ == LaneAxis::images ? kernels_.lanes : 1;
  float *packed_grad = scratch + copies * plane_floats,
        *lines = packed_grad + (grad_in_place_ ? 0 : copies * kMaxDotFilters * grad_floats_);
  for (int64_t i = 0; i < copies && !x_.in_place(); ++i) x_.pad(most_channels_, scratch + i * plane_floats);
  for (const Stretch& s : stretches_) {
    const int64_t tile = std::max(s.tile, begin_tile), last_tile = std::min(s.end_tile, end_tile);
    for (int64_t b = first; tile < last_tile && b < end; ++b) {
      Block block;
      block.first = b / row_blocks_ * group_planes_ * plane_images;
      block.images = std::min(group_planes_ * plane_images, x_.bands().units() - block.first);
      block.planes = divide_up(block.images, plane_images);
      block.first_row = b % row_blocks_ * block_rows_;
      block.rows = std::min(block_rows_, x_.bands().rows - block.first_row);
      block.positions = x_.layout().positions(block.rows, shape_.Q) * (joined_ ? block.images : 1);
      block.x = x_.start(x + block.first * x_image, block.first_row, scratch);
      block.grad = grad;
      block.packed_grad = packed_grad;
      const bool follows = b > first && block.first_row > 0;
      const auto pack = [&](int64_t n, int64_t images, float* packed) {
        x_.pack(x, {block.first + n, static_cast<int>(images), block.first_row, block.rows, s.place, s.end_place},
                follows, packed, lines);
      };
      if (joined_) pack(0, block.images, scratch);
      for (int64_t i = 0; !joined_ && !x_.in_place() && i < block.planes; ++i)
        pack(i * plane_images, std::min(plane_images, block.images - i * plane_images), scratch + i * plane_floats);
      for (int64_t t = tile; t < last_tile; ++t) {
        const int64_t next = t + 1 < last_tile ? filters_[t + 1].filter[0] - filters_[t].filter[0] : 0;
        block.ahead = next * shape_.out_pixels();
        compute(filters_[t], block, partial);
      }
    }
  }
}

void PlaneGradWeight::write(const float* partial, int64_t count, const float* scale, const WeightLayout& layout,
                            float* grad_weight, int64_t begin, int64_t end) const {
  const int64_t row = shape_.channels_per_group() * shape_.taps();
  for (int64_t k = begin; k < end; ++k) {
    float* to = grad_weight + k * layout.row;
    std::fill(to, to + row, 0.f);
    if (scale && scale[k] == 0) continue;
    for (int64_t i = 0; i < stretches(); ++i)
      if (const int32_t tile = tile_of_[i * shape_.K + k]; tile >= 0)
        write_tile(filters_[tile], k, partial, count, scale, layout, to);
  }
}

void PlaneGradWeight::write_tile(const Filters& f, int64_t k, const float* partial, int64_t count, const float* scale,
                                 const WeightLayout& layout, float* to) const {
  const int64_t i = std::find(f.filter, f.filter + f.count, k) - f.filter;
  const float* tile = partial + f.dot;
  for (int64_t o = f.operands; o < f.end; ++o) {
    const Operands& operands = operands_[order_[o]];
    for (int64_t j = 0; j < operands.count; ++j) {
      if (shared_ && !mask_[kPairsFull] && !mask_.pair(k, operands.channel[j])) continue;
      const float* dot = tile + (i * operands.count + j) * taps_per_operand_;
      float* kernel = to + operands.channel[j] * layout.channel + operands.tap[j] * layout.tap;
      if (count == 1 && taps_per_operand_ == 9 && layout.tap == 1) {
        const float times = scale ? scale[k] : 1.f;
        for (int64_t s = 0; s < 9; ++s) kernel[s] = dot[s] * times;
        continue;
      }
      for (int64_t s = 0; s < taps_per_operand_; ++s) {
        float sum = 0;
        for (int64_t p = 0; p < count; ++p) sum += dot[p * partial_floats_ + s];
        kernel[s * layout.tap] = scale ? sum * scale[k] : sum;
      }
    }
    tile += f.count * operands.count * taps_per_operand_;
  }
}

}  // namespace prunekernels
