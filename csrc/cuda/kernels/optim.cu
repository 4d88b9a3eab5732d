#include <cmath>

#include "cuda/kernels/optim.h"
#include "cuda/kernels/weight_mask.cuh"

namespace prunekernels {
namespace {

constexpr int kBlocks = 2;  // at least so many on a multiprocessor; without this bound ptxas spills registers
constexpr int kPieceVectors = 4 * kRowThreads;  // vectors of a piece, where a parameter without rows is cut up

struct OptimWork {
  OptimParam param;
  int64_t elements;  // of the parameter; the last row of one that was cut into pieces may be short
  int32_t team_log;
  int64_t blocks() const { return row_blocks(param.rows, team_log); }
};

// ---- one element

struct Sgd {
  static constexpr int kStates = 1;
  using Step = SgdStep;
  // float w, g, state[kStates]: before -> after
  PK_DEVICE static void apply(const Step& step, const AdamwAge&, float& w, float g, float (&state)[kStates]) {
    const float d = step.weight_decay != 0.0f ? fmaf(step.weight_decay, w, g) : g;
    float u = d;
    if (step.momentum != 0.0f) {
      state[0] = step.first_step ? d : fmaf(step.gradient_share, d, step.momentum * state[0]);
      u = step.nesterov ? fmaf(step.momentum, state[0], d) : state[0];
    }
    w = fmaf(step.negative_lr, u, w);
  }
};

struct Adamw {
  static constexpr int kStates = 2;
  using Step = AdamwStep;
  PK_DEVICE static void apply(const Step& step, const AdamwAge& age, float& w, float g, float (&state)[kStates]) {
    float& m = state[0];
    float& v = state[1];
    const float gap = g - m;
    m = step.first_share < 0.5f ? fmaf(step.first_share, gap, m) : fmaf(-gap, 1.0f - step.first_share, g);
    v = fmaf(step.second_share, g * g, step.beta2 * v);
    const float root = __fmul_rn(sqrtf(v), age.correction) + step.eps;
    w = fmaf(age.negative_step_size, m / root, step.decay * w);
  }
};

// ---- one row

// Steps this thread's spans of a live row and adds their part to the sums of |change| and change^2.
template <typename Rule, typename T>
PK_DEVICE void step_row(const OptimParam& param, const typename Rule::Step& step, const RowTeam& team, int elements,
                        float (&sums)[2]) {
  constexpr int kSpan = kSpanOf<T>;
  const int64_t offset = team.row * param.row_elements;
  T* weight = static_cast<T*>(param.weight) + offset;                                  // [elements]
  const T* grad = static_cast<const T*>(param.grad) + offset;                          // [elements]
  T* state[2] = {static_cast<T*>(param.momentum), static_cast<T*>(param.square_avg)};  // [elements] each
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
    const uint32_t live = live_elements(param.mask, team.row, span);
    if (!live) continue;
    const bool readable = aligned && span.inside == span.kAll, whole = readable && live == span.kAll;
    float w[kSpan], g[kSpan], s[2][kSpan] = {};
    load_span(w, weight, span, live, readable);
    load_span(g, grad, span, live, readable);
#pragma unroll
    for (int i = 0; i < Rule::kStates; ++i)
      if (state[i]) load_span(s[i], state[i], span, live, readable);
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      const float before = w[i];
      float of_element[Rule::kStates];
#pragma unroll
      for (int j = 0; j < Rule::kStates; ++j) of_element[j] = s[j][i];
      Rule::apply(step, param.age, w[i], g[i], of_element);
      w[i] = to_float(from_float<T>(w[i]));
#pragma unroll
      for (int j = 0; j < Rule::kStates; ++j) s[j][i] = of_element[j];
      const float change = live >> i & 1 ? w[i] - before : 0.0f;
      sums[0] += fabsf(change);
      sums[1] = fmaf(change, change, sums[1]);
    }
    store_span(w, weight, span, live, whole);
#pragma unroll
    for (int i = 0; i < Rule::kStates; ++i)
      if (state[i]) store_span(s[i], state[i], span, live, whole);
  }
}

template <typename Rule, typename T, size_t kBytes>
PK_DEVICE void step_block(const Batch<OptimWork, kBytes>& batch, const typename Rule::Step& step) {
  const int item = item_of_block(batch);
  const OptimWork& work = batch.items[item];
  const OptimParam& param = work.param;
  const RowTeam team(blockIdx.x - batch.first_block[item], work.team_log);
  const bool in_range = team.row < param.rows;
  float sums[2] = {};
  if (in_range && filter_lives(param.mask, team.row)) {
    const int64_t rest = work.elements - team.row * param.row_elements;
    step_row<Rule, T>(param, step, team, static_cast<int>(rest < param.row_elements ? rest : param.row_elements), sums);
  }
  if (!param.abs_update && !param.square_update) return;
  team_sum(sums, team);
  if (!in_range || team.lane != 0) return;
  if (param.abs_update) param.abs_update[team.row] = sums[0];
  if (param.square_update) param.square_update[team.row] = sums[1];
}

// A team of threads owns a row, its lane l the spans l, l + lanes, ...; both ends of a row may be cut spans. Dead
// elements of a span are not written.
template <typename T, size_t kBytes>
__global__ void __launch_bounds__(kRowThreads, kBlocks)
    optim_sgd_kernel(const Batch<OptimWork, kBytes> batch, const SgdStep step) {
  step_block<Sgd, T>(batch, step);
}

template <typename T, size_t kBytes>
__global__ void __launch_bounds__(kRowThreads, kBlocks)
    optim_adamw_kernel(const Batch<OptimWork, kBytes> batch, const AdamwStep step) {
  step_block<Adamw, T>(batch, step);
}

// ---- launches

OptimWork plan_param(const OptimParam& param, int span) {
  OptimWork work{param, param.rows * param.row_elements, 0};
  const bool has_rows = param.mask.out_slot || param.mask.pairs || param.abs_update || param.square_update;
  if (!has_rows) {
    work.param.row_elements = kPieceVectors * span;
    work.param.rows = (work.elements + work.param.row_elements - 1) / work.param.row_elements;
  }
  work.team_log = team_log((work.param.row_elements + span - 1) / span);
  return work;
}

// Kernels::kernel<T, kBytes>() is the kernel to launch.
template <typename Kernels, typename T, size_t kBytes, typename Step>
cudaError_t launch_batches(const OptimParam* params, int64_t count, const Step& step, cudaStream_t stream) {
  const auto plan = [&](int64_t i) { return plan_param(params[i], kSpanOf<T>); };
  return launch_in_batches<OptimWork, kBytes>(count, plan, [&](const Batch<OptimWork, kBytes>& batch, unsigned grid) {
    return launch(Kernels::template kernel<T, kBytes>(), {grid, kRowThreads, kTeamSumBytes}, stream, batch, step);
  });
}

template <typename Kernels, typename Step>
cudaError_t launch_steps(Element element, const OptimParam* params, int64_t count, const Step& step,
                         cudaStream_t stream) {
  constexpr int64_t kLongestRow = std::numeric_limits<int32_t>::max() - kRowThreads * 8;  // offsets are 32-bit
  return with_element(element, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < count; ++i)
      if (plan_param(params[i], kSpanOf<T>).param.row_elements > kLongestRow) return cudaErrorInvalidValue;
    return kTakesManyParameters && count > Batch<OptimWork>::kRoom
               ? launch_batches<Kernels, T, kManyParameterBytes>(params, count, step, stream)
               : launch_batches<Kernels, T, kParameterBytes>(params, count, step, stream);
  });
}

struct SgdKernels {
  template <typename T, size_t kBytes>
  static auto kernel() {
    return optim_sgd_kernel<T, kBytes>;
  }
};
struct AdamwKernels {
  template <typename T, size_t kBytes>
  static auto kernel() {
    return optim_adamw_kernel<T, kBytes>;
  }
};

}  // namespace

SgdStep sgd_step(double lr, double momentum, double dampening, double weight_decay, bool nesterov, bool first_step) {
  return {static_cast<float>(weight_decay),
          static_cast<float>(momentum),
          static_cast<float>(1 - dampening),
          static_cast<float>(-lr),
          nesterov,
          first_step};
}

AdamwStep adamw_step(double lr, double beta1, double beta2, double eps, double weight_decay) {
  return {static_cast<float>(1 - lr * weight_decay), static_cast<float>(1 - beta1), static_cast<float>(beta2),
          static_cast<float>(1 - beta2), static_cast<float>(eps)};
}

AdamwAge adamw_age(double lr, double beta1, double beta2, double t) {
  const float root = static_cast<float>(std::sqrt(1 - std::pow(beta2, t)));
  return {1.0f / root, static_cast<float>(-(lr / (1 - std::pow(beta1, t))))};
}

cudaError_t launch_optim_sgd(Element element, const OptimParam* params, int64_t count, const SgdStep& step,
                             cudaStream_t stream) {
  return launch_steps<SgdKernels>(element, params, count, step, stream);
}

cudaError_t launch_optim_adamw(Element element, const OptimParam* params, int64_t count, const AdamwStep& step,
                               cudaStream_t stream) {
  return launch_steps<AdamwKernels>(element, params, count, step, stream);
}

}  // namespace prunekernels
