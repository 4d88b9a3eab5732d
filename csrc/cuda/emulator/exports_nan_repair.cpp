// The repair for ctypes.
#include "cuda/emulator/exports_shape.h"
#include "cuda/kernels/nan_repair.h"

using namespace prunekernels;

extern "C" {

// sizes: as shape_of() takes them. strides of the weight: row, channel, tap
int pk_repair(const int64_t* sizes, const int64_t* strides, int element, bool channels_last, bool forward,
              const void* operand, const void* weight, const void* bias, void* result, const int32_t* slot,
              const uint32_t* pairs, const int32_t* sentinels, int64_t count) {
  const Repair repair{shape_of(sizes),
                      static_cast<Element>(element),
                      channels_last,
                      operand,
                      weight,
                      {strides[0], strides[1], strides[2]},
                      bias,
                      result,
                      slot,
                      pairs,
                      {sentinels, count}};
  return (forward ? launch_repair_fwd : launch_repair_grad_input)(repair, nullptr);
}
}
