#include "cpu/kernels/cluster_mean.h"

#include <algorithm>

#include "core/scalar_types.h"

namespace prunekernels {
namespace {

constexpr int64_t kPiece = 256;  // elements whose means fit in L1 beside a row's

template <typename T, typename A>
void mean_of(const T* rows, const int32_t* members, int64_t count, int64_t stride, int64_t length, A* mean) {
  std::fill(mean, mean + length, A{});
  for (int64_t m = 0; m < count; ++m) {
    const T* row = rows + members[m] * stride;
    for (int64_t i = 0; i < length; ++i) mean[i] += static_cast<A>(row[i]);
  }
  for (int64_t i = 0; i < length; ++i) mean[i] /= static_cast<A>(count);
}

}  // namespace

template <typename T>
void cluster_mean(T* grad, const T* weight, const int32_t* members, int64_t count, int64_t elements, double strength) {
  using A = typename Arithmetic<T>::type;
  const A pull = static_cast<A>(strength);
  A mean[kPiece], middle[kPiece];
  for (int64_t first = 0; first < elements; first += kPiece) {
    const int64_t length = std::min(kPiece, elements - first);
    mean_of(grad + first, members, count, elements, length, mean);
    if (weight) mean_of(weight + first, members, count, elements, length, middle);
    for (int64_t m = 0; m < count; ++m) {
      T* row = grad + members[m] * elements + first;
      if (!weight) {
        for (int64_t i = 0; i < length; ++i) row[i] = Arithmetic<T>::narrow(mean[i]);
        continue;
      }
      const T* w = weight + members[m] * elements + first;
      for (int64_t i = 0; i < length; ++i)
        row[i] = Arithmetic<T>::narrow(mean[i] + pull * (static_cast<A>(w[i]) - middle[i]));
    }
  }
}

#define PK_INSTANTIATE(T) template void cluster_mean(T*, const T*, const int32_t*, int64_t, int64_t, double);
PK_INSTANTIATE(float)
PK_INSTANTIATE(double)
PK_INSTANTIATE(BFloat16)
PK_INSTANTIATE(Half)
#undef PK_INSTANTIATE

}  // namespace prunekernels
