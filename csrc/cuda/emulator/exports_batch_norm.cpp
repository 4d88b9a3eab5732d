#include "cuda/kernels/batch_norm.h"

using namespace prunekernels;

extern "C" {

int pk_batch_norm_workspace(int element, int64_t pixels, int64_t channels, int64_t* floats) {
  *floats = batch_norm_workspace({pixels, channels, static_cast<Element>(element), nullptr, nullptr});
  return 0;
}
int pk_batch_norm(int element, int64_t pixels, int64_t channels, const int32_t* feature, const int32_t* place,
                  const float* weight, const float* bias, float* running_mean, float* running_var, bool training,
                  double momentum, double eps, const void* x, void* y, float* mean, float* invstd, float* scale,
                  float* offset, float* workspace) {
  return launch_batch_norm({{pixels, channels, static_cast<Element>(element), feature, place},
                            weight,
                            bias,
                            running_mean,
                            running_var,
                            training,
                            momentum,
                            eps,
                            x,
                            y,
                            mean,
                            invstd,
                            {scale, offset},
                            workspace},
                           nullptr);
}
int pk_batch_norm_apply(int element, int64_t pixels, int64_t channels, const int32_t* feature, const int32_t* place,
                        const float* mean, float* scale, float* offset, const void* x, const void* add, bool relu,
                        void* y) {
  return launch_batch_norm_apply(
      {{pixels, channels, static_cast<Element>(element), feature, place}, mean, {scale, offset}, x, add, relu, y},
      nullptr);
}
int pk_batch_norm_backward(int element, int64_t pixels, int64_t channels, const int32_t* feature, const int32_t* place,
                           const float* weight, const float* mean, const float* invstd, bool training,
                           float* relu_scale, float* relu_offset, const void* grad, const void* x, void* grad_x,
                           float* grad_weight, float* grad_bias, float* workspace) {
  return launch_batch_norm_backward({{pixels, channels, static_cast<Element>(element), feature, place},
                                     weight,
                                     mean,
                                     invstd,
                                     training,
                                     {relu_scale, relu_offset},
                                     grad,
                                     x,
                                     grad_x,
                                     grad_weight,
                                     grad_bias,
                                     workspace},
                                    nullptr);
}
}
