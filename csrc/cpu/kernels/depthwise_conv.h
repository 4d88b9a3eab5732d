// Depthwise convolutions, NCHW, float: a filter reads one channel, so live channels are computed plane by plane, and
// dead ones are zeros in the result.
#pragma once

#include <cstdint>
#include <vector>

#include "core/mask_table.h"
#include "cpu/kernels/depthwise_kernels.h"
#include "cpu/kernels/padded_plane.h"

namespace prunekernels {

// A filter for each channel.
inline bool is_depthwise(const ConvShape& s) { return s.G > 1 && s.G == s.C && s.C == s.K; }

// Planes that are packed before the first of them is read: a load that follows the stores it needs too closely waits.
constexpr int kMostPlanes = 8;

class DepthwiseConv {
 public:
  enum Direction { kForward, kGradInput };

  DepthwiseConv(Direction direction, const ConvShape& shape, const MaskTable& mask, int64_t threads);

  int64_t tasks() const { return shape_.N * parts_; }
  int64_t scratch_floats() const { return planes_ * plane_.floats() + sums_floats_; }
  // Writes the task's share of the result, zeros of dead channels included. weights: [K, R * S]. start: [K] or null.
  void run(const float* operand, const float* weights, float* result, const float* start, int64_t task,
           float* scratch) const;

 private:
  struct Class {  // the outputs of one class of rows and one class of columns (core/conv_axes.h)
    const AxisClass *rows, *columns;
    std::vector<DepthwisePart> parts;
  };

  void compute(const Class& c, const DepthwiseTile& tile, int64_t rows, int64_t columns, bool is_exact) const;
  void compute_rows(const float* packed, const float* weights, float start, int64_t first_row, int64_t rows,
                    float* plane, float* sums) const;
  void fetch_next(const float* operand, int64_t plane, int32_t channel) const;
  void compute_planes(const float* operand, const float* weights, float* result, const float* start,
                      const int32_t* channels, int count, float* scratch) const;

  const ConvShape shape_;
  const MaskTable mask_;
  const DepthwiseKernels& kernels_;
  PaddedPlane plane_;
  std::vector<Class> classes_;  // [class of rows][class of columns]
  int64_t block_rows_;
  int planes_;                          // that are packed together
  int64_t sums_row_, sums_floats_ = 0;  // of the outputs of a class of columns, where there are several
  int64_t parts_;                       // tasks of an image
};

// Weight gradient: for each live channel and tap, the dot product of the output's gradient with the shifted input.
class DepthwiseGradWeight {
 public:
  DepthwiseGradWeight(const ConvShape& shape, const MaskTable& mask, int64_t threads);

  int64_t tasks() const { return chunks_ * shares_; }
  int64_t partial_floats() const { return shares_ * static_cast<int64_t>(live_.size()) * taps(); }
  int64_t scratch_floats() const { return planes_ * (plane_.floats() + sums_floats_); }
  // Writes its own share of partial.
  void run(const float* x, const float* grad, int64_t task, float* partial, float* scratch) const;
  // grad_weight [K, R * S]: the sum of partial gradients times scale; zeros where the filter is dead.
  void write(const float* partial, const float* scale, float* grad_weight) const;

 private:
  int64_t taps() const { return shape_.taps(); }
  void add_rows(const float* packed, const float* grad, int64_t rows, const float* end, float* sums) const;

  const ConvShape shape_;
  const DepthwiseKernels& kernels_;
  PaddedPlane plane_;
  std::vector<int32_t> live_;
  std::vector<DepthwisePart> parts_;
  int64_t block_rows_;
  int planes_;
  int64_t sums_floats_;      // of a channel
  int64_t chunks_, shares_;  // channels are shared out in chunks, images only where there are few of those
};

}  // namespace prunekernels
