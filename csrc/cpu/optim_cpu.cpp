// masked_sgd_ and masked_adamw_ on CPU: checks, and one split of all parameters' live elements among the threads.
#include <torch/library.h>

#include <cmath>

#include "cpu/kernels/optim.h"
#include "cpu/parallel.h"
#include "cpu/tensor_access.h"
#include "ops/optim_args.h"

namespace prunekernels {
namespace {

constexpr int64_t kCut = 16;  // a parameter without rows is cut at multiples of this

struct Param : OptimTensors {
  float* abs_updates = nullptr;     // [rows]
  float* square_updates = nullptr;  // [rows]
  std::optional<MaskTable> mask;
  RowLayout layout{};
  int64_t cost = 0;  // live elements

  bool is_vector() const { return weight.dim() == 1; }
  // What threads share: rows that hold something live; the one row of a vector.
  int64_t units() const {
    if (mask) return is_vector() ? 1 : mask->out_count();
    return layout.rows;
  }
};

// Zeroed; null where not asked for.
float* zeroed(const at::Tensor& sums) { return sums.defined() ? sums.zero_().mutable_data_ptr<float>() : nullptr; }

std::vector<Param> make_params(const OptimLists& lists, OptimLayouts& layouts) {
  check_lists(lists);
  std::vector<Param> params;
  for (size_t i = 0; i < lists.weights.size(); ++i) {
    const auto mask = read_row_mask(lists.op, lists.masks.get(i), lists.weights[i]);
    Param& param = params.emplace_back(Param{layouts.take(lists, i, mask.has_value())});
    param.mask = mask;
    param.abs_updates = zeroed(param.abs_update);
    param.square_updates = zeroed(param.square_update);
    param.cost = param.weight.numel();
    if (!param.by_rows) continue;
    param.layout = *row_layout(param.weight);
    if (mask) param.cost = param.is_vector() ? (*mask)[kLiveFilters] : (*mask)[kLivePairs] * param.layout.taps;
  }
  return params;
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
  if (!param.by_rows) {
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
  if (param.abs_updates) rows.abs_update = param.abs_updates + first;
  if (param.square_updates) rows.square_update = param.square_updates + first;
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
  std::vector<int64_t> costs;
  for (const Param& param : params) costs.push_back(param.cost);
  share_among_threads(costs, [&](ThreadState& state, size_t i, int64_t first, int64_t last) {
    step_share<T>(params[i], first, last, state.bits, [&](const OptimRows<T>& rows) { step(i, rows); });
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

void masked_sgd(at::TensorList weights, at::TensorList grads, at::TensorList momenta, const OptionalTensors& masks,
                at::TensorList abs_updates, at::TensorList square_updates, double lr, double momentum, double dampening,
                double weight_decay, bool nesterov, bool first_step) {
  OptimLists lists{"masked_sgd_", weights, grads, {}, masks, abs_updates, square_updates};
  if (momentum != 0) lists.states.emplace_back("momenta", momenta);
  OptimLayouts layouts;
  const std::vector<Param> params = make_params(lists, layouts);
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
                  at::TensorList steps, const OptionalTensors& masks, at::TensorList abs_updates,
                  at::TensorList square_updates, double lr, double beta1, double beta2, double eps,
                  double weight_decay) {
  const OptimLists lists{
      "masked_adamw_", weights,     grads,         {{"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}},
      masks,           abs_updates, square_updates};
  OptimLayouts layouts;
  const std::vector<Param> params = make_params(lists, layouts);
  const std::vector<double> counts = advance(lists, steps);
  if (params.empty()) return;
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
