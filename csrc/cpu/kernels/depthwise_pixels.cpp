#include "cpu/kernels/depthwise_pixels.h"

#include <algorithm>

#include "cpu/kernels/depthwise_tiles.h"

namespace prunekernels {
namespace {

constexpr int64_t kBlockFloats = 96 << 10;  // gathered rows and results: a good part of L2

const char* bytes(const float* p) { return reinterpret_cast<const char*>(p); }
char* bytes(float* p) { return reinterpret_cast<char*>(p); }

Axis axis_of(DepthwiseConv::Direction direction, const ConvShape& s, int axis) {
  return direction == DepthwiseConv::kForward ? forward_axis(s, axis) : grad_input_axis(s, axis);
}

}  // namespace

GatheredRows::GatheredRows(Axis rows, Axis columns, const ChannelList& list)
    : rows_(std::move(rows)),
      columns_(std::move(columns)),
      list_(list),
      gather_(pick_gather_pixels(sizeof(float), list)),
      low_row_(rows_.lowest()),
      low_column_(columns_.lowest()) {
  pitch_ = (columns_.longest() - 1) * columns_.step + columns_.highest_tap() - low_column_ + 1;
  first_column_ = std::max<int64_t>(0, low_column_);
  end_column_ = std::clamp(low_column_ + pitch_, first_column_, std::max(first_column_, columns_.operand));
}

void GatheredRows::find_parts(const AxisClass& rows, const AxisClass& columns, int64_t kernel_columns,
                              std::vector<DepthwisePart>& parts, std::vector<int32_t>& taps) const {
  for (const Tap& column : columns.taps) {
    std::vector<std::pair<int64_t, int32_t>> found;  // rows that the same outputs step through, one after the other
    for (const Tap& row : rows.taps)
      found.emplace_back(row.at - low_row_, static_cast<int32_t>(row.index * kernel_columns + column.index));
    std::sort(found.begin(), found.end(), [&](const auto& a, const auto& b) {
      return std::pair(a.first % rows_.step, a.first) < std::pair(b.first % rows_.step, b.first);
    });
    for (size_t i = 0; i < found.size(); ++i) {
      const bool follows = i > 0 && found[i].first == found[i - 1].first + rows_.step;
      if (follows && parts.back().rows < kMostPartRows)
        ++parts.back().rows;
      else
        parts.push_back({(found[i].first * pitch_ + column.at - low_column_) * list_.live, 1});
      taps.push_back(found[i].second);
    }
  }
}

// packed: columns of padding are zeros already.
void GatheredRows::pack(const float* image, int64_t first_row, int64_t rows, float* packed) const {
  const int64_t count = end_column_ - first_column_, packed_rows = rows * rows_.step + over();
  for (int64_t u = 0; u < packed_rows; ++u, packed += row_floats()) {
    const int64_t y = low_row_ + first_row * rows_.step + u;
    if (y < 0 || y >= rows_.operand)
      std::fill(packed, packed + row_floats(), 0.f);
    else
      gather_(bytes(image + (y * columns_.operand + first_column_) * list_.channels),
              bytes(packed + (first_column_ - low_column_) * list_.live), 0, count, list_);
  }
}

DepthwisePixels::DepthwisePixels(DepthwiseConv::Direction direction, const ConvShape& shape, const ChannelList& list,
                                 int64_t threads)
    : shape_(shape),
      list_(list),
      kernels_(depthwise_kernels()),
      scatter_(pick_scatter_pixels(sizeof(float), list)),
      x_(axis_of(direction, shape, 0), axis_of(direction, shape, 1), list),
      blocks_(divide_up(list.live, kernels_.lanes)) {
  const Axis &rows = x_.rows(), &columns = x_.columns();
  const int64_t sums_row = rows.classes[0].every * columns.result * list.live;
  const int64_t fit = rows_that_fit(x_.output_row() + sums_row, divide_up(x_.over(), rows.step), kBlockFloats);
  block_rows_ = balanced_rows(rows.longest(), fit, shape.N, threads);
  row_blocks_ = divide_up(rows.longest(), block_rows_);
  sums_floats_ = block_rows_ * sums_row;
  x_.set_rows(block_rows_);
  for (const AxisClass& r : rows.classes)
    for (const AxisClass& c : columns.classes) {
      classes_.push_back({&r, &c, {}, taps()});
      x_.find_parts(r, c, shape.S, classes_.back().parts, tap_);
    }
}

void DepthwisePixels::pack_weights(const float* weight, const WeightLayout& layout, const float* bias,
                                   float* packed) const {
  for (int64_t b = 0; b < blocks_; ++b)
    for (int64_t t = -1; t < taps(); ++t)
      for (int64_t i = b * lanes(); i < (b + 1) * lanes(); ++i) {
        const int64_t k = i < list_.live ? list_.index[i] : -1;
        *packed++ = k < 0 ? 0 : t >= 0 ? weight[k * layout.row + tap_[t] * layout.tap] : bias ? bias[k] : 0;
      }
}

void DepthwisePixels::run(const float* operand, const float* weights, float* result, int64_t task,
                          float* scratch) const {
  const Axis &rows = x_.rows(), &columns = x_.columns();
  const int64_t image = task / row_blocks_, first = task % row_blocks_ * block_rows_, live = list_.live;
  const int64_t block = std::min(block_rows_, rows.longest() - first), every = rows.classes[0].every;
  float* sums = scratch + x_.floats() + lanes();
  std::fill(scratch, scratch + x_.floats(), 0.f);
  x_.pack(operand + image * shape_.C * rows.operand * columns.operand, first, block, scratch);
  for (int64_t b = 0; b < blocks_; ++b) {
    const float* start = weights + b * lanes() * (taps() + 1);
    DepthwiseTile tile{};
    tile.x_row = x_.output_row(), tile.x_vector = x_.output_column();
    tile.start = start;
    tile.last = static_cast<int>(std::min(lanes(), live - b * lanes()));
    for (const Class& c : classes_) {
      const int64_t count = std::min(block, c.rows->count - first);
      float* y = sums + (c.rows->first * columns.result + c.columns->first) * live + b * lanes();
      tile.parts = c.parts.data(), tile.part_count = static_cast<int64_t>(c.parts.size());
      tile.weights = start + (1 + c.first_tap) * lanes();
      tile.y_row = c.rows->every * columns.result * live, tile.y_vector = c.columns->every * live;
      each_tile(kernels_.channels, std::max<int64_t>(0, count), c.columns->count,
                [&](int64_t row, int64_t height, int64_t column, int64_t width) {
                  tile.x = scratch + row * tile.x_row + column * tile.x_vector + b * lanes();
                  tile.y = y + row * tile.y_row + column * tile.y_vector;
                  kernels_.channels.conv[height][width](tile);
                });
    }
  }
  const int64_t begin = first * every, end = std::min((first + block) * every, rows.result);
  float* to = result + (image * rows.result + begin) * columns.result * shape_.C;
  scatter_(bytes(sums), bytes(to), 0, (end - begin) * columns.result, list_);
}

DepthwisePixelsGradWeight::DepthwisePixelsGradWeight(const ConvShape& shape, const ChannelList& list, int64_t threads)
    : shape_(shape),
      list_(list),
      kernels_(depthwise_kernels()),
      gather_(pick_gather_pixels(sizeof(float), list)),
      x_(forward_axis(shape, 0), forward_axis(shape, 1), list),
      blocks_(divide_up(list.live, kernels_.lanes)) {
  const int64_t grad_row = shape.Q * list.live;
  const int64_t fit = rows_that_fit(x_.output_row() + grad_row, divide_up(x_.over(), x_.rows().step), kBlockFloats);
  block_rows_ = balanced_rows(shape.P, fit, shape.N, threads);
  row_blocks_ = divide_up(shape.P, block_rows_);
  shares_ = std::min(threads, shape.N * row_blocks_);
  grad_floats_ = block_rows_ * grad_row;
  x_.set_rows(block_rows_);
  x_.find_parts(x_.rows().classes[0], x_.columns().classes[0], shape.S, parts_, tap_);
}

void DepthwisePixelsGradWeight::run(const float* x, const float* grad, int64_t share, float* partial,
                                    float* scratch) const {
  const int64_t lanes = kernels_.lanes, live = list_.live, tasks = shape_.N * row_blocks_;
  float *grads = scratch + x_.floats() + lanes, *sums = partial + share * share_floats();
  std::fill(scratch, scratch + x_.floats(), 0.f);
  std::fill(sums, sums + share_floats(), 0.f);
  DepthwiseDots tile{};
  tile.g_row = shape_.Q * live, tile.g_vector = live;
  tile.x_row = x_.output_row(), tile.x_vector = x_.output_column();
  tile.parts = parts_.data(), tile.part_count = static_cast<int64_t>(parts_.size());
  for (int64_t task = tasks * share / shares_; task < tasks * (share + 1) / shares_; ++task) {
    const int64_t image = task / row_blocks_, first = task % row_blocks_ * block_rows_;
    const int64_t rows = std::min(block_rows_, shape_.P - first);
    x_.pack(x + image * shape_.C * shape_.in_pixels(), first, rows, scratch);
    gather_(bytes(grad + (image * shape_.P + first) * shape_.Q * shape_.C), bytes(grads), 0, rows * shape_.Q, list_);
    for (int64_t b = 0; b < blocks_; ++b) {
      tile.sums = sums + b * taps() * lanes;
      each_tile(kernels_.channels, rows, shape_.Q, [&](int64_t row, int64_t height, int64_t column, int64_t width) {
        tile.g = grads + row * tile.g_row + column * tile.g_vector + b * lanes;
        tile.x = scratch + row * tile.x_row + column * tile.x_vector + b * lanes;
        kernels_.channels.dots[height][width](tile);
      });
    }
  }
}

void DepthwisePixelsGradWeight::write(const float* partial, const float* scale, const WeightLayout& layout,
                                      float* grad_weight) const {
  const int64_t lanes = kernels_.lanes;
  std::fill(grad_weight, grad_weight + shape_.K * shape_.taps(), 0.f);
  for (int64_t i = 0; i < list_.live; ++i) {
    const int64_t k = list_.index[i];
    if (scale && scale[k] == 0) continue;
    for (int64_t t = 0; t < taps(); ++t) {
      float sum = 0;
      for (int64_t s = 0; s < shares_; ++s)
        sum += partial[s * share_floats() + (i / lanes * taps() + t) * lanes + i % lanes];
      grad_weight[k * layout.row + tap_[t] * layout.tap] = scale ? sum * scale[k] : sum;
    }
  }
}

}  // namespace prunekernels
