// Optimizer steps over rows of a parameter. Dead elements and their optimizer state are neither read nor changed. Live
// ones follow torch.optim on the CPU to the bit: every operation rounds, and an fma stands where torch's vector kernels
// have one. (cuda/kernels/optim.h follows torch's CUDA kernels, whose AdamW rounds elsewhere.)
//   SGD     d = weight_decay ? fma(weight_decay, w, g) : g
//           v = first_step ? d : fma(1 - dampening, d, momentum * v)
//           u = nesterov ? fma(momentum, v, d) : v               (momentum 0: u = d, and there is no v)
//           w = fma(-lr, u, w)
//   AdamW   w = weight_decay ? (1 - lr weight_decay) w : w
//           m = fma(1 - beta1, g - m, m)                         (beta1 <= 0.5: fma(-beta1, g - m, g))
//           v = fma((1 - beta2) g, g, beta2 v)
//           w = w + (-lr / (1 - beta1^t) m) / (sqrt(v) / sqrt(1 - beta2^t) + eps)
#pragma once

#include <cstdint>

namespace prunekernels {

// Rows of one parameter that have the same dead elements.
template <typename T>
struct OptimRows {
  T* weight;             // [.., elements]
  const T* grad;         // [.., elements]
  T* state[2];           // [.., elements] each; SGD: momentum_buffer (null: momentum is 0); AdamW: exp_avg, exp_avg_sq
  const int32_t* index;  // [count]: the rows to step (< 0: skipped); null: rows 0..count - 1
  int64_t count, elements;
  const uint32_t* live;  // a bit per element; null: all live
  float* abs_update;     // [..]: sum of |change of w| over each row; or null
  float* square_update;  // likewise of its square
};

// The numbers of one step; A: the type of arithmetic.
template <typename A>
struct SgdNumbers {
  A weight_decay, momentum, gradient_share, negative_lr;  // gradient_share: 1 - dampening
  bool nesterov, first_step;
};

template <typename A>
struct AdamwNumbers {
  A decay, first_share, beta2, second_share, root_correction, eps, negative_step_size;
};

struct OptimKernels {
  void (*sgd)(const OptimRows<float>& rows, const SgdNumbers<float>& numbers);
  void (*adamw)(const OptimRows<float>& rows, const AdamwNumbers<float>& numbers);
};
const OptimKernels& optim_kernels();  // the best the instruction set in force allows

// The same for any element type, by the scalar kernels.
template <typename T, typename A>
void optim_sgd(const OptimRows<T>& rows, const SgdNumbers<A>& numbers);
template <typename T, typename A>
void optim_adamw(const OptimRows<T>& rows, const AdamwNumbers<A>& numbers);

}  // namespace prunekernels
