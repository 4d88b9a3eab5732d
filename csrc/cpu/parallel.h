// Work on many tensors at once, shared among torch's threads by its amount rather than by tensor.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

namespace prunekernels {

constexpr int64_t kGrain = 32 << 10;  // elements; less per thread is not worth waking it

// work(state, i, first, last): the share first..last of the costs[i] units of tensor i; State: a thread's own.
template <typename State, typename Work>
void share_among_threads(const std::vector<int64_t>& costs, const Work& work) {
  std::vector<int64_t> starts(costs.size() + 1, 0);
  for (size_t i = 0; i < costs.size(); ++i) starts[i + 1] = starts[i] + costs[i];
  at::parallel_for(0, starts.back(), kGrain, [&](int64_t begin, int64_t end) {
    State state;
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

}  // namespace prunekernels
