#include "cuda/kernels/optim.h"

using namespace prunekernels;

extern "C" {

int pk_optim_sgd(int element, const void* params, int64_t count, double lr, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool first_step) {
  const SgdStep step = sgd_step(lr, momentum, dampening, weight_decay, nesterov, first_step);
  return launch_optim_sgd(static_cast<Element>(element), static_cast<const OptimParam*>(params), count, step, nullptr);
}
int pk_optim_adamw(int element, const void* params, int64_t count, double lr, double beta1, double beta2, double eps,
                   double weight_decay) {
  const AdamwStep step = adamw_step(lr, beta1, beta2, eps, weight_decay);
  return launch_optim_adamw(static_cast<Element>(element), static_cast<const OptimParam*>(params), count, step,
                            nullptr);
}
int pk_adamw_age(double lr, double beta1, double beta2, double t, float* age) {
  const AdamwAge of_step = adamw_age(lr, beta1, beta2, t);
  age[0] = of_step.correction;
  age[1] = of_step.negative_step_size;
  return 0;
}
}
