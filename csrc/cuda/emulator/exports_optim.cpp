#include "cuda/kernels/optim.h"

using namespace prunekernels;

extern "C" {

// on_device: the step is passed by pointer; what goes by value is then worthless
int pk_optim_sgd(int grad, const void* params, int64_t count, double lr, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool on_device) {
  const SgdStep step = sgd_step(lr, momentum, dampening, weight_decay, nesterov);
  return launch_optim_sgd(static_cast<Element>(grad), static_cast<const OptimParam*>(params), count,
                          on_device ? SgdStep{} : step, on_device ? &step : nullptr, nullptr);
}
int pk_optim_adamw(int grad, const void* params, int64_t count, double lr, double beta1, double beta2, double eps,
                   double weight_decay, int64_t t, bool on_device) {
  const AdamwStep step = adamw_step(lr, beta1, beta2, eps, weight_decay, t);
  return launch_optim_adamw(static_cast<Element>(grad), static_cast<const OptimParam*>(params), count,
                            on_device ? AdamwStep{} : step, on_device ? &step : nullptr, nullptr);
}
}
