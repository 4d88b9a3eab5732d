// Optimizer steps over many fp32 parameters in one launch: dead rows, and what the optimizer remembers of them, stay as
// they are. Live rows follow torch.optim's single-tensor CUDA steps to the bit; every operation rounds to fp32, and an
// fma stands where torch's kernels have one:
//   SGD     d = weight_decay ? fma(weight_decay, w, g) : g
//           v = first_step ? d : fma(1 - dampening, d, momentum * v)
//           u = nesterov ? fma(momentum, v, d) : v               (momentum 0: u = d, and there is no v)
//           w = fma(-lr, u, w)
//   AdamW   w = weight_decay ? (1 - lr weight_decay) w : w
//           m = fma(1 - beta1, g - m, m)                         (beta1 <= 0.5: fma(m - g, beta1, g))
//           v = fma(1 - beta2, g g, beta2 v)
//           w = fma(-lr / (1 - beta1^t), m / (sqrt(v) (1 / sqrt(1 - beta2^t)) + eps), w)
// Sums formed of the change of a row are deterministic.
#pragma once

#include <cstdint>

#include "cuda/kernels/stream.h"

namespace prunekernels {

// Pointers may be null where noted. A row is dead if either mask says so.
struct OptimParam {
  float* weight;            // [rows, row_elements]
  const void* grad;         // [rows, row_elements]
  float* momentum;          // [rows, row_elements]; SGD's momentum_buffer (null: momentum is 0), AdamW's exp_avg
  float* square_avg;        // [rows, row_elements]; AdamW's exp_avg_sq
  const int32_t* out_slot;  // [rows], of a mask table; kDead: dead; or null
  const uint8_t* live;      // [rows]; 0: dead; or null
  float* abs_update;        // [rows]; sum of |change of w|, 0 of a dead row; or null
  float* square_update;     // [rows]; likewise of its square
  int64_t rows, row_elements;
  bool constant_is_dead;  // kConstant rows are dead too: true of a filter's weights, false of its bias
  bool first_step;        // SGD: momentum is uninitialised where its row is live, and becomes d
};

// The numbers of one step as the kernels take them. Host arithmetic is in double, as torch's is.
struct SgdStep {
  float weight_decay, momentum, gradient_share, negative_lr;  // gradient_share: 1 - dampening
  bool nesterov;
};
SgdStep sgd_step(double lr, double momentum, double dampening, double weight_decay, bool nesterov);

struct AdamwStep {
  float decay, first_share, beta2, second_share, correction, eps, negative_step_size;
};
AdamwStep adamw_step(double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step);

// The element is the gradient's. device_step: null, or a step in device memory that replaces `step` when the kernel
// runs; a captured graph keeps `step` as it was at capture.
cudaError_t launch_optim_sgd(Element grad, const OptimParam* params, int64_t count, const SgdStep& step,
                             const SgdStep* device_step, cudaStream_t stream);
cudaError_t launch_optim_adamw(Element grad, const OptimParam* params, int64_t count, const AdamwStep& step,
                               const AdamwStep* device_step, cudaStream_t stream);

}  // namespace prunekernels
