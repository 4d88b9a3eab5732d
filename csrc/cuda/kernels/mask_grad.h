// mask_grad masks and scales the weight gradients of many layers in place, in one pass, and forms the sums that pruning
// criteria read. filter_norms and kernel_norms are norms of live weights. Sums are formed in fp32, in a fixed order.
#pragma once

#include <cstdint>

#include "cuda/kernels/stream.h"
#include "cuda/kernels/weight_mask.h"

namespace prunekernels {

// g = live && scale != 0 ? g * scale : 0; all sums are of this g as it is stored. Pointers may be null where noted.
struct MaskGradLayer {
  WeightMask mask;
  void* grad;               // [K, D]
  const float* grad_scale;  // [K]; null: 1
  const void* weight;       // [K, D], of the gradient's type; for product_sum alone
  float* accumulated;       // [K, D]; += g; or null
  float* abs_sum;           // [K]; sum of |g|; or null
  float* square_sum;        // [K]; sum of g^2; or null
  float* product_sum;       // [K]; sum of w g; or null
};

// add_to_sums: the three sums are added to what their arrays hold; else they replace it. Elements that do not change
// are not written, and live ones are read only if a scale, a sum or the accumulation needs them: a plain mask costs no
// more than writing its zeros.
cudaError_t launch_mask_grad(Element element, const MaskGradLayer* layers, int64_t count, bool add_to_sums,
                             cudaStream_t stream);

// Norms of the live weights; dead ones count as 0, whatever they hold.
struct NormLayer {
  WeightMask mask;
  const void* weight;  // [K, D]
  float* abs_sum;      // [K] (kernel_norms: [K, channels]); sum of |w|; or null
  float* square_sum;   // likewise; sum of w^2; or null
};

cudaError_t launch_filter_norms(Element element, const NormLayer* layers, int64_t count, cudaStream_t stream);
cudaError_t launch_kernel_norms(Element element, const NormLayer* layers, int64_t count, cudaStream_t stream);

}  // namespace prunekernels
