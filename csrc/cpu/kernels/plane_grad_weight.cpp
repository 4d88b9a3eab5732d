#include "cpu/kernels/plane_grad_weight.h"

#include <algorithm>

namespace prunekernels {
namespace {

constexpr int64_t kPlaneFloats = 2048;        // of a block: the planes of one tile stay in L1
constexpr int64_t kImagesPlaneFloats = 4096;  // the same for LaneAxis::images, which reads one row after the other
constexpr int64_t kBlockFloats = 256 << 10;   // of a block: its planes stay in L2

}  // namespace

PlaneGradWeight::PlaneGradWeight(const ConvShape& shape, const MaskTable& mask, bool shared, LaneAxis lane_axis,
                                 int64_t threads)
    : shape_(shape),
      mask_(mask),
      lane_axis_(lane_axis),
      kernels_(microkernels()),
      x_({forward_axis(shape, 0), forward_axis(shape, 1)}, without_padding(mask.in_index(), 0, mask.in_count()),
         shape.C, lane_axis, kernels_) {
  const bool three = shape.S == 3 && shape.dilation[1] == 1 && shape.stride[1] == 1,
             images = lane_axis == LaneAxis::images;
  taps_per_operand_ = three ? 3 : 1;
  filters_per_tile_ = !three ? kernels_.dot_filters : images ? kernels_.dot3_images_filters : kernels_.dot3_filters;

  const PlaneLayout& layout = x_.layout();
  const int64_t lanes = kernels_.lanes, pitch = layout.pitch * x_.cell();
  const int64_t planes = images ? divide_up(shape.N, lanes) : shape.N;
  const int64_t channels = std::max<int64_t>(1, static_cast<int64_t>(x_.live().size()) * layout.phases);
  const int64_t most = std::min(images ? kImagesPlaneFloats : kPlaneFloats, kBlockFloats / channels);
  block_rows_ = balanced_rows(shape.P, most / pitch, planes, threads);
  row_blocks_ = divide_up(shape.P, block_rows_);
  const int64_t fit = std::clamp<int64_t>(most / (block_rows_ * pitch), 1, divide_up(planes, threads));
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
  tile_of_.assign(shape.K, -1);
  if (shared)
    for (int64_t g = 0; g < mask[kLiveGroups]; ++g) add_shared(g);
  else
    add_own();
}

void PlaneGradWeight::find_window(bool shared) {
  const ConvShape& s = shape_;
  const bool three = taps_per_operand_ == 3 && s.R == 3 && s.dilation[0] == 1 && s.stride[0] == 1;
  window_ = !shared && three && lane_axis_ == LaneAxis::images && kernels_.dot_window[1][1];
  const bool around = s.padding[0] == 1 && s.padding[1] == 1 && row_blocks_ == 1;
  whole_ = window_ && around && s.P <= kMaxRows && s.Q <= kMaxRows && kernels_.dot_window_whole[s.P][s.Q];
  for (int64_t rows = 0; window_ && rows <= block_rows_; ++rows)
    grid_.push_back(whole_ ? TileGrid{1, 1}
                           : best_grid(rows, s.Q, 2, 2, 9, kMaxRows, kMaxWindowVectors,
                                       [&](int64_t h, int64_t w) { return kernels_.dot_window[h][w] != nullptr; }));
}

int64_t PlaneGradWeight::scratch_floats() const {
  const int64_t copies = joined_ ? 1 : group_planes_, grads = grad_in_place_ ? 0 : kMaxDotFilters * grad_floats_;
  return copies * (x_.floats() + grads) + x_.line_floats();
}

void PlaneGradWeight::add_operands(const int32_t* channels, size_t count) {
  const bool rows = taps_per_operand_ == 3;
  const auto &down = x_.layout().rows.classes[0].taps, &across = x_.layout().columns.classes[0].taps;
  const int64_t per_channel = static_cast<int64_t>(down.size() * (rows ? 1 : across.size()));
  const int64_t all = static_cast<int64_t>(count) * per_channel, tiles = divide_up(all, rows ? 3 : kernels_.dot_xs);
  for (int64_t t = 0; t < tiles; ++t) {
    Operands o{};
    for (int64_t i = all * t / tiles; i < all * (t + 1) / tiles; ++i, ++o.count) {
      const int32_t c = channels[i / per_channel];
      const int64_t part = i % per_channel, columns = per_channel / static_cast<int64_t>(down.size());
      const Tap &r = down[part / columns], &s = across[part % columns];
      o.channel[o.count] = static_cast<int32_t>(c % shape_.channels_per_group());
      o.tap[o.count] = static_cast<int32_t>(r.index * shape_.S + s.index);
      o.offset[o.count] = x_.channel_offset(x_.place(c)) + x_.tap_offset(r, s);
    }
    operands_.push_back(o);
  }
}

void PlaneGradWeight::add_filters(const int32_t* filters, int count, int64_t operands) {
  Filters f{count, {}, operands, static_cast<int64_t>(order_.size()), partial_floats_};
  for (int i = 0; i < count; ++i) {
    f.filter[i] = filters[i];
    tile_of_[filters[i]] = static_cast<int32_t>(filters_.size());
  }
  for (int64_t o = f.operands; o < f.end; ++o)
    partial_floats_ += operands_[order_[o]].count * count * taps_per_operand_;
  filters_.push_back(f);
}

void PlaneGradWeight::add_shared(int64_t group) {
  const auto filters =
      without_padding(mask_.out_index(), group * mask_[kOutPerGroup], (group + 1) * mask_[kOutPerGroup]);
  const auto channels = without_padding(mask_.in_index(), group * mask_[kInPerGroup], (group + 1) * mask_[kInPerGroup]);
  const int64_t first = static_cast<int64_t>(order_.size()), count = static_cast<int64_t>(filters.size());
  add_operands(channels.data(), channels.size());
  while (order_.size() < operands_.size()) order_.push_back(static_cast<int32_t>(order_.size()));
  const int64_t tiles = divide_up(count, filters_per_tile_);
  for (int64_t t = 0; t < tiles; ++t)
    add_filters(&filters[count * t / tiles], static_cast<int>(count * (t + 1) / tiles - count * t / tiles), first);
}

void PlaneGradWeight::add_own() {
  std::vector<int32_t> first(1, 0);  // by place: its operands
  for (const int32_t c : x_.live()) {
    add_operands(&c, 1);
    first.push_back(static_cast<int32_t>(operands_.size()));
  }
  const int64_t Cg = shape_.channels_per_group(), Kg = shape_.K / shape_.G;
  for (int32_t k = 0; k < shape_.K; ++k) {
    const int64_t own = static_cast<int64_t>(order_.size());
    mask_.each_live_channel(k, [&](int64_t c) {
      const int32_t place = x_.place(static_cast<int32_t>(k / Kg * Cg + c));
      for (int32_t o = first[place]; o < first[place + 1]; ++o) order_.push_back(o);
    });
    if (static_cast<int64_t>(order_.size()) > own) add_filters(&k, 1, own);
  }
}

// plane [P, Q] of each image -> packed. LaneAxis::pixels: with the pitch of the packed input and zeros between the
// rows, so that what the input holds there adds nothing.
void PlaneGradWeight::pack_grad(const float* plane, int images, int64_t first_row, int64_t rows, float* packed) const {
  const int64_t pitch = x_.layout().pitch, Q = shape_.Q, image = shape_.K * shape_.out_pixels();
  const float* from = plane + first_row * Q;
  if (lane_axis_ == LaneAxis::images)
    return kernels_.images_to_lanes(from, image, images, rows * Q, cells_.data(), packed);
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
void PlaneGradWeight::dot_windows(const DotTile& tile, float* out) const {
  const int64_t lanes = kernels_.lanes;
  grid_[tile.rows].each(tile.rows, tile.vectors,
                        [&](int64_t row, int64_t height, int64_t down, int64_t column, int64_t width, int64_t across) {
                          const auto kernel =
                              whole_ ? kernels_.dot_window_whole[height][width] : kernels_.dot_window[height][width];
                          kernel(tile, tile.g[0] + row * tile.g_row + column * lanes,
                                 tile.x[0] + row * tile.x_row + column * lanes, down, across, out);
                        });
}

void PlaneGradWeight::compute(const Filters& f, const Block& block, float* partial) const {
  const int64_t x_image = shape_.C * shape_.in_pixels(), grad_image = shape_.K * shape_.out_pixels();
  const int lanes = kernels_.lanes;
  const int64_t tile_floats = kMaxDotFilters * grad_floats_, plane_images = lane_axis_ == LaneAxis::images ? lanes : 1;
  const float *grads[kMaxDotFilters], *xs[kMaxDotXs];
  for (int i = 0; i < f.count; ++i) {
    const float* grad = block.grad + f.filter[i] * shape_.out_pixels();
    float* packed = block.packed_grad + i * grad_floats_;
    grads[i] = grad_in_place_ ? grad + block.first_row * shape_.Q : packed;
    if (grad_in_place_) continue;
    if (joined_) pack_grad(grad, static_cast<int>(block.images), block.first_row, block.rows, packed);
    for (int64_t n = 0; !joined_ && n < block.planes; ++n)
      pack_grad(grad + n * plane_images * grad_image,
                static_cast<int>(std::min(plane_images, block.images - n * plane_images)), block.first_row, block.rows,
                packed + n * tile_floats);
  }
  DotTile tile{};
  tile.g = grads, tile.x = xs;
  tile.planes = joined_ ? 1 : block.planes;
  tile.g_plane = grad_in_place_ ? grad_image : tile_floats;
  tile.x_plane = x_.in_place() ? x_image : x_.floats();
  tile.last = lanes;
  if (lane_axis_ == LaneAxis::images) {
    tile.rows = block.rows, tile.vectors = shape_.Q;
    tile.g_row = shape_.Q * lanes, tile.x_row = x_.layout().pitch * lanes;
  } else {
    tile.rows = 1, tile.vectors = divide_up(block.positions, lanes);
    if (x_.in_place() || grad_in_place_) tile.last = static_cast<int>(block.positions - (tile.vectors - 1) * lanes);
  }
  const auto& kernels = taps_per_operand_ == 1           ? kernels_.dot[f.count]
                        : lane_axis_ == LaneAxis::images ? kernels_.dot3_images[f.count]
                                                         : kernels_.dot3[f.count];
  tile.out = partial + f.dot;
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
  const int64_t x_image = shape_.C * shape_.in_pixels(), grad_image = shape_.K * shape_.out_pixels();
  const int64_t copies = joined_ ? 1 : group_planes_,
                plane_images = lane_axis_ == LaneAxis::images ? kernels_.lanes : 1;
  float *packed_grad = scratch + copies * x_.floats(),
        *lines = packed_grad + (grad_in_place_ ? 0 : copies * kMaxDotFilters * grad_floats_);
  for (int64_t b = first; b < end; ++b) {
    const int64_t image = b / row_blocks_ * group_planes_ * plane_images;
    Block block;
    block.images = std::min(group_planes_ * plane_images, shape_.N - image);
    block.planes = divide_up(block.images, plane_images);
    block.first_row = b % row_blocks_ * block_rows_;
    block.rows = std::min(block_rows_, shape_.P - block.first_row);
    block.positions = x_.layout().positions(block.rows, shape_.Q) * (joined_ ? block.images : 1);
    block.x = x_.start(x + image * x_image, block.first_row, scratch);
    block.grad = grad + image * grad_image;
    block.packed_grad = packed_grad;
    const auto pack = [&](int64_t n, int64_t images, float* packed) {
      x_.pack(x + (image + n) * x_image, x_image, static_cast<int>(images), block.first_row, block.rows, packed, lines);
    };
    if (joined_) pack(0, block.images, scratch);
    for (int64_t i = 0; !joined_ && !x_.in_place() && i < block.planes; ++i)
      pack(i * plane_images, std::min(plane_images, block.images - i * plane_images), scratch + i * x_.floats());
    for (int64_t t = begin_tile; t < end_tile; ++t) compute(filters_[t], block, partial);
  }
}

void PlaneGradWeight::write(const float* partial, int64_t count, const float* scale, const WeightLayout& layout,
                            float* grad_weight, int64_t begin, int64_t end) const {
  const int64_t row = shape_.channels_per_group() * shape_.taps();
  for (int64_t k = begin; k < end; ++k) {
    float* to = grad_weight + k * layout.row;
    std::fill(to, to + row, 0.f);
    if (tile_of_[k] < 0 || (scale && scale[k] == 0)) continue;
    const Filters& f = filters_[tile_of_[k]];
    const int64_t i = std::find(f.filter, f.filter + f.count, k) - f.filter;
    const float* tile = partial + f.dot;
    for (int64_t o = f.operands; o < f.end; ++o) {
      const Operands& operands = operands_[order_[o]];
      for (int64_t j = 0; j < operands.count; ++j) {
        if (!mask_[kPairsFull] && !mask_.pair(k, operands.channel[j])) continue;
        for (int64_t s = 0; s < taps_per_operand_; ++s) {
          const float* dot = tile + (i * operands.count + j) * taps_per_operand_ + s;
          float sum = 0;
          for (int64_t p = 0; p < count; ++p) sum += dot[p * partial_floats_];
          to[operands.channel[j] * layout.channel + (operands.tap[j] + s) * layout.tap] = scale ? sum * scale[k] : sum;
        }
      }
      tile += f.count * operands.count * taps_per_operand_;
    }
  }
}

}  // namespace prunekernels
