// While alive, this thread's subnormal numbers are zeros: weights that decay towards zero must not slow a step down.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace prunekernels {

class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }  // results and operands
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;

 private:
  unsigned before_;
#endif
};

}  // namespace prunekernels
