// The loops of cast.h. Included once for each instruction set, in an anonymous namespace, inside a region that is
// compiled for it.
#include "cpu/kernels/vectors_impl.h"

template <typename From, typename To>
inline void cast(const From* from, To* to, int64_t count) {
  int64_t i = 0;
  for (; i + kVector <= count; i += kVector) store(load(from + i), to + i);
  for (; i < count; ++i) to[i] = element<To>(static_cast<float>(from[i]));
}

inline CastKernels cast_kernels_of_target() { return {cast<float, BFloat16>, cast<BFloat16, float>}; }
