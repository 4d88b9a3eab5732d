#include "core/cover.h"

#include <algorithm>

namespace prunekernels {
namespace {

// visit(operand position) for what output o of a class reads
template <typename Visit>
void each_read(const Axis& axis, const AxisClass& of, int64_t o, Visit visit) {
  for (const Tap& tap : of.taps) {
    const int64_t at = axis.step * o + tap.at;
    if (at >= 0 && at < axis.operand) visit(at);
  }
}

}  // namespace

// Greedy: for each position that is not covered yet, the result that covers most beside it.
std::vector<int32_t> covering_results(const Axis& axis) {
  std::vector<char> covered(axis.operand, 0);
  std::vector<int32_t> chosen;
  for (int64_t position = 0; position < axis.operand; ++position) {
    if (covered[position]) continue;
    const AxisClass* best_class = nullptr;
    int64_t best = 0, most = 0;
    for (const AxisClass& of : axis.classes)
      for (const Tap& tap : of.taps) {
        const int64_t ahead = position - tap.at, o = ahead / axis.step;
        if (ahead < 0 || ahead % axis.step || o >= of.count) continue;
        int64_t gain = 0;
        each_read(axis, of, o, [&](int64_t at) { gain += !covered[at]; });
        if (gain > most) best_class = &of, best = o, most = gain;
      }
    if (!best_class) continue;  // no result reads it
    each_read(axis, *best_class, best, [&](int64_t at) { covered[at] = 1; });
    chosen.push_back(static_cast<int32_t>(best_class->first + best_class->every * best));
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

std::optional<std::vector<int32_t>> covering_pixels(const Axis& rows, const Axis& columns) {
  const std::vector<int32_t> of_rows = covering_results(rows), of_columns = covering_results(columns);
  const size_t count = of_rows.size() * of_columns.size();
  if (count == static_cast<size_t>(rows.result * columns.result)) return std::nullopt;
  std::vector<int32_t> pixels;
  pixels.reserve(count);
  for (int32_t row : of_rows)
    for (int32_t column : of_columns) pixels.push_back(static_cast<int32_t>(row * columns.result + column));
  return pixels;
}

}  // namespace prunekernels
