// What masked_sgd_ and masked_adamw_ check and derive first, whatever the device.
#pragma once

#include <utility>
#include <vector>

#include "ops/parameter_args.h"

namespace prunekernels {

struct OptimLists {
  const char* op;
  at::TensorList weights, grads;
  std::vector<std::pair<const char*, at::TensorList>> states;
  const OptionalTensors& masks;
  at::TensorList abs_updates, square_updates;
};

void check_lists(const OptimLists& lists);

// One step more of each parameter; how many there were.
std::vector<double> advance(const OptimLists& lists, at::TensorList steps);

struct OptimTensors {                    // of one parameter
  at::Tensor weight, grad, state[2];     // laid out alike
  at::Tensor abs_update, square_update;  // [rows], to be written; undefined where not asked for
  bool by_rows;                          // of a row_layout; else of any dense one
};

// Tensors in the layout that kernels take; copies, where a tensor has another, go back when the step is done.
class OptimLayouts {
 public:
  // masked: something of parameter i is dead. Counts the edit of all that the step will write.
  OptimTensors take(const OptimLists& lists, size_t i, bool masked);
  void write_back() const;

 private:
  at::Tensor copy(const at::Tensor& tensor, at::Tensor copied);
  at::Tensor weight(const at::Tensor& weight, bool by_rows);
  at::Tensor beside(const at::Tensor& weight, const at::Tensor& tensor);

  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;
};

}  // namespace prunekernels
