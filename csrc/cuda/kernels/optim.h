// Optimizer steps over many parameters in one launch. Dead weights and their optimizer state stay as they are. Live
// ones follow torch.optim's single-tensor CUDA steps to the bit: every operation rounds to fp32, and an fma stands
// where torch's kernels have one. SGD's formulas are those of cpu/kernels/optim.h; AdamW's are rounded elsewhere:
//   AdamW   w = weight_decay ? (1 - lr weight_decay) w : w
//           m = fma(1 - beta1, g - m, m)                         (beta1 <= 0.5: fma(m - g, beta1, g))
//           v = fma(1 - beta2, g g, beta2 v)
//           w = fma(-lr / (1 - beta1^t), m / (sqrt(v) (1 / sqrt(1 - beta2^t)) + eps), w)
// 16-bit parameters are computed in fp32 and rounded when stored. Sums over a row are formed in a fixed order.
#pragma once

#include <cstdint>

#include "cuda/kernels/stream.h"
#include "cuda/kernels/weight_mask.h"

namespace prunekernels {

// The numbers of AdamW that depend on how many steps, t, the parameter has made.
struct AdamwAge {
  float correction, negative_step_size;  // 1 / sqrt(1 - beta2^t), -lr / (1 - beta1^t)
};
AdamwAge adamw_age(double lr, double beta1, double beta2, double t);

// Pointers may be null where noted.
struct OptimParam {
  void* weight;          // [rows, row_elements]
  const void* grad;      // [rows, row_elements]
  void* momentum;        // [rows, row_elements]; SGD's momentum_buffer (null: momentum is 0), AdamW's exp_avg
  void* square_avg;      // [rows, row_elements]; AdamW's exp_avg_sq
  float* abs_update;     // [rows]; sum of |change of w|, 0 of a dead row; or null
  float* square_update;  // [rows]; likewise of its square
  int64_t rows, row_elements;
  WeightMask mask;  // its sizes are those of the rows; not read where nothing is dead
  AdamwAge age;
};

// The numbers of one step as the kernels take them; the host computes them in double, as torch does.
struct SgdStep {
  float weight_decay, momentum, gradient_share, negative_lr;  // gradient_share: 1 - dampening
  bool nesterov;
  bool first_step;  // live momentum is uninitialised, and becomes d
};
SgdStep sgd_step(double lr, double momentum, double dampening, double weight_decay, bool nesterov, bool first_step);

struct AdamwStep {
  float decay, first_share, beta2, second_share, eps;
};
AdamwStep adamw_step(double lr, double beta1, double beta2, double eps, double weight_decay);

// element: of weights, gradients and states.
cudaError_t launch_optim_sgd(Element element, const OptimParam* params, int64_t count, const SgdStep& step,
                             cudaStream_t stream);
cudaError_t launch_optim_adamw(Element element, const OptimParam* params, int64_t count, const AdamwStep& step,
                               cudaStream_t stream);

}  // namespace prunekernels
