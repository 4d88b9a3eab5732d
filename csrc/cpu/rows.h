// Work on all rows of all layers in one go.
#pragma once

#include <vector>

#include "cpu/denormals.h"
#include "cpu/parallel.h"
#include "cpu/row_mask.h"

namespace prunekernels {

struct OfThread {
  const FlushDenormals flush;
  RowBits bits;
};

// work(thread, i, row): all rows of all tensors, shared by elements.
template <typename Work>
void each_row(const Rows& rows, const Work& work) {
  std::vector<int64_t> costs;
  for (size_t i = 0; i < rows.size(); ++i) costs.push_back(rows[i].numel());
  share_among_threads<OfThread>(costs, [&](OfThread& thread, size_t i, int64_t first, int64_t last) {
    const RowRange range(first, last, costs[i], rows.layout(i).rows);
    for (int64_t row = range.begin; row < range.end; ++row) work(thread, i, row);
  });
}

}  // namespace prunekernels
