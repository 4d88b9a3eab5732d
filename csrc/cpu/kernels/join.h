// Sum of two compact activations over the union of their live channels:
//   y[n, j] = a[n, a_index[j]] + alpha * b[n, b_index[j]], a term missing where its index is < 0
// join_planes is for NCHW. In NHWC, a block of pixels of each is first scattered to the union's channels
// (gather_scatter.h) and then added by join_run.
#pragma once

#include <cstdint>

namespace prunekernels {

struct JoinList {
  const int32_t* a_index;  // [channels]
  const int32_t* b_index;  // [channels]
  int64_t channels, a_channels, b_channels;
};

// Range: planes begin..end of [n * channels].
template <typename T>
void join_planes(const T* a, const T* b, T* y, int64_t pixels, double alpha, int64_t begin, int64_t end,
                 const JoinList& list);

// y = a + alpha * b
template <typename T>
void join_run(const T* a, const T* b, T* y, int64_t count, double alpha);

}  // namespace prunekernels
