// Every operator of the library, one line of maths above each. mask, grad_mask: tables made by conv_mask; none:
// everything is live. E = filter & kernel & input mask of the table, f = its filter mask, i = its input mask; where(),
// never a product with a mask.
#include <torch/library.h>

TORCH_LIBRARY(prunekernels, m) {
  // The host reads masks and lists, once for each change, so a CUDA graph goes on with those of its capture. A user who
  // captures one has to know; torch.compile must not capture one unasked.
  const std::vector<at::Tag> reads_on_host{at::Tag::cudagraph_unsafe};

  // Sorted live lists, counts and one bit per kernel of E, in an int32 array of a size given by (K, C, G).
  m.def(
      "conv_mask(Tensor? filter_mask, Tensor? kernel_mask, Tensor? input_mask, int out_channels, int in_channels, int "
      "groups)"
      " -> Tensor");

  // y = conv2d(where(i, x, 0), where(E, weight, 0), where(f, bias, 0)); grad_mask and grad_scale only reach the
  // weight's gradient.
  m.def(
      "masked_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? mask, Tensor? grad_mask, Tensor? grad_scale, "
      "SymInt[2] stride,"
      " SymInt[2] padding, SymInt[2] dilation, SymInt groups, str plan) -> Tensor",
      reads_on_host);

  // grad_x = where(i, conv_transpose2d(where(f, grad_out, 0), where(E, weight, 0)), 0)
  m.def(
      "masked_conv2d_grad_input(Tensor grad_out, Tensor weight, Tensor? mask, SymInt[4] x_size, bool channels_last, "
      "SymInt[2] stride,"
      " SymInt[2] padding, SymInt[2] dilation, SymInt groups, str plan) -> Tensor",
      reads_on_host);

  // grad_w[k] = grad_scale[k] * where(E[k], correlate(x, grad_out[k]), 0); weight gives its size and layout only. The
  // hard gradient takes the layer's mask, the dense (soft) one a mask made of the input mask alone.
  m.def(
      "masked_conv2d_grad_weight(Tensor grad_out, Tensor x, Tensor weight, Tensor? mask, Tensor? grad_scale, SymInt[2] "
      "stride,"
      " SymInt[2] padding, SymInt[2] dilation, SymInt groups, str plan) -> Tensor",
      reads_on_host);

  // grad_b[k] = where(f[k], sum over n, p, q of grad_out[n, k, p, q], 0)
  m.def("masked_conv2d_grad_bias(Tensor grad_out, Tensor? mask) -> Tensor", reads_on_host);

  // compact[n, j] = x[n, index[j]]
  m.def("gather_channels(Tensor x, Tensor index) -> Tensor", reads_on_host);

  // full[n, index[j]] = x[n, j], 0 elsewhere
  m.def("scatter_channels(Tensor x, Tensor index, SymInt channels) -> Tensor", reads_on_host);

  // ---- live mode: activations that hold live channels alone ----

  // y[n, j] = x[n, index[j]], 0 where index[j] is -1. inverse[c] = j where index[j] = c, else -1: the adjoint is the
  // same operator with the two exchanged.
  m.def("regroup_channels(Tensor x, Tensor index, Tensor inverse) -> Tensor", reads_on_host);

  // y[n, j] = a[n, a_index[j]] + alpha * b[n, b_index[j]], a term missing where its index is -1. Every channel of a and
  // b has a place in y: a_inverse, b_inverse.
  m.def(
      "join_channels(Tensor a, Tensor b, Tensor a_index, Tensor b_index, Tensor a_inverse, Tensor b_inverse, float "
      "alpha) -> Tensor",
      reads_on_host);

  // w[i, j] = weight[out_index[i], in_index[j]], the lists of mask, which knows of no single dead kernel.
  m.def("pack_weight(Tensor weight, Tensor mask, SymInt filters, SymInt channels) -> Tensor", reads_on_host);

  // Its adjoint: full width [K, C / groups, R, S], zeros elsewhere.
  m.def("unpack_grad_weight(Tensor grad, Tensor mask, SymInt filters, SymInt channels, bool channels_last) -> Tensor",
        reads_on_host);

  // Gives a tensor without memory of its own an autograd history: its gradient, gathered, is that of compact.
  m.def("attach_live(Tensor(a!) full, Tensor compact, Tensor index) -> ()");

  // y = (x - mean) / sqrt(var + eps) * weight + bias, for the channels index of a norm of `features` channels; mean and
  // var of the batch (training), or running_mean and running_var, which training moves: r += momentum * (batch - r), at
  // index alone. x has these channels, or all: y is 0 in the others, which are not looked at. x float32 or bfloat16, on
  // CUDA also float16, the rest float32. On CUDA an index of -1 stands for a channel of x that is none: y is 0. Also
  // returns what backward needs: mean and 1 / sqrt(var + eps) of the channels of index.
  m.def(
      "masked_batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor? index, SymInt features, bool training, float momentum, float eps) -> (Tensor, Tensor, Tensor)",
      reads_on_host);

  // grad_x, and grad_weight and grad_bias [features], zero but at index. relu_table: of a norm with a relu behind it,
  // the table of deferred_batch_norm; grad is the gradient behind the relu.
  m.def(
      "masked_batch_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, Tensor? index, "
      "SymInt features, bool training, Tensor? relu_table=None) -> (Tensor, Tensor, Tensor)",
      reads_on_host);

  // A norm in two halves, so that what follows it needs no pass of its own. The first: statistics, a y that is not
  // written yet, what the second needs, which is the rows mean, 1 / sqrt(var + eps), scale and bias [4, channels of x],
  // and a gate for batch_norm_relu, int64 [2]: whether it is open, and the backward pass in which the norm is to take
  // the relu's gradient. x has the channels of index alone.
  m.def(
      "deferred_batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor? index, SymInt features, bool training, float momentum, float eps) -> (Tensor, Tensor, Tensor)",
      reads_on_host);

  // The second: y = (x - mean) * scale + bias, + add, relu of that.
  m.def(
      "apply_batch_norm_(Tensor(a!) y, Tensor x, Tensor table, Tensor? index, SymInt features, Tensor? add, bool "
      "relu) -> ()",
      reads_on_host);

  // relu(y), or relu(y + add) where that is the deferred sum y, computed from x. gate: where given, y is the norm's own
  // result, which nothing else has read: the norm takes the gradient of the relu with its own.
  m.def(
      "batch_norm_relu(Tensor y, Tensor x, Tensor table, Tensor? index, SymInt features, Tensor? add, "
      "Tensor? gate) -> Tensor",
      reads_on_host);

  // a + b of the same sizes, not written yet.
  m.def("deferred_sum(Tensor a, Tensor b) -> Tensor");

  // ---- a training step: updates, gradients and statistics ----

  // Lists hold one tensor per parameter. masks: tables made by conv_mask, of the filters (and channels) of a weight or
  // the length of a vector; none: nothing is dead. What is dead is neither read nor written.

  // d = g + weight_decay w; v = first_step ? d : momentum v + (1 - dampening) d; w -= lr (nesterov ? d + momentum v :
  // v) momenta: none if momentum is 0. abs_updates, square_updates: [], or float32 [rows] that take the sum of |change
  // of w| and of its square over each row; empty tensors where not asked for.
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
  // grads are [], or hold an empty tensor (or none) where not asked for; sums and accumulated are float32 (of float64:
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

  // ---- a change of masks: rows and columns of many tensors, into small tensors and back ----

  // part[i, j, ...] = whole[rows[i], columns[j], ...], 0 where either is -1. rows, columns: int64 on the CPU, whatever
  // the device of the tensors; none: all, in order. A tensor of one dimension has rows alone. columns [groups, length]:
  // the rows of a part are in as many equal groups, and those of group g take columns[g], as the kernels of a grouped
  // convolution do. Tensors may lie in any way, but no part in the memory of its whole.
  m.def("gather_parts_(Tensor(a!)[] parts, Tensor[] wholes, Tensor?[] rows, Tensor?[] columns) -> ()", reads_on_host);

  // whole[rows[i], columns[j], ...] = part[i, j, ...]; a -1 is left out, and of a place that is listed twice, either
  // value stays.
  m.def("scatter_parts_(Tensor(a!)[] wholes, Tensor[] parts, Tensor?[] rows, Tensor?[] columns) -> ()", reads_on_host);
}
