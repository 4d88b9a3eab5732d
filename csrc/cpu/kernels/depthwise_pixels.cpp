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

// Whether to compute all channels rather than to copy the live ones. A tile reads and writes a short run of each
// pixel's channels, which is not fetched ahead unless pixels are narrow; copies are.
bool pays_in_place(const ChannelList& list, int lanes) {
  constexpr int64_t kNarrow = 64;  // channels
  const int64_t dead = list.channels - list.live;
  return lanes <= list.channels && list.channels <= kNarrow && 4 * dead < list.channels;
}

// Outputs of a class that have the same taps inside the operand.
struct Span {
  int64_t first, count;
  std::vector<Tap> taps;
};

std::vector<Span> spans_of(const Axis& axis, const AxisClass& c) {
  std::vector<Span> spans;
  const auto inside = [&](const Tap& t, int64_t o) {
    const int64_t at = axis.step * o + t.at;
    return at >= 0 && at < axis.operand;
  };
  const auto alike = [&](int64_t a, int64_t b) {
    return std::all_of(c.taps.begin(), c.taps.end(), [&](const Tap& t) { return inside(t, a) == inside(t, b); });
  };
  for (int64_t o = 0; o < c.count; ++o) {
    if (o > 0 && alike(o - 1, o)) {
      ++spans.back().count;
      continue;
    }
    spans.push_back({o, 1, {}});
    for (const Tap& t : c.taps)
      if (inside(t, o)) spans.back().taps.push_back(t);
  }
  return spans;
}

}  // namespace

ChannelVectors::ChannelVectors(const ChannelList& list, int lanes, bool in_place)
    : list_(list), lanes_(lanes), in_place_(in_place), count_(divide_up(in_place ? list.channels : list.live, lanes)) {
  for (int64_t v = 0; v < count_; ++v) {
    live_.push_back(0);
    for (int64_t lane = 0; lane < lanes; ++lane) live_[v] |= static_cast<uint32_t>(channel(v, lane) >= 0) << lane;
  }
}

int ChannelVectors::last(int64_t v) const { return static_cast<int>(std::min(lanes_, pixel() - begin(v))); }

int64_t ChannelVectors::channel(int64_t v, int64_t lane) const {
  const int64_t at = begin(v) + lane;
  if (at >= pixel()) return -1;
  if (in_place_) return list_.slot[at] < 0 ? -1 : at;
  return list_.index[at];
}

std::pair<int64_t, int64_t> ChannelVectors::place(int64_t i) const {
  const int64_t at = in_place_ ? list_.index[i] : i;
  return {at / lanes_, at - begin(at / lanes_)};
}

PixelOperand::PixelOperand(Axis rows, Axis columns, int64_t kernel_columns, const ChannelList& list, bool in_place)
    : rows_(std::move(rows)),
      columns_(std::move(columns)),
      list_(list),
      in_place_(in_place),
      gather_(pick_gather_pixels(sizeof(float), list)),
      low_row_(rows_.lowest()),
      low_column_(columns_.lowest()),
      pixel_(in_place ? list.channels : list.live) {
  const int64_t span = (columns_.longest() - 1) * columns_.step + columns_.highest_tap() - low_column_ + 1;
  first_column_ = std::max<int64_t>(0, low_column_);
  end_column_ = std::clamp(low_column_ + span, first_column_, std::max(first_column_, columns_.operand));
  pitch_ = in_place ? columns_.operand : span;
  find_regions(kernel_columns);
}

void PixelOperand::find_regions(int64_t kernel_columns) {
  const int64_t low_row = in_place_ ? 0 : low_row_, low_column = in_place_ ? 0 : low_column_;
  const auto offset = [&](const Tap& r, const Tap& c) {
    return ((r.at - low_row) * pitch_ + c.at - low_column) * pixel_;
  };
  const auto spans = [&](const Axis& axis, const AxisClass& c) {
    return in_place_ ? spans_of(axis, c) : std::vector<Span>{{0, c.count, c.taps}};
  };
  for (const AxisClass& r : rows_.classes)
    for (const Span& down : spans(rows_, r))
      for (const AxisClass& c : columns_.classes)
        for (const Span& across : spans(columns_, c))
          regions_.push_back({&r, &c, down.first, down.count, across.first, across.count,
                              parts_of(down.taps, across.taps, rows_.step, kernel_columns, offset)});
}

// Columns of padding are zeros already.
const float* PixelOperand::block(const float* image, int64_t first_row, int64_t rows, float* scratch) const {
  if (in_place_) return image + first_row * output_row();
  const int64_t count = end_column_ - first_column_, packed_rows = rows * rows_.step + over(), row = pitch_ * pixel_;
  float* packed = scratch;
  for (int64_t u = 0; u < packed_rows; ++u, packed += row) {
    const int64_t y = low_row_ + first_row * rows_.step + u;
    if (y < 0 || y >= rows_.operand)
      std::fill(packed, packed + row, 0.f);
    else
      gather_(bytes(image + (y * columns_.operand + first_column_) * list_.channels),
              bytes(packed + (first_column_ - low_column_) * pixel_), 0, count, list_);
  }
  return scratch;
}

DepthwisePixels::DepthwisePixels(DepthwiseConv::Direction direction, const ConvShape& shape, const ChannelList& list,
                                 int64_t threads)
    : shape_(shape),
      list_(list),
      kernels_(depthwise_kernels()),
      in_place_(pays_in_place(list, kernels_.lanes)),
      vectors_(list, kernels_.lanes, in_place_),
      scatter_(pick_scatter_pixels(sizeof(float), list)),
      x_(axis_of(direction, shape, 0), axis_of(direction, shape, 1), shape.S, list, in_place_) {
  const Axis& rows = x_.rows();
  const int64_t result_row = rows.classes[0].every * x_.columns().result * vectors_.pixel();
  const int64_t fit = rows_that_fit(x_.output_row() + result_row, divide_up(x_.over(), rows.step), kBlockFloats);
  block_rows_ = balanced_rows(rows.longest(), fit, shape.N, threads);
  row_blocks_ = divide_up(rows.longest(), block_rows_);
  sums_floats_ = in_place_ ? 0 : block_rows_ * result_row;
  x_.set_rows(block_rows_);
}

void DepthwisePixels::pack_weights(const float* weight, const float* bias, float* packed) const {
  const int64_t taps = shape_.taps(), lanes = kernels_.lanes;
  for (int64_t v = 0; v < vectors_.count(); ++v, packed += vector_floats())
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t k = vectors_.channel(v, lane);
      packed[lane] = k >= 0 && bias ? bias[k] : 0;
      for (int64_t t = 0; t < taps; ++t) packed[(1 + t) * lanes + lane] = k < 0 ? 0 : weight[k * taps + t];
    }
}

void DepthwisePixels::run(const float* operand, const float* weights, float* result, int64_t task,
                          float* scratch) const {
  const Axis &rows = x_.rows(), &columns = x_.columns();
  const int64_t image = task / row_blocks_, first = task % row_blocks_ * block_rows_, pixel = vectors_.pixel();
  const int64_t block = std::min(block_rows_, rows.longest() - first), every = rows.classes[0].every;
  const int64_t begin = first * every, end = std::min((first + block) * every, rows.result);
  const float* from = x_.block(operand + image * shape_.C * rows.operand * columns.operand, first, block, scratch);
  float* rows_of_result = result + (image * rows.result + begin) * columns.result * shape_.C;
  float* to = in_place_ ? rows_of_result : scratch + x_.floats() + kernels_.lanes;

  const auto tiles = [&](const DepthwiseRegion& region, int64_t first_vector, int64_t end_vector) {
    const int64_t top = std::max(region.first_row - first, int64_t{0});
    const int64_t count = std::min(region.first_row + region.rows - first, block) - top;
    const AxisClass &down = *region.row_class, &across = *region.column_class;
    DepthwiseTile tile{};
    tile.parts = region.parts.data(), tile.part_count = static_cast<int64_t>(region.parts.size());
    tile.x_row = x_.output_row(), tile.x_vector = x_.output_column();
    tile.y_row = down.every * columns.result * pixel, tile.y_vector = across.every * pixel;
    const float* x = from + top * tile.x_row + region.first_column * tile.x_vector;
    float* y = to + (down.first * columns.result + across.first) * pixel + top * tile.y_row +
               region.first_column * tile.y_vector;
    each_tile(kernels_.channels, std::max(count, int64_t{0}), region.columns,
              [&](int64_t row, int64_t height, int64_t column, int64_t width) {
                for (int64_t v = first_vector; v < end_vector; ++v) {
                  tile.x = x + row * tile.x_row + column * tile.x_vector + vectors_.begin(v);
                  tile.y = y + row * tile.y_row + column * tile.y_vector + vectors_.begin(v);
                  tile.start = weights + v * vector_floats();
                  tile.weights = tile.start + kernels_.lanes;
                  tile.last = vectors_.last(v), tile.live = vectors_.live(v);
                  kernels_.channels.conv[height][width](tile);
                }
              });
  };
  if (in_place_) {  // a pixel's channels are read one after the other
    for (const DepthwiseRegion& region : x_.regions()) tiles(region, 0, vectors_.count());
    return;
  }
  for (int64_t v = 0; v < vectors_.count(); ++v)
    for (const DepthwiseRegion& region : x_.regions()) tiles(region, v, v + 1);
  scatter_(bytes(to), bytes(rows_of_result), 0, (end - begin) * columns.result, list_);
}

DepthwisePixelsGradWeight::DepthwisePixelsGradWeight(const ConvShape& shape, const ChannelList& list, int64_t threads)
    : shape_(shape),
      list_(list),
      kernels_(depthwise_kernels()),
      in_place_(pays_in_place(list, kernels_.lanes)),
      vectors_(list, kernels_.lanes, in_place_),
      gather_(pick_gather_pixels(sizeof(float), list)),
      x_(forward_axis(shape, 0), forward_axis(shape, 1), shape.S, list, in_place_) {
  const int64_t grad_row = shape.Q * vectors_.pixel();
  const int64_t fit = rows_that_fit(x_.output_row() + grad_row, divide_up(x_.over(), x_.rows().step), kBlockFloats);
  block_rows_ = balanced_rows(shape.P, fit, shape.N, threads);
  row_blocks_ = divide_up(shape.P, block_rows_);
  shares_ = std::min(threads, shape.N * row_blocks_);
  grad_floats_ = in_place_ ? 0 : block_rows_ * grad_row;
  x_.set_rows(block_rows_);
}

void DepthwisePixelsGradWeight::run(const float* x, const float* grad, int64_t share, float* partial,
                                    float* scratch) const {
  const int64_t lanes = kernels_.lanes, pixel = vectors_.pixel(), tasks = shape_.N * row_blocks_;
  float *gathered = scratch + x_.floats() + lanes, *sums = partial + share * share_floats();
  std::fill(scratch, scratch + x_.floats(), 0.f);
  std::fill(sums, sums + share_floats(), 0.f);
  for (int64_t task = tasks * share / shares_; task < tasks * (share + 1) / shares_; ++task) {
    const int64_t image = task / row_blocks_, first = task % row_blocks_ * block_rows_;
    const int64_t block = std::min(block_rows_, shape_.P - first);
    const float* from = x_.block(x + image * shape_.C * shape_.in_pixels(), first, block, scratch);
    const float* grads = grad + (image * shape_.P + first) * shape_.Q * shape_.C;
    if (!in_place_) {
      gather_(bytes(grads), bytes(gathered), 0, block * shape_.Q, list_);
      grads = gathered;
    }
    const auto tiles = [&](const DepthwiseRegion& region, int64_t first_vector, int64_t end_vector) {
      const int64_t top = std::max(region.first_row - first, int64_t{0});
      const int64_t count = std::min(region.first_row + region.rows - first, block) - top;
      DepthwiseDots tile{};
      tile.parts = region.parts.data(), tile.part_count = static_cast<int64_t>(region.parts.size());
      tile.g_row = shape_.Q * pixel, tile.g_vector = pixel;
      tile.x_row = x_.output_row(), tile.x_vector = x_.output_column();
      each_tile(kernels_.channels, std::max(count, int64_t{0}), region.columns,
                [&](int64_t row, int64_t height, int64_t column, int64_t width) {
                  const int64_t r = top + row, c = region.first_column + column;
                  for (int64_t v = first_vector; v < end_vector; ++v) {
                    tile.g = grads + r * tile.g_row + c * tile.g_vector + vectors_.begin(v);
                    tile.x = from + r * tile.x_row + c * tile.x_vector + vectors_.begin(v);
                    tile.sums = sums + v * shape_.taps() * lanes;
                    kernels_.channels.dots[height][width](tile);
                  }
                });
    };
    for (const DepthwiseRegion& region : x_.regions()) {
      if (in_place_) tiles(region, 0, vectors_.count());
      for (int64_t v = 0; !in_place_ && v < vectors_.count(); ++v) tiles(region, v, v + 1);
    }
  }
}

void DepthwisePixelsGradWeight::write(const float* partial, const float* scale, float* grad_weight) const {
  const int64_t taps = shape_.taps(), lanes = kernels_.lanes;
  std::fill(grad_weight, grad_weight + shape_.K * taps, 0.f);
  for (int64_t i = 0; i < list_.live; ++i) {
    const int64_t k = list_.index[i];
    if (scale && scale[k] == 0) continue;
    const auto [v, lane] = vectors_.place(i);
    for (int64_t t = 0; t < taps; ++t) {
      float sum = 0;
      for (int64_t s = 0; s < shares_; ++s) sum += partial[s * share_floats() + (v * taps + t) * lanes + lane];
      grad_weight[k * taps + t] = scale ? sum * scale[k] : sum;
    }
  }
}

}  // namespace prunekernels
