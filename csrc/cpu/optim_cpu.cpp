// masked_sgd_ and masked_adamw_ on CPU: checks, and one split of all parameters' live elements among the threads.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>

#include "check.h"
#include "conv_args.h"
#include "cpu/denormals.h"
#include "cpu/kernels/optim.h"
#include "cpu/row_mask.h"
#include "cpu/shares.h"
#include "cpu/tensor_access.h"

namespace prunekernels {
namespace {

using Masks = c10::List<std::optional<at::Tensor>>;

constexpr int64_t kCut = 16;  // a parameter without rows is cut at multiples of this

struct Lists {
  const char* op;
  at::TensorList weights, grads;
  std::vector<std::pair<const char*, at::TensorList>> states;
  const Masks& masks;
  at::TensorList abs_updates, square_updates;
};

struct Param {
  at::Tensor weight, grad, state[2];  // laid out alike
  float* abs_update = nullptr;        // [rows]
  float* square_update = nullptr;     // [rows]
  std::optional<MaskTable> mask;
  RowLayout layout{};
  int64_t cost = 0;  // live elements

  bool is_vector() const { return weight.dim() == 1; }
  bool by_rows() const { return mask || abs_update || square_update; }
  // What threads share: rows that hold something live; the one row of a vector.
  int64_t units() const {
    if (mask) return is_vector() ? 1 : mask->out_count();
    return layout.rows;
  }
};

bool laid_out_alike(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
  return true;
}

// Tensors in the layout that kernels take; copies, where a tensor has another, go back when the step is done.
class Layouts {
 public:
  at::Tensor weight(const at::Tensor& weight, bool by_rows) {
    const bool serves = by_rows ? row_layout(weight).has_value() : weight.is_non_overlapping_and_dense();
    return serves ? weight : copy(weight, weight.contiguous());
  }
  at::Tensor beside(const at::Tensor& weight, const at::Tensor& tensor) {
    return laid_out_alike(tensor, weight) ? tensor : copy(tensor, at::empty_like(weight).copy_(tensor));
  }
  void write_back() {
    for (auto& [tensor, copied] : copies_) tensor.copy_(copied);
  }

 private:
  at::Tensor copy(const at::Tensor& tensor, at::Tensor copied) {
    copies_.emplace_back(tensor, copied);
    return copied;
  }
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;
};

void check_beside(const char* op, const char* argument, const at::Tensor& tensor, const at::Tensor& weight) {
  PK_CHECK(tensor.layout() == at::kStrided, op, argument, "dense tensors", tensor.layout());
  check_dtype(op, argument, tensor, weight);
  PK_CHECK(tensor.sizes() == weight.sizes(), op, argument, c10::str(weight.sizes(), " as its weight"), tensor.sizes());
}

// The [rows] that sums are written to, zeroed; null where nobody asks.
float* check_update(const char* op, const char* argument, at::TensorList updates, size_t i, const at::Tensor& weight) {
  if (updates.empty() || updates[i].numel() == 0) return nullptr;
  const at::Tensor& sums = updates[i];
  PK_CHECK(weight.dim() >= 2, op, argument, "no sums for a parameter of fewer than two dimensions", weight.sizes());
  PK_CHECK(sums.scalar_type() == at::kFloat && sums.is_contiguous() && sums.device() == weight.device() &&
               sums.dim() == 1 && sums.size(0) == weight.size(0),
           op, argument, c10::str("float32 [", weight.size(0), "], contiguous"), sums.dtype(), " ", sums.sizes());
  sums.zero_();
  return sums.mutable_data_ptr<float>();
}

void check_length(const char* op, const char* argument, size_t length, size_t count) {
  PK_CHECK(length == count, op, argument, c10::str(count, " tensors, one per weight"), length);
}

void check_lists(const Lists& lists) {
  const size_t count = lists.weights.size();
  check_length(lists.op, "grads", lists.grads.size(), count);
  check_length(lists.op, "masks", lists.masks.size(), count);
  for (const auto& [name, state] : lists.states) check_length(lists.op, name, state.size(), count);
  if (!lists.abs_updates.empty()) check_length(lists.op, "abs_updates", lists.abs_updates.size(), count);
  if (!lists.square_updates.empty()) check_length(lists.op, "square_updates", lists.square_updates.size(), count);
}

Param make_param(const Lists& lists, size_t i, Layouts& layouts) {
  const at::Tensor& weight = lists.weights[i];
  check_dtype(lists.op, "weights", weight, lists.weights[0]);
  check_beside(lists.op, "grads", lists.grads[i], weight);
  Param param;
  param.mask = read_row_mask(lists.op, lists.masks.get(i), weight);
  param.abs_update = check_update(lists.op, "abs_updates", lists.abs_updates, i, weight);
  param.square_update = check_update(lists.op, "square_updates", lists.square_updates, i, weight);
  param.weight = layouts.weight(weight, param.by_rows());
  param.grad = laid_out_alike(lists.grads[i], param.weight) ? lists.grads[i]
                                                            : at::empty_like(param.weight).copy_(lists.grads[i]);
  weight.unsafeGetTensorImpl()->bump_version();
  for (size_t s = 0; s < lists.states.size(); ++s) {
    const auto& [name, state] = lists.states[s];
    check_beside(lists.op, name, state[i], weight);
    param.state[s] = layouts.beside(param.weight, state[i]);
    state[i].unsafeGetTensorImpl()->bump_version();
  }
  param.cost = weight.numel();
  if (!param.by_rows()) return param;
  param.layout = *row_layout(param.weight);
  if (param.mask)
    param.cost = param.is_vector() ? (*param.mask)[kLiveFilters] : (*param.mask)[kLivePairs] * param.layout.taps;
  return param;
}

// One row: the elements offset..offset + length, whatever rows the parameter has.
template <typename T>
OptimRows<T> stretch(const Param& param, int64_t offset, int64_t length) {
  OptimRows<T> rows{};
  rows.weight = elements<T>(param.weight) + offset;
  rows.grad = const_elements<T>(param.grad) + offset;
  for (int s = 0; s < 2; ++s)
    if (param.state[s].defined()) rows.state[s] = elements<T>(param.state[s]) + offset;
  rows.count = 1;
  rows.elements = length;
  return rows;
}

// Live rows begin..end of the list that a mask has of them; rows one after the other with the same channels together.
template <typename T, typename Step>
void step_listed(const Param& param, OptimRows<T> rows, RowRange range, RowBits& bits, const Step& step) {
  const int32_t* list = param.mask->out_index();
  while (range.begin < range.end) {
    const int64_t first = range.begin++;
    if (list[first] < 0) continue;  // padding of a ragged group
    while (range.begin < range.end && same_channels(*param.mask, list[first], list[range.begin])) ++range.begin;
    rows.index = list + first;
    rows.count = range.begin - first;
    rows.live = bits.of_row(*param.mask, param.layout, list[first]);
    step(rows);
  }
}

// The share begin..end of a parameter's live elements: the rows, or the elements, that start in it.
template <typename T, typename Step>
void step_share(const Param& param, int64_t begin, int64_t end, RowBits& bits, const Step& step) {
  if (!param.by_rows()) {
    const auto cut = [&](int64_t at) { return at == param.cost ? at : at / kCut * kCut; };
    step(stretch<T>(param, cut(begin), cut(end) - cut(begin)));
    return;
  }
  const RowRange range(begin, end, param.cost, param.units());
  if (range.begin == range.end) return;
  if (param.mask && param.is_vector()) {
    OptimRows<T> vector = stretch<T>(param, 0, param.layout.rows);
    vector.live = bits.of_vector(*param.mask);
    step(vector);
    return;
  }
  const int64_t width = param.layout.row_elements(), first = param.mask ? 0 : range.begin;
  OptimRows<T> rows = stretch<T>(param, first * width, width);
  if (param.abs_update) rows.abs_update = param.abs_update + first;
  if (param.square_update) rows.square_update = param.square_update + first;
  if (param.mask) {
    step_listed(param, rows, range, bits, step);
  } else {
    rows.count = range.end - range.begin;
    step(rows);
  }
}

// step(i, rows of parameter i) over all live elements.
template <typename T, typename Step>
void step_all(const std::vector<Param>& params, const Step& step) {
  struct OfThread {
    const FlushDenormals flush;
    RowBits bits;
  };
  std::vector<int64_t> costs;
  for (const Param& param : params) costs.push_back(param.cost);
  share_among_threads<OfThread>(costs, [&](OfThread& thread, size_t i, int64_t first, int64_t last) {
    step_share<T>(params[i], first, last, thread.bits, [&](const OptimRows<T>& rows) { step(i, rows); });
  });
}

template <typename A>
SgdNumbers<A> sgd_numbers(double lr, double momentum, double dampening, double weight_decay, bool nesterov,
                          bool first_step) {
  return {static_cast<A>(weight_decay),
          static_cast<A>(momentum),
          static_cast<A>(1 - dampening),
          static_cast<A>(-lr),
          nesterov,
          first_step};
}

void masked_sgd(at::TensorList weights, at::TensorList grads, at::TensorList momenta, const Masks& masks,
                at::TensorList abs_updates, at::TensorList square_updates, double lr, double momentum, double dampening,
                double weight_decay, bool nesterov, bool first_step) {
  Lists lists{"masked_sgd_", weights, grads, {}, masks, abs_updates, square_updates};
  if (momentum != 0) lists.states.emplace_back("momenta", momenta);
  check_lists(lists);
  Layouts layouts;
  std::vector<Param> params;
  for (size_t i = 0; i < weights.size(); ++i) params.push_back(make_param(lists, i, layouts));
  if (params.empty()) return;
  with_element(weights[0].scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = typename Arithmetic<T>::type;
    const auto numbers = sgd_numbers<A>(lr, momentum, dampening, weight_decay, nesterov, first_step);
    auto* const step = [] {
      if constexpr (std::is_same_v<T, float>)
        return optim_kernels().sgd;
      else
        return optim_sgd<T, A>;
    }();
    step_all<T>(params, [&](size_t, const OptimRows<T>& rows) { step(rows, numbers); });
  });
  layouts.write_back();
}

// One more step; returns how many there were.
double advance(const char* op, const at::Tensor& step) {
  const bool is_double = step.scalar_type() == at::kDouble;
  PK_CHECK(step.device().is_cpu() && step.numel() == 1 && (is_double || step.scalar_type() == at::kFloat), op, "steps",
           "a float32 scalar on the CPU", step.dtype(), " ", step.sizes(), " on ", step.device());
  step.unsafeGetTensorImpl()->bump_version();
  return is_double ? ++*step.mutable_data_ptr<double>() : ++*step.mutable_data_ptr<float>();
}

template <typename A>
AdamwNumbers<A> adamw_numbers(double lr, double beta1, double beta2, double eps, double weight_decay, double t) {
  return {static_cast<A>(1 - lr * weight_decay),
          static_cast<A>(1 - beta1),
          static_cast<A>(beta2),
          static_cast<A>(1 - beta2),
          static_cast<A>(std::pow(1 - std::pow(beta2, t), 0.5)),
          static_cast<A>(eps),
          static_cast<A>(-(lr / (1 - std::pow(beta1, t))))};
}

void masked_adamw(at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                  at::TensorList steps, const Masks& masks, at::TensorList abs_updates, at::TensorList square_updates,
                  double lr, double beta1, double beta2, double eps, double weight_decay) {
  constexpr const char* op = "masked_adamw_";
  const Lists lists{op,    weights,     grads,         {{"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}},
                    masks, abs_updates, square_updates};
  check_lists(lists);
  check_length(op, "steps", steps.size(), weights.size());
  Layouts layouts;
  std::vector<Param> params;
  for (size_t i = 0; i < weights.size(); ++i) params.push_back(make_param(lists, i, layouts));
  if (params.empty()) return;
  std::vector<double> counts;
  for (const at::Tensor& step : steps) counts.push_back(advance(op, step));
  with_element(weights[0].scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = typename Arithmetic<T>::type;
    std::vector<AdamwNumbers<A>> numbers;
    for (double t : counts) numbers.push_back(adamw_numbers<A>(lr, beta1, beta2, eps, weight_decay, t));
    auto* const step = [] {
      if constexpr (std::is_same_v<T, float>)
        return optim_kernels().adamw;
      else
        return optim_adamw<T, A>;
    }();
    step_all<T>(params, [&](size_t i, const OptimRows<T>& rows) { step(rows, numbers[i]); });
  });
  layouts.write_back();
}

}  // namespace

TORCH_LIBRARY_IMPL(prunekernels, CPU, m) {
  m.impl("masked_sgd_", masked_sgd);
  m.impl("masked_adamw_", masked_adamw);
}

}  // namespace prunekernels
