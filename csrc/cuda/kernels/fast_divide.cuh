#pragma once

#include "cuda/kernels/launch.cuh"

namespace prunekernels {

// n / by for n < 2^31, by a multiplication and a shift.
struct FastDivide {
  uint32_t by, multiplier = 0, shift = 0;
  FastDivide() : FastDivide(1) {}
  explicit FastDivide(uint32_t divisor) : by(divisor) {
    while ((uint64_t{1} << shift) < by) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by)) / by + 1);
  }
  PK_HOST_DEVICE uint32_t operator()(uint32_t n) const {
    return (static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier) >> 32) + n) >> shift;
  }
};

}  // namespace prunekernels
