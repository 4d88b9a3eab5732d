#include "cuda/kernels/mask_grad.h"

using namespace prunekernels;

extern "C" {

int pk_mask_grad(int element, const void* layers, int64_t count, bool add_to_sums) {
  return launch_mask_grad(static_cast<Element>(element), static_cast<const MaskGradLayer*>(layers), count, add_to_sums,
                          nullptr);
}
int pk_filter_norms(int element, const void* layers, int64_t count) {
  return launch_filter_norms(static_cast<Element>(element), static_cast<const NormLayer*>(layers), count, nullptr);
}
int pk_kernel_norms(int element, const void* layers, int64_t count) {
  return launch_kernel_norms(static_cast<Element>(element), static_cast<const NormLayer*>(layers), count, nullptr);
}
}
