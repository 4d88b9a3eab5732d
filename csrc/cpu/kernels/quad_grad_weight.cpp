#include "cpu/kernels/quad_grad_weight.h"

#include <algorithm>
#include <cstring>

#include "core/scalar_types.h"

namespace prunekernels {
namespace {

constexpr int64_t kPlaneBytes = 768 << 10;  // of a block
constexpr int64_t kPositions = 1600;        // of a block: the planes of a tile stay in L1
constexpr int64_t kVector = 2 * kQuadLanes;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

PixelBlocks blocks_of(const PlaneLayout& layout, int64_t x_planes, int64_t grad_planes, int64_t images,
                      int64_t threads) {
  const int64_t fit = kPlaneBytes / 2 / std::max<int64_t>(1, x_planes * layout.phases + grad_planes);
  const int64_t rows = layout.rows.longest();
  return {
      images, rows, layout.pitch, (rows + layout.extra_rows) * layout.pitch, std::clamp<int64_t>(fit, 256, kPositions),
      threads};
}

}  // namespace

QuadGradWeight::QuadGradWeight(const ConvShape& s, const MaskTable& mask, const ChannelList& filters,
                               const ChannelList& channels, int64_t threads)
    : kernels_(quad_kernels()),
      mask_(mask),
      filters_(filters),
      channels_(channels),
      P_(s.P),
      Q_(s.Q),
      taps_(s.taps()),
      lists_(filter_tile_lists(mask, kQuad, 1)),
      places_(plane_places(filters, PlaneCell::channel)),
      x_({forward_axis(s, 0), forward_axis(s, 1)}, channels, PlaneCell::channel),
      blocks_(blocks_of(x_.layout(), x_.count(), filters.live, s.N, threads)) {
  x_.set_block(blocks_.images, blocks_.rows);
  const PixelBlock most{0, blocks_.images, 0, blocks_.rows};
  grad_plane_ = divide_up(x_.positions(most, Q_) + 1, kVector) * kVector;
  for (const Tap& r : x_.layout().rows.classes[0].taps)
    for (const Tap& t : x_.layout().columns.classes[0].taps) offset_.push_back(x_.tap_offset(r, t));
}

// With the pitch of the packed input and zeros between the rows, so that what the input holds there adds nothing.
void QuadGradWeight::pack_grad(const uint16_t* grad, const PixelBlock& block, uint16_t* planes, uint16_t* line) const {
  const int64_t pitch = x_.layout().pitch, live = filters_.live, channels = filters_.channels;
  const int64_t end = divide_up(x_.positions(block, Q_), kVector) * kVector;
  const auto zero = [&](int64_t from, int64_t to) {
    for (int64_t f = 0; f < live; ++f) std::memset(planes + f * grad_plane_ + from, 0, (to - from) * sizeof(*planes));
  };
  const auto put = [&](const uint16_t* pixels, int64_t count, int64_t gap, int64_t at) {
    if (!places_.empty())
      return kernels_.to_planes({pixels, channels, 0, count, gap}, channels, places_.data(), planes + at, grad_plane_);
    pixel_kernels().gather(pixels, channels, channels, filters_.bits, live, line, live, count);
    kernels_.to_planes({line, live, 0, count, gap}, live, nullptr, planes + at, grad_plane_);
  };
  const auto row_at = [&](int64_t n, int64_t p) {
    return grad + ((block.image + n) * P_ + block.first_row + p) * Q_ * channels;
  };
  if (pitch == Q_ && (block.images == 1 || x_.image_rows() == P_)) {  // no gaps
    const int64_t pixels = block.images * block.rows * Q_;
    for (int64_t at = 0; at < pixels; at += PixelPlanes::kLine)
      put(row_at(0, 0) + at * channels, std::min(PixelPlanes::kLine, pixels - at), 0, at);
    return zero(pixels, end);
  }
  for (int64_t n = 0; n < block.images; ++n) {
    for (int64_t p = 0; p < block.rows; ++p)
      put(row_at(n, p), Q_, p + 1 < block.rows ? pitch - Q_ : 0, (n * x_.image_rows() + p) * pitch);
    const int64_t used = (n * x_.image_rows() + block.rows - 1) * pitch + Q_;
    zero(used, n + 1 < block.images ? (n + 1) * x_.image_rows() * pitch : end);
  }
}

template <typename Visit>
void QuadGradWeight::each_tile(int64_t quad, Visit visit) const {
  const int64_t first = lists_.first[quad], listed = lists_.first[quad + 1] - first;
  const int64_t tiles = divide_up(listed, kQuadOperands);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = listed * t / tiles, count = listed * (t + 1) / tiles - begin;
    visit(first + begin, count, (first + begin) * taps_ * kQuad);
  }
}

void QuadGradWeight::run(const uint16_t* x, const uint16_t* grad, int64_t first, int64_t end, float* partial,
                         uint32_t* scratch) const {
  uint16_t* const xs_planes = reinterpret_cast<uint16_t*>(scratch);
  uint16_t* const planes = xs_planes + x_.elements();
  uint16_t* const zeros = planes + filters_.live * grad_plane_;
  uint16_t* const line = zeros + grad_plane_;
  std::memset(zeros, 0, grad_plane_ * sizeof(*zeros));
  for (int64_t b = first; b < end; ++b) {
    const PixelBlock block = blocks_[b];
    x_.pack(x, block, xs_planes, line);
    pack_grad(grad, block, planes, line);
    QuadDots dots{};
    dots.vectors = divide_up(x_.positions(block, Q_), kVector);
    for (int64_t quad = 0; quad < lists_.tiles(); ++quad) {
      const uint16_t *g[kQuad], *xs[kQuadOperands];
      for (int64_t f = 0; f < kQuad; ++f)
        g[f] = quad * kQuad + f < filters_.live ? planes + (quad * kQuad + f) * grad_plane_ : zeros;
      dots.g = g, dots.x = xs;
      each_tile(quad, [&](int64_t channel, int64_t count, int64_t at) {
        for (int64_t tap = 0; tap < taps_; ++tap) {
          for (int64_t j = 0; j < count; ++j) xs[j] = xs_planes + x_.plane(lists_.chunks[channel + j]) + offset_[tap];
          dots.out = partial + at + tap * kQuad * count;
          kernels_.dots[count](dots);
        }
      });
    }
  }
}

void QuadGradWeight::write(const float* partial, int64_t count, const float* scale, uint16_t* grad_weight,
                           int64_t begin, int64_t end) const {
  const int64_t C = channels_.channels;
  for (int64_t k = begin; k < end; ++k) {
    uint16_t* const row = grad_weight + k * taps_ * C;
    std::memset(row, 0, taps_ * C * sizeof(*row));
    const int64_t filter = filters_.slot[k];
    const float factor = scale ? scale[k] : 1;
    if (filter < 0 || factor == 0) continue;
    each_tile(filter / kQuad, [&](int64_t channel, int64_t listed, int64_t at) {
      for (int64_t j = 0; j < listed; ++j) {
        const int32_t c = channels_.index[lists_.chunks[channel + j]];
        if (!mask_.pair(k, c)) continue;
        for (int64_t tap = 0; tap < taps_; ++tap) {
          const float* dot = partial + at + (tap * kQuad + filter % kQuad) * listed + j;
          float sum = dot[0];
          for (int64_t p = 1; p < count; ++p) sum += dot[p * partial_floats()];
          row[tap * C + c] = BFloat16::from(sum * factor).bits;
        }
      }
    });
  }
}

}  // namespace prunekernels
