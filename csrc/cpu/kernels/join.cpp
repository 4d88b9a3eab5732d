#include "cpu/kernels/join.h"

#include <algorithm>

#include "core/scalar_types.h"

namespace prunekernels {
namespace {

template <typename T>
T sum(T a, T b, typename Arithmetic<T>::type alpha) {
  using A = typename Arithmetic<T>::type;
  return Arithmetic<T>::narrow(static_cast<A>(a) + alpha * static_cast<A>(b));
}

template <typename T>
T times(T b, typename Arithmetic<T>::type alpha) {
  return Arithmetic<T>::narrow(alpha * static_cast<typename Arithmetic<T>::type>(b));
}

template <typename T>
void join_plane(const T* a, const T* b, T* y, int64_t pixels, double alpha) {
  if (a && b) {
    for (int64_t i = 0; i < pixels; ++i) y[i] = sum(a[i], b[i], alpha);
  } else if (a) {
    std::copy_n(a, pixels, y);
  } else if (b) {
    for (int64_t i = 0; i < pixels; ++i) y[i] = times(b[i], alpha);
  } else {
    std::fill_n(y, pixels, T{});
  }
}

}  // namespace

template <typename T>
void join_planes(const T* a, const T* b, T* y, int64_t pixels, double alpha, int64_t begin, int64_t end,
                 const JoinList& list) {
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t n = plane / list.channels, j = plane % list.channels;
    const int32_t from_a = list.a_index[j], from_b = list.b_index[j];
    join_plane(from_a < 0 ? nullptr : a + (n * list.a_channels + from_a) * pixels,
               from_b < 0 ? nullptr : b + (n * list.b_channels + from_b) * pixels, y + plane * pixels, pixels, alpha);
  }
}

template <typename T>
void join_run(const T* a, const T* b, T* y, int64_t count, double alpha) {
  for (int64_t i = 0; i < count; ++i) y[i] = sum<T>(a[i], b[i], static_cast<typename Arithmetic<T>::type>(alpha));
}

#define PK_INSTANTIATE(T)                                                                                   \
  template void join_planes<T>(const T*, const T*, T*, int64_t, double, int64_t, int64_t, const JoinList&); \
  template void join_run<T>(const T*, const T*, T*, int64_t, double);
PK_INSTANTIATE(float)
PK_INSTANTIATE(double)
PK_INSTANTIATE(BFloat16)
PK_INSTANTIATE(Half)
#undef PK_INSTANTIATE

}  // namespace prunekernels
