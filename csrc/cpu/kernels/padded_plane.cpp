#include "cpu/kernels/padded_plane.h"

#include <algorithm>

#include "cpu/kernels/depthwise_tiles.h"

namespace prunekernels {
namespace {

int64_t round_up(int64_t size, int64_t to) { return divide_up(size, to) * to; }

}  // namespace

PaddedPlane::PaddedPlane(Axis rows, Axis columns, const DepthwiseKernels& kernels)
    : layout_(std::move(rows), std::move(columns)), kernels_(kernels) {
  const Axis& across = layout_.columns;
  layout_.pitch = round_up(layout_.pitch, kernels.lanes);
  first_column_ = std::max<int64_t>(0, layout_.low_column);
  end_column_ = std::clamp(layout_.low_column + layout_.width * across.step, first_column_,
                           std::max(first_column_, across.operand));
  const int64_t left = (first_column_ - layout_.low_column) / across.step;
  base_ = round_up(left, kernels.lanes) - left;
}

void PaddedPlane::set_rows(int64_t rows) {
  block_rows_ = rows;
  // A tile's last vector reads past the row, and copies write that far.
  const int64_t used = base_ + (rows - 1 + layout_.extra_rows) * layout_.pitch + layout_.width;
  phase_floats_ = round_up(used + kernels_.lanes, kernels_.lanes);
}

std::vector<DepthwisePart> PaddedPlane::parts(const AxisClass& rows, const AxisClass& columns,
                                              int64_t kernel_columns) const {
  return parts_of(rows.taps, columns.taps, layout_.rows.step, kernel_columns,
                  [&](const Tap& r, const Tap& c) { return base_ + layout_.offset(r, c, phase_floats_); });
}

float* PaddedPlane::phase(float* packed, int64_t row_phase, int64_t column_phase) const {
  const int place = layout_.phase[row_phase * layout_.columns.step + column_phase];
  return packed + (place < 0 ? layout_.phases : place) * phase_floats_ + base_;
}

// `rows` rows that lie from_row apart, to those of a row phase from `to` on, a distance from the start of each phase.
void PaddedPlane::pack_columns(const float* row, int64_t from_row, int64_t rows, int64_t row_phase, const float* end,
                               float* to) const {
  const int64_t step = layout_.columns.step, first = first_column_ - layout_.low_column;
  const int64_t count = end_column_ - first_column_, pitch = layout_.pitch;
  const auto at = [&](int64_t position) { return phase(to, row_phase, position % step) + position / step; };
  const float* from = row + first_column_;
  if (step == 1) return kernels_.copy_rows(from, from_row, rows, count, end, at(first), pitch);
  if (step == 2) return kernels_.split_rows(from, from_row, rows, count, end, at(first), at(first + 1), pitch);
  for (int64_t r = 0; r < rows; ++r, from += from_row)
    for (int64_t i = 0; i < count; ++i) at(first + i)[r * pitch] = from[i];
}

void PaddedPlane::pack(const float* plane, int64_t first_row, int64_t rows, float* packed) const {
  const Axis &down = layout_.rows, &across = layout_.columns;
  const int64_t packed_rows = rows + layout_.extra_rows;
  if (end_column_ == first_column_ || layout_.phases == 0) return;
  for (int64_t f = 0; f < down.step; ++f) {
    const int* phases = &layout_.phase[f * across.step];
    if (std::all_of(phases, phases + across.step, [](int p) { return p < 0; })) continue;
    const int64_t top = layout_.low_row + first_row * down.step + f;
    const int64_t begin = std::clamp<int64_t>(divide_up(-top, down.step), 0, packed_rows);
    const int64_t end = std::clamp(divide_up(down.operand - top, down.step), begin, packed_rows);
    const auto zero = [&](int64_t row) {
      for (int64_t c = 0; c < across.step; ++c) {
        float* to = phase(packed, f, c) + row * layout_.pitch;
        std::fill(to, to + layout_.width, 0.f);
      }
    };
    const bool is_whole = block_rows_ >= down.longest();  // else another block may have had its rows there
    for (int64_t u = 0; !is_whole && u < begin; ++u) zero(u);
    if (end > begin)
      pack_columns(plane + (top + begin * down.step) * across.operand, down.step * across.operand, end - begin, f,
                   plane + down.operand * across.operand, packed + begin * layout_.pitch);
    for (int64_t u = end; !is_whole && u < packed_rows; ++u) zero(u);
  }
}

}  // namespace prunekernels
