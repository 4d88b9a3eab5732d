#include "cpu/kernels/pixel_planes.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace prunekernels {
namespace {

// Cells behind the last position that kernels read, and whose values are dropped or multiplied by zeros.
constexpr int64_t kSlack = 2 * kQuadLanes;
constexpr int64_t kPage = 4096;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

PixelBlocks::PixelBlocks(int64_t N, int64_t rows, int64_t row_positions, int64_t image_positions, int64_t fit,
                         int64_t least)
    : images(1), rows(rows), N(N), all_rows(rows) {
  const int64_t most_images = std::min(N, fit / std::max<int64_t>(1, image_positions));
  images = std::max<int64_t>(1, std::min(most_images, N / least));
  if (images == 1) {
    const int64_t of_image = std::max(divide_up(rows * row_positions, fit), divide_up(least, N));
    this->rows = divide_up(rows, std::min(rows, std::max<int64_t>(1, of_image)));
  }
  groups = divide_up(N, images), row_blocks = divide_up(rows, this->rows);
}

PixelBlock PixelBlocks::operator[](int64_t i) const {
  const int64_t image = i / row_blocks * images, row = i % row_blocks * rows;
  return {image, std::min(images, N - image), row, std::min(rows, all_rows - row)};
}

std::vector<int32_t> plane_places(const ChannelList& list, PlaneCell cell) {
  const int64_t width = cell == PlaneCell::pair ? 2 : 1;
  std::vector<int32_t> places;
  if (2 * list.live < list.channels || list.channels % width) return places;
  for (int64_t c = 0; c < list.channels; c += width) {
    const int32_t slot = list.slot[c];
    const bool together =
        width == 1 || (slot < 0 ? list.slot[c + 1] < 0 : slot % 2 == 0 && list.slot[c + 1] == slot + 1);
    if (!together) return {};
    places.push_back(slot < 0 ? -1 : slot / static_cast<int32_t>(width));
  }
  return places;
}

PixelPlanes::PixelPlanes(PlaneLayout layout, const ChannelList& channels, PlaneCell cell)
    : layout_(std::move(layout)),
      channels_(channels),
      kind_(cell),
      cell_(cell == PlaneCell::pair ? 2 : 1),
      pixel_(divide_up(channels.live, 2) * 2),
      count_(cell == PlaneCell::pair ? pixel_ / 2 : channels.live),
      kernels_(quad_kernels()),
      places_(plane_places(channels, cell)) {}

void PixelPlanes::set_block(int64_t images, int64_t rows) {
  const Axis& down = layout_.rows;
  image_rows_ = rows + layout_.extra_rows;
  if (down.step == 1 && rows == down.longest()) {
    const int64_t above = std::max<int64_t>(0, -layout_.low_row);
    const int64_t below = std::max<int64_t>(0, layout_.low_row + image_rows_ - down.operand);
    image_rows_ = std::max(image_rows_ - std::min(above, below), rows);
  }
  const int64_t all_rows = (images - 1) * image_rows_ + rows + layout_.extra_rows;
  phase_cells_ = divide_up((all_rows - 1) * layout_.pitch + layout_.width + kSlack, kSlack) * kSlack;
  plane_ = layout_.phases * phase_cells_;
  if (plane_ * cell_ * 2 % kPage == 0)
    plane_ += kSlack;  // 16 planes are written at a time: not to the same lines of L1
}

void PixelPlanes::put(const PaddedRow& row, int64_t at, uint16_t* planes) const {
  if (row.count == 0) return zero(at, row.length(), planes);
  const int32_t* const places = places_.empty() ? nullptr : places_.data();
  const int64_t cells = places ? static_cast<int64_t>(places_.size()) : count_;
  if (kind_ == PlaneCell::pair)
    kernels_.to_pair_planes(row, cells, places, reinterpret_cast<uint32_t*>(planes) + at, plane_);
  else
    kernels_.to_planes(row, cells, places, planes + at, plane_);
}

void PixelPlanes::zero(int64_t at, int64_t cells, uint16_t* planes) const {
  for (int64_t j = 0; j < count_; ++j)
    std::memset(planes + (plane(j) + at) * cell_, 0, cells * cell_ * sizeof(*planes));
}

const uint16_t* PixelPlanes::gathered(const uint16_t* x, int64_t pixels, uint16_t* line) const {
  if (!places_.empty()) return x;
  pixel_kernels().gather(x, channels_.channels, channels_.channels, channels_.bits, channels_.live, line, pixel_,
                         pixels);
  return line;
}

void PixelPlanes::pack_line(const uint16_t* x, int64_t pixels, uint16_t* planes, uint16_t* line) const {
  const int64_t step = places_.empty() ? kLine : pixels;
  for (int64_t at = 0; at < pixels; at += step) {
    const int64_t count = std::min(step, pixels - at);
    put({gathered(x + at * channels_.channels, count, line), pixel(), 0, count, 0}, at, planes);
  }
  zero(pixels, phase_cells_ - pixels, planes);
}

// A phase's rows one after the other: what to_planes writes behind a row is overwritten by the next one.
void PixelPlanes::pack(const uint16_t* x, const PixelBlock& block, uint16_t* planes, uint16_t* line) const {
  const Axis &down = layout_.rows, &across = layout_.columns;
  const int64_t packed_rows = block.rows + layout_.extra_rows, width = layout_.width;
  const auto row_at = [&](int64_t image, int64_t y) {
    return x + ((block.image + image) * down.operand + y) * across.operand * channels_.channels;
  };
  if (layout_.in_place)
    return pack_line(row_at(0, block.first_row), block.images * block.rows * across.operand, planes, line);
  for (int64_t f = 0; f < down.step; ++f) {
    const int* const phase = &layout_.phase[f * across.step];
    if (std::all_of(phase, phase + across.step, [](int place) { return place < 0; })) continue;
    for (int64_t n = 0; n < block.images; ++n)
      for (int64_t u = 0; u < packed_rows; ++u) {
        const int64_t y = layout_.low_row + (block.first_row + u) * down.step + f;
        const bool inside = y >= 0 && y < down.operand;
        const uint16_t* const row = inside ? gathered(row_at(n, y), across.operand, line) : nullptr;
        for (int64_t g = 0; g < across.step; ++g) {
          if (phase[g] < 0) continue;
          const int64_t first = layout_.low_column + g;  // the operand column of cell 0
          const int64_t begin = std::clamp<int64_t>(divide_up(-first, across.step), 0, width);
          const int64_t end = std::clamp<int64_t>(divide_up(across.operand - first, across.step), begin, width);
          const int64_t at = phase[g] * phase_cells_ + (n * image_rows_ + u) * layout_.pitch;
          if (inside)
            put({row + (first + begin * across.step) * pixel(), pixel() * across.step, begin, end - begin, width - end},
                at, planes);
          else
            zero(at, width, planes);
        }
      }
  }
  const int64_t used = ((block.images - 1) * image_rows_ + packed_rows - 1) * layout_.pitch + width;
  for (int p = 0; p < layout_.phases; ++p) zero(p * phase_cells_ + used, phase_cells_ - used, planes);
}

}  // namespace prunekernels
