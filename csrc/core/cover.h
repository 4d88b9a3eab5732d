// Which results to look at to know of every operand position that a convolution reads.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/conv_axes.h"

namespace prunekernels {

// Results along an axis, ascending: each operand position that any result reads is read by one of these. With three
// taps and stride 1 a third of all results do.
std::vector<int32_t> covering_results(const Axis& axis);

// The same of a plane, as pixels row * columns.result + column: every operand pixel that is read at all is read by one
// of these results, since windows are rows times columns. Nothing where it takes all results.
std::optional<std::vector<int32_t>> covering_pixels(const Axis& rows, const Axis& columns);

}  // namespace prunekernels
