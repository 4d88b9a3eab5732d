#include <cmath>

#include "core/mask_table.h"
#include "cuda/kernels/optim.h"
#include "cuda/kernels/row_pass.cuh"

namespace prunekernels {
namespace {

constexpr int kSpan = 4;                                 // of fp32: 16 bytes
constexpr int kPieceElements = 4 * kRowThreads * kSpan;  // a parameter without rows is cut into these

struct OptimWork {
  OptimParam param;
  int64_t elements;  // rows * row_elements; the last row of a parameter that was cut into pieces may be short
  int32_t team_log;
  int64_t blocks() const { return row_blocks(param.rows, team_log); }
};

// ---- one element

struct Sgd {
  static constexpr int kStates = 1;
  using Step = SgdStep;
  // float w, g, state[kStates]: before -> after
  PK_DEVICE static void apply(const Step& step, bool first_step, float& w, float g, float (&state)[kStates]) {
    const float d = step.weight_decay != 0.0f ? fmaf(step.weight_decay, w, g) : g;
    float u = d;
    if (step.momentum != 0.0f) {
      state[0] = first_step ? d : fmaf(step.gradient_share, d, step.momentum * state[0]);
      u = step.nesterov ? fmaf(step.momentum, state[0], d) : state[0];
    }
    w = fmaf(step.negative_lr, u, w);
  }
};

struct Adamw {
  static constexpr int kStates = 2;
  using Step = AdamwStep;
  PK_DEVICE static void apply(const Step& step, bool, float& w, float g, float (&state)[kStates]) {
    float& m = state[0];
    float& v = state[1];
    const float gap = g - m;
    m = step.first_share < 0.5f ? fmaf(step.first_share, gap, m) : fmaf(-gap, 1.0f - step.first_share, g);
    v = fmaf(step.second_share, g * g, step.beta2 * v);
    const float root = __fmul_rn(sqrtf(v), step.correction) + step.eps;
    w = fmaf(step.negative_step_size, m / root, step.decay * w);
  }
};

// ---- one row

PK_DEVICE bool row_lives(const OptimParam& param, int64_t row) {
  if (param.live && param.live[row] == 0) return false;
  if (!param.out_slot) return true;
  const int32_t slot = param.out_slot[row];
  return slot >= 0 || (slot == kConstant && !param.constant_is_dead);
}

// The team's part of a live row, and its part of the sums of |change| and change^2.
template <typename Rule, typename G>
PK_DEVICE void step_row(const OptimParam& param, const typename Rule::Step& step, const RowTeam& team, int elements,
                        float (&sums)[2]) {
  const int64_t offset = team.row * param.row_elements;
  float* weight = param.weight + offset;                       // [elements]
  const G* grad = static_cast<const G*>(param.grad) + offset;  // [elements]
  float* state[2] = {param.momentum, param.square_avg};        // [elements] each
  const int phase = row_phase<kSpan>(weight);
  bool aligned = row_phase<kSpan>(grad) == phase;
#pragma unroll
  for (int i = 0; i < Rule::kStates; ++i) {
    if (!state[i]) continue;
    state[i] += offset;
    aligned = aligned && row_phase<kSpan>(state[i]) == phase;
  }

  for (int index = team.lane; index < Span<kSpan>::count(phase, elements); index += team.lanes()) {
    const Span<kSpan> span(index, phase, elements);
    const bool whole = aligned && span.inside == span.kAll;
    float w[kSpan], g[kSpan], s[2][kSpan] = {};
    load_span(w, weight, span, span.inside, whole);
    load_span(g, grad, span, span.inside, whole);
#pragma unroll
    for (int i = 0; i < Rule::kStates; ++i)
      if (state[i]) load_span(s[i], state[i], span, span.inside, whole);
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      const float before = w[i];
      float of_element[Rule::kStates];
#pragma unroll
      for (int j = 0; j < Rule::kStates; ++j) of_element[j] = s[j][i];
      Rule::apply(step, param.first_step, w[i], g[i], of_element);
#pragma unroll
      for (int j = 0; j < Rule::kStates; ++j) s[j][i] = of_element[j];
      const float change = span.inside >> i & 1 ? w[i] - before : 0.0f;
      sums[0] += fabsf(change);
      sums[1] = fmaf(change, change, sums[1]);
    }
    store_span(w, weight, span, span.inside, whole);
#pragma unroll
    for (int i = 0; i < Rule::kStates; ++i)
      if (state[i]) store_span(s[i], state[i], span, span.inside, whole);
  }
}

template <typename Rule, typename G>
PK_DEVICE void step_block(const Batch<OptimWork>& batch, const typename Rule::Step& step) {
  const int item = item_of_block(batch);
  const OptimWork& work = batch.items[item];
  const OptimParam& param = work.param;
  const RowTeam team(blockIdx.x - batch.first_block[item], work.team_log);
  const bool in_range = team.row < param.rows;
  float sums[2] = {};
  if (in_range && row_lives(param, team.row)) {
    const int64_t rest = work.elements - team.row * param.row_elements;
    step_row<Rule, G>(param, step, team, static_cast<int>(rest < param.row_elements ? rest : param.row_elements), sums);
  }
  if (!param.abs_update && !param.square_update) return;
  team_sum(sums, team);
  if (!in_range || team.lane != 0) return;
  if (param.abs_update) param.abs_update[team.row] = sums[0];
  if (param.square_update) param.square_update[team.row] = sums[1];
}

template <typename Step>
PK_DEVICE Step step_of(const Step& by_value, const Step* device) {
  if (!device) return by_value;
  return *device;
}

// A team of lanes owns a row, lane l its spans l, l + lanes, ...; both ends of a row may be cut spans.
template <typename G>
__global__ void __launch_bounds__(kRowThreads)
    optim_sgd_kernel(const Batch<OptimWork> batch, const SgdStep step, const SgdStep* device_step) {
  step_block<Sgd, G>(batch, step_of(step, device_step));
}

template <typename G>
__global__ void __launch_bounds__(kRowThreads)
    optim_adamw_kernel(const Batch<OptimWork> batch, const AdamwStep step, const AdamwStep* device_step) {
  step_block<Adamw, G>(batch, step_of(step, device_step));
}

// ---- launches

OptimWork plan_param(const OptimParam& param) {
  OptimWork work{param, param.rows * param.row_elements, 0};
  if (!param.out_slot && !param.live && !param.abs_update && !param.square_update) {
    work.param.row_elements = kPieceElements;
    work.param.rows = (work.elements + kPieceElements - 1) / kPieceElements;
  }
  work.team_log = team_log((work.param.row_elements + kSpan - 1) / kSpan);
  return work;
}

template <typename Step>
cudaError_t launch_steps(void (*kernel)(Batch<OptimWork>, Step, const Step*), const OptimParam* params, int64_t count,
                         const Step& step, const Step* device_step, cudaStream_t stream) {
  constexpr int64_t kLongestRow = std::numeric_limits<int32_t>::max() - kRowThreads * kSpan;  // offsets are 32-bit
  for (int64_t i = 0; i < count; ++i)
    if (params[i].row_elements > kLongestRow) return cudaErrorInvalidValue;
  return launch_in_batches<OptimWork>(
      count, [&](int64_t i) { return plan_param(params[i]); },
      [&](const Batch<OptimWork>& batch, unsigned grid) {
        return launch(kernel, {grid, kRowThreads, kTeamSumBytes}, stream, batch, step, device_step);
      });
}

}  // namespace

SgdStep sgd_step(double lr, double momentum, double dampening, double weight_decay, bool nesterov) {
  return {static_cast<float>(weight_decay), static_cast<float>(momentum), static_cast<float>(1 - dampening),
          static_cast<float>(-lr), nesterov};
}

AdamwStep adamw_step(double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step) {
  const double t = static_cast<double>(step);
  const float root = static_cast<float>(std::sqrt(1 - std::pow(beta2, t)));
  return {static_cast<float>(1 - lr * weight_decay),
          static_cast<float>(1 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1 - beta2),
          1.0f / root,
          static_cast<float>(eps),
          static_cast<float>(-(lr / (1 - std::pow(beta1, t))))};
}

cudaError_t launch_optim_sgd(Element grad, const OptimParam* params, int64_t count, const SgdStep& step,
                             const SgdStep* device_step, cudaStream_t stream) {
  switch (grad) {
    case Element::f32:
      return launch_steps(optim_sgd_kernel<float>, params, count, step, device_step, stream);
    case Element::bf16:
      return launch_steps(optim_sgd_kernel<BFloat16>, params, count, step, device_step, stream);
    case Element::f16:
      return launch_steps(optim_sgd_kernel<Half>, params, count, step, device_step, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_optim_adamw(Element grad, const OptimParam* params, int64_t count, const AdamwStep& step,
                               const AdamwStep* device_step, cudaStream_t stream) {
  switch (grad) {
    case Element::f32:
      return launch_steps(optim_adamw_kernel<float>, params, count, step, device_step, stream);
    case Element::bf16:
      return launch_steps(optim_adamw_kernel<BFloat16>, params, count, step, device_step, stream);
    case Element::f16:
      return launch_steps(optim_adamw_kernel<Half>, params, count, step, device_step, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace prunekernels
