// The operators of a training step that are not convolutions, one line of maths above each; a fragment of the library
// of csrc/ops.cpp. Lists hold one tensor per parameter. masks: tables made by conv_mask, of the filters (and channels)
// of a weight or the length of a vector; none: nothing is dead. What is dead is neither read nor written.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(prunekernels, m) {
  const std::vector<at::Tag> reads_on_host{at::Tag::cudagraph_unsafe};

  // d = g + weight_decay w; v = first_step ? d : momentum v + (1 - dampening) d; w -= lr (nesterov ? d + momentum v :
  // v) momenta: none if momentum is 0. abs_updates, square_updates: [], or float32 [rows] that take the sum of |change
  // of w| and of its square over each row; empty tensors where nobody asks.
  m.def(
      "masked_sgd_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, Tensor?[] masks, Tensor(c!)[] "
      "abs_updates, Tensor(d!)[] square_updates, float lr, float momentum, float dampening, float weight_decay, bool "
      "nesterov, bool first_step) -> ()",
      reads_on_host);

  // t += 1; w *= 1 - lr weight_decay; m += (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g^2;
  // w -= lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
  // steps: t of each parameter, scalars on the CPU.
  m.def(
      "masked_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] steps, Tensor?[] masks, Tensor(e!)[] abs_updates, Tensor(f!)[] square_updates, float lr, float "
      "beta1, float beta2, float eps, float weight_decay) -> ()",
      reads_on_host);
}
