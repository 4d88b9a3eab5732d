// The steps of optim.h for the vectors of masked_simd.h: one formula for every instruction set and element type.
// Include inside a region that is compiled for that instruction set.
#pragma once

#include "cpu/kernels/masked_simd.h"
#include "cpu/kernels/optim.h"

namespace prunekernels {

template <typename V>
struct SgdRule {
  using Vector = typename V::Vector;
  using Scalar = typename Arithmetic<typename V::Element>::type;
  using Numbers = SgdNumbers<Scalar>;
  static constexpr int kStates = 1;

  Vector decay, momentum, nesterov_share, gradient_share, negative_lr;
  bool decays, remembers, first_step, nesterov;

  __attribute__((always_inline)) explicit SgdRule(const Numbers& n)
      : decay(V::rounded(V::set(n.weight_decay))),
        momentum(V::set(n.momentum)),
        nesterov_share(V::rounded(momentum)),
        gradient_share(V::rounded(V::set(n.gradient_share))),
        negative_lr(V::rounded(V::set(n.negative_lr))),
        decays(n.weight_decay != 0),
        remembers(n.momentum != 0),
        first_step(n.first_step),
        nesterov(n.nesterov) {}

  __attribute__((always_inline)) Vector operator()(Vector w, Vector g, Vector (&state)[kStates]) const {
    const Vector d = decays ? V::fma(decay, w, g) : g;
    Vector u = d;
    if (remembers) {
      state[0] = first_step ? d : V::fma(gradient_share, d, V::mul(momentum, state[0]));
      u = nesterov ? V::fma(nesterov_share, state[0], d) : state[0];
    }
    return V::fma(negative_lr, u, w);
  }
};

template <typename V>
struct AdamwRule {
  using Vector = typename V::Vector;
  using Scalar = typename Arithmetic<typename V::Element>::type;
  using Numbers = AdamwNumbers<Scalar>;
  static constexpr int kStates = 2;

  Vector decay, pull, beta2, second_share, root_correction, eps, negative_step_size;
  bool decays, from_gradient;

  __attribute__((always_inline)) explicit AdamwRule(const Numbers& n)
      : decay(V::set(n.decay)),
        pull(V::set(n.first_share < Scalar(0.5) ? n.first_share : n.first_share - 1)),
        beta2(V::set(n.beta2)),
        second_share(V::set(n.second_share)),
        root_correction(V::set(n.root_correction)),
        eps(V::set(n.eps)),
        negative_step_size(V::set(n.negative_step_size)),
        decays(n.decay != 1),
        from_gradient(!(n.first_share < Scalar(0.5))) {}

  __attribute__((always_inline)) Vector operator()(Vector w, Vector g, Vector (&state)[kStates]) const {
    if (decays) w = V::mul(decay, w);
    state[0] = V::fma(pull, V::sub(g, state[0]), from_gradient ? g : state[0]);
    state[1] = V::fma(V::mul(second_share, g), g, V::mul(beta2, state[1]));
    const Vector root = V::add(V::div(V::sqrt(state[1]), root_correction), eps);
    return V::add(w, V::div(V::mul(negative_step_size, state[0]), root));
  }
};

// For each_vector(): reads a vector of weight, gradient and states, applies the rule, writes back; kSums: sums up how
// the weight changes.
template <typename V, typename Rule, bool kSums>
struct StepVector {
  using T = typename V::Element;
  using Vector = typename V::Vector;
  using Wide = typename V::Wide;

  const Rule rule;
  T* weight;
  const T* grad;
  T* state[Rule::kStates];
  Vector abs_sum, square_sum;

  __attribute__((always_inline)) StepVector(const OptimRows<T>& rows, const typename Rule::Numbers& numbers)
      : rule(numbers) {
    move_to(rows, 0);
  }

  __attribute__((always_inline)) void move_to(const OptimRows<T>& rows, int64_t row) {
    const int64_t offset = row * rows.elements;
    weight = rows.weight + offset;
    grad = rows.grad + offset;
    for (int s = 0; s < Rule::kStates; ++s) state[s] = rows.state[s] ? rows.state[s] + offset : nullptr;
    abs_sum = square_sum = V::set(0);
  }

  __attribute__((always_inline)) void whole(int64_t i) {
    Vector before, after, kept[Rule::kStates];
    compute(i, before, after, kept);
    V::store(weight + i, after);
    for (int s = 0; s < Rule::kStates; ++s)
      if (state[s]) V::store(state[s] + i, kept[s]);
    if constexpr (kSums) sum(Wide::sub(after, before));
  }

  // Writes dead elements back with their own bits: no other thread has the row, and a masked store is slower.
  __attribute__((always_inline)) void some(int64_t i, typename V::Mask live) {
    if (!V::any(live)) return;
    Vector before, after, kept[Rule::kStates];
    compute(i, before, after, kept);
    V::store(weight + i, V::choose(live, after, before));
    for (int s = 0; s < Rule::kStates; ++s)
      if (state[s]) V::store(state[s] + i, V::choose(live, kept[s], V::load(state[s] + i)));
    if constexpr (kSums) sum(V::only(Wide::sub(after, before), live));
  }

  __attribute__((always_inline)) void last(int64_t i, typename V::Mask live) {
    Vector before, after, kept[Rule::kStates];
    compute(i, before, after, kept, live);
    V::store(weight + i, after, live);
    for (int s = 0; s < Rule::kStates; ++s)
      if (state[s]) V::store(state[s] + i, kept[s], live);
    if constexpr (kSums) sum(V::only(Wide::sub(after, before), live));
  }

  template <typename... Live>
  __attribute__((always_inline)) void compute(int64_t i, Vector& before, Vector& after, Vector (&kept)[Rule::kStates],
                                              Live... live) const {
    before = V::load(weight + i, live...);
    for (int s = 0; s < Rule::kStates; ++s) kept[s] = state[s] ? V::load(state[s] + i, live...) : V::set(0);
    after = rule(before, V::load(grad + i, live...), kept);
  }

  __attribute__((always_inline)) void sum(Vector change) {
    abs_sum = Wide::add(abs_sum, V::abs(change));
    square_sum = Wide::fma(change, change, square_sum);
  }
};

// Prefetches the first lines of the next row: the hardware cannot guess it where rows are skipped.
template <typename Rule, typename T>
PK_INLINE void prefetch_row(const OptimRows<T>& rows, int64_t row) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t offset = row * rows.elements, length = rows.elements < 8 * kLine ? rows.elements : 8 * kLine;
  for (int64_t i = offset; i < offset + length; i += kLine) {
    __builtin_prefetch(rows.weight + i, 1);
    __builtin_prefetch(rows.grad + i);
    for (int s = 0; s < Rule::kStates; ++s)
      if (rows.state[s]) __builtin_prefetch(rows.state[s] + i, 1);
  }
}

template <typename V, typename Rule, bool kSums>
void step_each(const OptimRows<typename V::Element>& rows, const typename Rule::Numbers& numbers) {
  StepVector<V, Rule, kSums> step(rows, numbers);
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t row = rows.index ? rows.index[i] : i;
    if (row < 0) continue;
    if (rows.index && i + 1 < rows.count && rows.index[i + 1] >= 0) prefetch_row<Rule>(rows, rows.index[i + 1]);
    step.move_to(rows, row);
    each_vector<V>(rows.live, rows.elements, step);
    if constexpr (kSums) {
      if (rows.abs_update) rows.abs_update[row] = static_cast<float>(V::sum(step.abs_sum));
      if (rows.square_update) rows.square_update[row] = static_cast<float>(V::sum(step.square_sum));
    }
  }
}

template <typename V, typename Rule>
void step_rows(const OptimRows<typename V::Element>& rows, const typename Rule::Numbers& numbers) {
  const bool sums = rows.abs_update || rows.square_update;
  sums ? step_each<V, Rule, true>(rows, numbers) : step_each<V, Rule, false>(rows, numbers);
}

template <typename V>
OptimKernels optim_kernels_of() {
  return {step_rows<V, SgdRule<V>>, step_rows<V, AdamwRule<V>>};
}

}  // namespace prunekernels
