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

  // g = where(E, grad_scale[k] * g, 0) in place, and of this g per row: abs_sums[k] (+)= sum |g|, square_sums[k] (+)=
  // sum g^2, product_sums[k] (+)= sum w g; accumulated += g. A grad_scale of 0 gives exact zeros. Lists other than
  // grads are [], or hold an empty tensor (or none) where nobody asks; sums and accumulated are float32 (of float64:
  // float64).
  m.def(
      "mask_grad_(Tensor(a!)[] grads, Tensor?[] masks, Tensor?[] grad_scales, Tensor[] weights, Tensor(b!)[] "
      "accumulated, Tensor(c!)[] abs_sums, Tensor(d!)[] square_sums, Tensor(e!)[] product_sums, bool add_to_sums) -> "
      "()",
      reads_on_host);

  // Of each filter [K], or of each kernel [K, C / groups]: sum |w| and sum w^2 over what is live.
  m.def("filter_norms(Tensor[] weights, Tensor?[] masks, bool per_kernel) -> (Tensor[] abs_sums, Tensor[] square_sums)",
        reads_on_host);

  // mean[c] = average over n, h, w of x[n, c, h, w], after relu where asked; float32 [C] each, 0 of nothing
  m.def("channel_mean(Tensor[] xs, bool relu) -> Tensor[]");

  // g[k] = mean over the members m of k's cluster of g[m] + strength * (w[k] - mean over m of w[m]); in place
  // clusters: int32 [K], the cluster of each row; rows below 0, and those alone in theirs, stay. weights: [] without
  // the second term.
  m.def("cluster_mean_(Tensor(a!)[] grads, Tensor[] clusters, Tensor[] weights, float strength) -> ()", reads_on_host);
}
