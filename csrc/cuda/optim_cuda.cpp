// masked_sgd_ and masked_adamw_ on the device: all parameters in a launch or a few. Doubles, which the kernels do not
// know, go through torch.
#include <ATen/DeviceGuard.h>
#include <torch/library.h>

#include <cmath>

#include "check.h"
#include "cuda/conv_call.h"
#include "cuda/kernels/optim.h"
#include "cuda/row_mask.h"
#include "ops/optim_args.h"

namespace prunekernels {
namespace {

void* data_or_null(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

OptimParam make_param(const char* op, const OptimTensors& tensors, const RowMask& mask) {
  OptimParam param{};
  param.weight = tensors.weight.mutable_data_ptr();
  param.grad = tensors.grad.const_data_ptr();
  param.momentum = data_or_null(tensors.state[0]);
  param.square_avg = data_or_null(tensors.state[1]);
  param.abs_update = static_cast<float*>(data_or_null(tensors.abs_update));
  param.square_update = static_cast<float*>(data_or_null(tensors.square_update));
  param.rows = 1;
  param.row_elements = tensors.weight.numel();
  if (!tensors.by_rows) return param;
  const RowLayout layout = *row_layout(tensors.weight);
  param.rows = layout.rows;
  param.row_elements = layout.row_elements();
  param.mask = mask.of_rows(op, tensors.weight, layout);
  return param;
}

// What a step needs from its checks to its launch.
struct Params {
  std::vector<OptimTensors> tensors;  // some are copies, which must live until the launch
  std::vector<OptimParam> params;
  OptimLayouts layouts;

  Params(const OptimLists& lists, const std::vector<RowMask>& masks) {
    for (size_t i = 0; i < masks.size(); ++i) {
      tensors.push_back(layouts.take(lists, i, static_cast<bool>(masks[i])));
      params.push_back(make_param(lists.op, tensors.back(), masks[i]));
    }
  }
};

std::vector<RowMask> checked(const OptimLists& lists) {
  check_lists(lists);
  return read_row_masks(lists.op, lists.masks, lists.weights);
}

// ---- doubles

void put_updates(const OptimLists& lists, size_t i, const at::Tensor& change) {
  const auto asked = [&](at::TensorList sums) { return !sums.empty() && sums[i].numel() != 0; };
  if (asked(lists.abs_updates)) lists.abs_updates[i].copy_(change.abs().flatten(1).sum(1));
  if (asked(lists.square_updates)) lists.square_updates[i].copy_(change.square().flatten(1).sum(1));
}

// step(i, w) -> the new weight of parameter i; it writes the new states itself, by the mask.
template <typename Step>
void step_doubles(const OptimLists& lists, const std::vector<RowMask>& masks, const Step& step) {
  for (size_t i = 0; i < masks.size(); ++i) {
    const at::Tensor& weight = lists.weights[i];
    const at::Tensor after = masks[i].choose(step(i, weight), weight);
    put_updates(lists, i, after.sub(weight));
    weight.copy_(after);
  }
}

// ---- operators

void masked_sgd(at::TensorList weights, at::TensorList grads, at::TensorList momenta, const OptionalTensors& masks,
                at::TensorList abs_updates, at::TensorList square_updates, double lr, double momentum, double dampening,
                double weight_decay, bool nesterov, bool first_step) {
  if (weights.empty()) return;
  const at::DeviceGuard guard(weights[0].device());
  OptimLists lists{"masked_sgd_", weights, grads, {}, masks, abs_updates, square_updates};
  if (momentum != 0) lists.states.emplace_back("momenta", momenta);
  const std::vector<RowMask> read = checked(lists);
  if (weights[0].scalar_type() == at::kDouble)
    return step_doubles(lists, read, [&](size_t i, const at::Tensor& w) {
      const at::Tensor d = weight_decay != 0 ? grads[i].add(w, weight_decay) : grads[i];
      if (momentum == 0) return w.add(d, -lr);
      const at::Tensor& state = momenta[i];
      const at::Tensor v = first_step ? d : state.mul(momentum).add_(d, 1 - dampening);
      state.copy_(read[i].choose(v, state));
      return w.add(nesterov ? d.add(v, momentum) : v, -lr);
    });
  const Params params(lists, read);
  PK_LAUNCH(lists.op, launch_optim_sgd, element_of(weights[0].scalar_type()), params.params.data(),
            params.params.size(), sgd_step(lr, momentum, dampening, weight_decay, nesterov, first_step),
            device::current_stream());
  params.layouts.write_back();
}

void masked_adamw(at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                  at::TensorList steps, const OptionalTensors& masks, at::TensorList abs_updates,
                  at::TensorList square_updates, double lr, double beta1, double beta2, double eps,
                  double weight_decay) {
  if (weights.empty()) return;
  const at::DeviceGuard guard(weights[0].device());
  const OptimLists lists{
      "masked_adamw_", weights,     grads,         {{"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}},
      masks,           abs_updates, square_updates};
  const std::vector<RowMask> read = checked(lists);
  PK_CHECK(!device::capturing(), lists.op, "steps", "numbers that are read in every step",
           "the capture of a graph, which would repeat those of one");
  const std::vector<double> t = advance(lists, steps);
  if (weights[0].scalar_type() == at::kDouble)
    return step_doubles(lists, read, [&](size_t i, const at::Tensor& w) {
      const at::Tensor m = exp_avgs[i].lerp(grads[i], 1 - beta1);
      const at::Tensor v = exp_avg_sqs[i].mul(beta2).addcmul_(grads[i], grads[i], 1 - beta2);
      exp_avgs[i].copy_(read[i].choose(m, exp_avgs[i]));
      exp_avg_sqs[i].copy_(read[i].choose(v, exp_avg_sqs[i]));
      const at::Tensor root = v.sqrt().div_(std::sqrt(1 - std::pow(beta2, t[i]))).add_(eps);
      return w.mul(1 - lr * weight_decay).addcdiv_(m, root, -(lr / (1 - std::pow(beta1, t[i]))));
    });
  Params params(lists, read);
  for (size_t i = 0; i < t.size(); ++i) params.params[i].age = adamw_age(lr, beta1, beta2, t[i]);
  PK_LAUNCH(lists.op, launch_optim_adamw, element_of(weights[0].scalar_type()), params.params.data(),
            params.params.size(), adamw_step(lr, beta1, beta2, eps, weight_decay), device::current_stream());
  params.layouts.write_back();
}

}  // namespace

PK_DEVICE_OPERATORS(m) {
  m.impl("masked_sgd_", masked_sgd);
  m.impl("masked_adamw_", masked_adamw);
}

}  // namespace prunekernels
