// Work on many tensors at once, divided among torch's threads by amount of work rather than by tensor.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/denormals.h"
#include "cpu/row_mask.h"

namespace prunekernels {

constexpr int64_t kGrain = 32 << 10;  // elements; less per thread is not worth waking it

struct ThreadState {
  const FlushDenormals flush;
  RowBits bits;
};

// work(state, i, first, last): does the share first..last of the costs[i] units of tensor i. state: the thread's own.
template <typename Work>
void share_among_threads(const std::vector<int64_t>& costs, const Work& work) {
  std::vector<int64_t> starts(costs.size() + 1, 0);
  for (size_t i = 0; i < costs.size(); ++i) starts[i + 1] = starts[i] + costs[i];
  at::parallel_for(0, starts.back(), kGrain, [&](int64_t begin, int64_t end) {
    ThreadState state;
    size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; i < costs.size() && starts[i] < end; ++i) {
      const int64_t first = std::max(begin - starts[i], int64_t{0}), last = std::min(end - starts[i], costs[i]);
      if (first < last) work(state, i, first, last);
    }
  });
}

// The rows of a tensor that belong to the share first..last of its cost.
struct RowRange {
  int64_t begin, end;
  RowRange(int64_t first, int64_t last, int64_t cost, int64_t rows)
      : begin(first * rows / cost), end(last * rows / cost) {}
};

// work(state, i, row) for every row of every tensor; elements are the cost.
template <typename Work>
void each_row(const RowTensors& rows, const Work& work) {
  std::vector<int64_t> costs;
  for (size_t i = 0; i < rows.size(); ++i) costs.push_back(rows[i].numel());
  share_among_threads(costs, [&](ThreadState& state, size_t i, int64_t first, int64_t last) {
    const RowRange range(first, last, costs[i], rows.layout(i).rows);
    for (int64_t row = range.begin; row < range.end; ++row) work(state, i, row);
  });
}

}  // namespace prunekernels
