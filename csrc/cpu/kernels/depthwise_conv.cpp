#include "cpu/kernels/depthwise_conv.h"

#include <algorithm>
#include <cstring>

#include "cpu/kernels/depthwise_tiles.h"

namespace prunekernels {
namespace {

constexpr int64_t kBlockFloats = 8 << 10;  // packed planes and sums: two thirds of L1
constexpr int64_t kFetched = 1024;         // floats of a plane that are fetched ahead
constexpr int64_t kTasksPerThread = 4;     // where images do not divide among the threads

Axis axis_of(DepthwiseConv::Direction direction, const ConvShape& s, int axis) {
  return direction == DepthwiseConv::kForward ? forward_axis(s, axis) : grad_input_axis(s, axis);
}

int64_t even_rows(int64_t rows, int64_t fit) {
  return divide_up(rows, divide_up(rows, std::clamp<int64_t>(fit, 1, rows)));
}

// Small planes end before the hardware would fetch ahead, and live ones lie apart. Of a large one only the beginning.
template <bool kToWrite = false>
void fetch_plane(const float* plane, int64_t floats) {
  constexpr int64_t kLine = 16;
  for (int64_t i = 0; i < std::min(floats, kFetched); i += kLine) __builtin_prefetch(plane + i, kToWrite);
}

int planes_that_fit(bool is_whole, int64_t plane_floats) {
  if (!is_whole) return 1;
  return static_cast<int>(std::clamp<int64_t>(kBlockFloats / std::max<int64_t>(1, plane_floats), 1, kMostPlanes));
}

}  // namespace

DepthwiseConv::DepthwiseConv(Direction direction, const ConvShape& shape, const MaskTable& mask, int64_t threads)
    : shape_(shape),
      mask_(mask),
      kernels_(depthwise_kernels()),
      plane_(axis_of(direction, shape, 0), axis_of(direction, shape, 1), kernels_) {
  const PlaneLayout& layout = plane_.layout();
  const int64_t rows = layout.rows.longest(), across = static_cast<int64_t>(layout.columns.classes.size());
  sums_row_ = divide_up(layout.columns.longest(), kernels_.lanes) * kernels_.lanes;
  const int64_t sums_row = across > 1 ? across * sums_row_ : 0;
  block_rows_ = even_rows(rows, rows_that_fit(plane_.row_floats() + sums_row, layout.extra_rows, kBlockFloats));
  sums_floats_ = block_rows_ * sums_row;
  plane_.set_rows(block_rows_);
  planes_ = planes_that_fit(block_rows_ == rows, plane_.floats());
  for (const AxisClass& r : layout.rows.classes)
    for (const AxisClass& c : layout.columns.classes) {
      classes_.push_back({&r, &c, plane_.parts(r, c, shape.S)});
    }
  const int64_t most = std::max<int64_t>(1, shape.C / kMostPlanes);
  parts_ = shape.N % threads == 0 ? 1 : std::min(most, divide_up(kTasksPerThread * threads, shape.N));
}

// is_exact: nothing is written behind the last row; rows that follow one another without a gap may overwrite what was
// written behind the one before. Else whole vectors are written.
void DepthwiseConv::compute(const Class& c, const DepthwiseTile& tile, int64_t rows, int64_t columns,
                            bool is_exact) const {
  const int lanes = kernels_.lanes;
  const int64_t vectors = divide_up(columns, lanes);
  const bool overwrites = tile.y_row == columns && vectors <= kMostTileVectors;
  each_tile(kernels_.columns, rows, vectors, [&](int64_t row, int64_t height, int64_t vector, int64_t width) {
    DepthwiseTile here = tile;
    here.parts = c.parts.data(), here.part_count = static_cast<int64_t>(c.parts.size());
    here.x += row * tile.x_row + vector * lanes;
    here.y += row * tile.y_row + vector * lanes;
    here.last = is_exact && vector + width == vectors ? static_cast<int>(columns - (vectors - 1) * lanes) : lanes;
    // The vector behind a row's end must not reach past the rows' end.
    here.whole_rows = overwrites ? rows - row - divide_up(vectors * lanes, columns) + 1 : 0;
    kernels_.columns.conv[height][width](here);
  });
}

void DepthwiseConv::compute_rows(const float* packed, const float* weights, float start, int64_t first_row,
                                 int64_t rows, float* plane, float* sums) const {
  const PlaneLayout& layout = plane_.layout();
  const int64_t width = layout.columns.result, across = static_cast<int64_t>(layout.columns.classes.size());
  for (size_t i = 0; i < classes_.size(); i += across) {
    const AxisClass& down = *classes_[i].rows;
    const int64_t count = std::min(rows, down.count - first_row), y_row = down.every * width;
    if (count < 1) continue;
    float* y = plane + (down.first + down.every * first_row) * width;
    DepthwiseTile tile{};
    tile.x = packed, tile.x_row = plane_.pitch();
    tile.weights = weights, tile.start = &start;
    for (int64_t c = 0; c < across; ++c) {
      const Class& here = classes_[i + c];
      tile.y = across > 1 ? sums + c * block_rows_ * sums_row_ : y;
      tile.y_row = across > 1 ? sums_row_ : y_row;
      compute(here, tile, count, here.columns->count, across == 1);
    }
    if (across == 2) kernels_.merge_rows(sums, sums + block_rows_ * sums_row_, sums_row_, count, width, y, y_row);
    for (int64_t r = 0; across > 2 && r < count; ++r)
      for (int64_t q = 0; q < width; ++q)
        y[r * y_row + q] = sums[(q % across * block_rows_ + r) * sums_row_ + q / across];
  }
}

// The plane that follows this one by as many live channels as are packed together.
void DepthwiseConv::fetch_next(const float* operand, int64_t plane, int32_t channel) const {
  const int64_t next = mask_.out_slot()[channel] + planes_;
  if (next < mask_.out_count()) fetch_plane(operand + mask_.out_index()[next] * plane, plane);
}

void DepthwiseConv::compute_planes(const float* operand, const float* weights, float* result, const float* start,
                                   const int32_t* channels, int count, float* scratch) const {
  const PlaneLayout& layout = plane_.layout();
  const int64_t rows = layout.rows.longest(), floats = plane_.floats();
  const int64_t operand_plane = layout.rows.operand * layout.columns.operand;
  const int64_t result_plane = layout.rows.result * layout.columns.result;
  for (int64_t first = 0; first < rows; first += block_rows_) {
    const int64_t block = std::min(block_rows_, rows - first);
    for (int i = 0; i < count; ++i) {
      if (first == 0) fetch_next(operand, operand_plane, channels[i]);
      plane_.pack(operand + channels[i] * operand_plane, first, block, scratch + i * floats);
    }
    for (int i = 0; i < count; ++i)
      compute_rows(scratch + i * floats, weights + channels[i] * shape_.taps(), start ? start[channels[i]] : 0, first,
                   block, result + channels[i] * result_plane, scratch + planes_ * floats);
  }
}

void DepthwiseConv::run(const float* operand, const float* weights, float* result, const float* start, int64_t task,
                        float* scratch) const {
  const PlaneLayout& layout = plane_.layout();
  const int64_t operand_plane = layout.rows.operand * layout.columns.operand;
  const int64_t result_plane = layout.rows.result * layout.columns.result;
  const int64_t image = task / parts_, part = task % parts_, C = shape_.C;
  operand += image * C * operand_plane;
  result += image * C * result_plane;
  std::fill(scratch, scratch + planes_ * plane_.floats(), 0.f);
  int32_t batch[kMostPlanes];
  int count = 0;
  for (int64_t c = C * part / parts_; c < C * (part + 1) / parts_; ++c) {
    if (result_plane <= kFetched && c + kMostPlanes < C)
      fetch_plane<true>(result + (c + kMostPlanes) * result_plane, result_plane);
    if (mask_.out_slot()[c] < 0) {
      std::memset(result + c * result_plane, 0, result_plane * sizeof(float));
      continue;
    }
    batch[count++] = static_cast<int32_t>(c);
    if (count < planes_) continue;
    compute_planes(operand, weights, result, start, batch, count, scratch);
    count = 0;
  }
  if (count) compute_planes(operand, weights, result, start, batch, count, scratch);
}

DepthwiseGradWeight::DepthwiseGradWeight(const ConvShape& shape, const MaskTable& mask, int64_t threads)
    : shape_(shape),
      kernels_(depthwise_kernels()),
      plane_(forward_axis(shape, 0), forward_axis(shape, 1), kernels_),
      live_(without_padding(mask.out_index(), 0, mask.out_count())) {
  const PlaneLayout& layout = plane_.layout();
  block_rows_ = even_rows(shape.P, rows_that_fit(plane_.row_floats(), layout.extra_rows, kBlockFloats));
  plane_.set_rows(block_rows_);
  parts_ = plane_.parts(layout.rows.classes[0], layout.columns.classes[0], shape.S);
  sums_floats_ = divide_up(taps(), 16) * 16 * kernels_.lanes;  // as add_lanes() reads them
  planes_ = planes_that_fit(block_rows_ == shape.P, plane_.floats() + sums_floats_);
  const int64_t live = static_cast<int64_t>(live_.size());
  chunks_ = divide_up(live, planes_);
  shares_ = std::clamp<int64_t>(threads / std::max<int64_t>(1, chunks_), 1, shape.N);
}

// packed: x as these rows of grad need it. end: of the plane of grad.
void DepthwiseGradWeight::add_rows(const float* packed, const float* grad, int64_t rows, const float* end,
                                   float* sums) const {
  const int lanes = kernels_.lanes;
  const int64_t vectors = divide_up(shape_.Q, lanes);
  DepthwiseDots tile{};
  tile.g_row = shape_.Q, tile.x_row = plane_.pitch();
  tile.parts = parts_.data(), tile.part_count = static_cast<int64_t>(parts_.size());
  tile.sums = sums;
  each_tile(kernels_.columns, rows, vectors, [&](int64_t row, int64_t height, int64_t vector, int64_t width) {
    tile.g = grad + row * shape_.Q + vector * lanes;
    tile.x = packed + row * tile.x_row + vector * lanes;
    tile.last = vector + width == vectors ? static_cast<int>(shape_.Q - (vectors - 1) * lanes) : lanes;
    const int64_t behind = end - tile.g - width * lanes;
    tile.whole_rows = behind < 0 ? 0 : behind / shape_.Q + 1;
    kernels_.columns.dots[height][width](tile);
  });
}

void DepthwiseGradWeight::run(const float* x, const float* grad, int64_t task, float* partial, float* scratch) const {
  const int64_t chunk = task / shares_, share = task % shares_, live = static_cast<int64_t>(live_.size());
  const int64_t first = live * chunk / chunks_, count = live * (chunk + 1) / chunks_ - first;
  const int64_t floats = plane_.floats(), in = shape_.in_pixels(), out = shape_.out_pixels(), C = shape_.C;
  float* sums = scratch + planes_ * floats;
  std::fill(scratch, scratch + scratch_floats(), 0.f);
  for (int64_t n = shape_.N * share / shares_; n < shape_.N * (share + 1) / shares_; ++n)
    for (int64_t row = 0; row < shape_.P; row += block_rows_) {
      const int64_t rows = std::min(block_rows_, shape_.P - row);
      for (int64_t i = 0; i < count; ++i) {
        if (row == 0 && n + 1 < shape_.N) {
          fetch_plane(x + ((n + 1) * C + live_[first + i]) * in, in);
          fetch_plane(grad + ((n + 1) * C + live_[first + i]) * out, out);
        }
        plane_.pack(x + (n * C + live_[first + i]) * in, row, rows, scratch + i * floats);
      }
      for (int64_t i = 0; i < count; ++i) {
        const float* plane = grad + (n * C + live_[first + i]) * out;
        add_rows(scratch + i * floats, plane + row * shape_.Q, rows, plane + out, sums + i * sums_floats_);
      }
    }
  float* to = partial + (share * live + first) * taps();
  std::fill(to, to + count * taps(), 0.f);
  for (int64_t i = 0; i < count; ++i) kernels_.add_lanes(sums + i * sums_floats_, taps(), to + i * taps());
}

void DepthwiseGradWeight::write(const float* partial, const float* scale, float* grad_weight) const {
  const int64_t live = static_cast<int64_t>(live_.size());
  std::fill(grad_weight, grad_weight + shape_.K * taps(), 0.f);
  for (int64_t i = 0; i < live; ++i) {
    const int64_t k = live_[i];
    if (scale && scale[k] == 0) continue;
    for (int64_t t = 0; t < taps(); ++t) {
      float sum = 0;
      for (int64_t s = 0; s < shares_; ++s) sum += partial[(s * live + i) * taps() + t];
      grad_weight[k * taps() + t] = scale ? sum * scale[k] : sum;
    }
  }
}

}  // namespace prunekernels
