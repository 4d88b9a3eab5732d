// A copy of one plane, or of a block of its rows, in the form that depthwise kernels read: zeros around it, rows of
// whole vectors, a strided axis taken apart into phases (plane_layout.h).
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels/depthwise_kernels.h"
#include "cpu/kernels/plane_layout.h"

namespace prunekernels {

class PaddedPlane {
 public:
  PaddedPlane(Axis rows, Axis columns, const DepthwiseKernels& kernels);

  void set_rows(int64_t rows);  // outputs of a block
  const PlaneLayout& layout() const { return layout_; }
  int64_t pitch() const { return layout_.pitch; }
  int64_t row_floats() const { return layout_.phases * layout_.pitch; }
  int64_t floats() const { return (layout_.phases + 1) * phase_floats_; }  // the last phase takes what no tap reads

  std::vector<DepthwisePart> parts(const AxisClass& rows, const AxisClass& columns, int64_t kernel_columns) const;
  // plane [rows, columns] -> packed, as output rows first_row..first_row + rows need it. packed held zeros or another
  // block before.
  void pack(const float* plane, int64_t first_row, int64_t rows, float* packed) const;

 private:
  void pack_columns(const float* row, int64_t from_row, int64_t rows, int64_t row_phase, const float* end,
                    float* to) const;
  float* phase(float* packed, int64_t row_phase, int64_t column_phase) const;

  PlaneLayout layout_;
  const DepthwiseKernels& kernels_;
  int64_t base_;                       // where position 0 of a row lies, so that the plane's first column is aligned
  int64_t first_column_, end_column_;  // the columns that are copied
  int64_t block_rows_ = 0, phase_floats_ = 0;
};

}  // namespace prunekernels
