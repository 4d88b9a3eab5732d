// The loops of batch_norm.h. Included once for each instruction set, in an anonymous namespace,
// inside a region that is compiled for it.
#include "cpu/kernels/vectors_impl.h"

constexpr int kChains = 4;  // independent sums, enough to hide the latency of an addition

// Vectors of positions whose sums or parameters stay in registers while the rows go by.
#if defined(PK_AVX512)
constexpr int kGroup = 4;
#elif defined(PK_AVX2)
constexpr int kGroup = 2;
#else
constexpr int kGroup = 1;
#endif

inline Vector kept(Vector v, Words keep) { return reinterpret_cast<Vector>(reinterpret_cast<Words>(v) & keep); }

inline float kept(float v, uint32_t keep) { return keep ? v : 0.0f; }

// As torch's: of NaN NaN, and the gradient of that passes.
inline Vector relu_of(Vector v) { return kept(v, ~reinterpret_cast<Words>(v <= 0.0f)); }
inline float relu_of(float v) { return v <= 0 ? 0.0f : v; }

// grad where relu of y has a slope.
inline Vector gated(Vector grad, Vector y) { return kept(grad, ~reinterpret_cast<Words>(y <= 0.0f)); }
inline float gated(float grad, float y) { return y <= 0 ? 0.0f : grad; }

// y as T holds it, where it is an operand of a sum.
template <typename T>
inline Vector rounded(Vector y) {
  if constexpr (std::is_same_v<T, float>) return y;
  T held[kVector];
  store(y, held);
  return load(held);
}

// The end of an apply: kAdd and kRelu are known, so that the loops have no branch.
template <typename T, bool kAdd, bool kRelu>
struct End {
  const T* add;  // where y begins
  Vector at(Vector y, int64_t i) const {
    if constexpr (kAdd) y = rounded<T>(y) + load(add + i);
    return kRelu ? relu_of(y) : y;
  }
  float at(float y, int64_t i) const {
    if constexpr (kAdd) y = static_cast<float>(element<T>(y)) + static_cast<float>(add[i]);
    return kRelu ? relu_of(y) : y;
  }
};

template <typename T, typename F>
inline void with_end(const NormEnd<T>& end, F f) {
  if (end.add)
    end.relu ? f(End<T, true, true>{end.add}) : f(End<T, true, false>{end.add});
  else
    end.relu ? f(End<T, false, true>{}) : f(End<T, false, false>{});
}

// ---- segments

// Sums over a segment; term(i, first, second) adds the terms of the element, or of the vector, at i. In float over
// kChains * kVector * kNormRows terms, then in double.
template <typename Term>
inline void sum_terms(int64_t length, NormSums& sums, Term term) {
  constexpr int64_t kStep = kVector * kChains;
  for (int64_t i = 0; i < length;) {
    const int64_t end = i + kStep * kNormRows < length ? i + kStep * kNormRows : length;
    Vector first[kChains] = {}, second[kChains] = {};
    for (; i + kStep <= end; i += kStep)
      for (int c = 0; c < kChains; ++c) term(i + c * kVector, first[c], second[c]);
    for (; i + kVector <= end; i += kVector) term(i, first[0], second[0]);
    for (; i < end; ++i) {
      float a = 0, b = 0;
      term(i, a, b);
      sums.first += a, sums.second += b;
    }
    for (int c = 0; c < kChains; ++c)
      for (int l = 0; l < kVector; ++l) sums.first += first[c][l], sums.second += second[c][l];
  }
}

template <typename T>
struct Squares {
  const T* x;
  float shift;
  void operator()(int64_t i, Vector& first, Vector& second) const {
    const Vector d = load(x + i) - shift;
    first += d, second += d * d;
  }
  void operator()(int64_t i, float& first, float& second) const {
    const float d = static_cast<float>(x[i]) - shift;
    first += d, second += d * d;
  }
};

template <typename T, bool kRelu>
struct Dots {
  const T* grad;
  const T* x;
  float mean;
  NormGate gate;
  void operator()(int64_t i, Vector& first, Vector& second) const {
    const Vector centred = load(x + i) - mean;
    Vector g = load(grad + i);
    if constexpr (kRelu) g = gated(g, centred * gate.scale + gate.bias);
    first += g, second += g * centred;
  }
  void operator()(int64_t i, float& first, float& second) const {
    const float centred = static_cast<float>(x[i]) - mean;
    float g = static_cast<float>(grad[i]);
    if constexpr (kRelu) g = gated(g, centred * gate.scale + gate.bias);
    first += g, second += g * centred;
  }
};

template <typename T>
inline void sums_segment(const T* x, int64_t length, float shift, NormSums& sums) {
  sum_terms(length, sums, Squares<T>{x, shift});
}

template <typename T>
inline void grad_sums_segment(const T* grad, const T* x, int64_t length, float mean, const NormGate& gate,
                              NormSums& sums) {
  if (gate.has_relu)
    sum_terms(length, sums, Dots<T, true>{grad, x, mean, gate});
  else
    sum_terms(length, sums, Dots<T, false>{grad, x, mean, gate});
}

template <typename T>
inline void apply_segment(const T* x, T* y, int64_t length, float mean, float scale, float bias,
                          const NormEnd<T>& how) {
  with_end(how, [&](auto end) {
    int64_t i = 0;
    for (; i + kVector <= length; i += kVector) store(end.at((load(x + i) - mean) * scale + bias, i), y + i);
    for (; i < length; ++i) y[i] = element<T>(end.at((static_cast<float>(x[i]) - mean) * scale + bias, i));
  });
}

template <bool kRelu, typename T>
inline void grad_apply_segment_of(const T* grad, const T* x, T* grad_x, int64_t length, float mean, float scale,
                                  float factor, float offset, const NormGate& gate) {
  const auto slope = [&](auto g, auto centred) {
    if constexpr (kRelu) g = gated(g, centred * gate.scale + gate.bias);
    return scale * g + (factor * centred + offset);
  };
  int64_t i = 0;
  for (; i + kVector <= length; i += kVector) store(slope(load(grad + i), load(x + i) - mean), grad_x + i);
  for (; i < length; ++i) grad_x[i] = element<T>(slope(static_cast<float>(grad[i]), static_cast<float>(x[i]) - mean));
}

template <typename T>
inline void grad_apply_segment(const T* grad, const T* x, T* grad_x, int64_t length, float mean, float scale,
                               float factor, float offset, const NormGate& gate) {
  const auto run = gate.has_relu ? grad_apply_segment_of<true, T> : grad_apply_segment_of<false, T>;
  run(grad, x, grad_x, length, mean, scale, factor, offset, gate);
}

// ---- rows

// Calls work.vectors<n>(i) for n vectors of positions from i on, kGroup of them or one, and work.position(i) for what
// is left.
template <typename Work>
inline void each_position(int64_t length, const Work& work) {
  int64_t i = 0;
  for (; i + kGroup * kVector <= length; i += kGroup * kVector) work.template vectors<kGroup>(i);
  for (; i + kVector <= length; i += kVector) work.template vectors<1>(i);
  for (; i < length; ++i) work.position(i);
}

template <int kVectors, typename V = Vector>
struct Loaded {
  V v[kVectors];
  template <typename T>
  explicit Loaded(const T* p) {
    for (int j = 0; j < kVectors; ++j) v[j] = bits_at<V>(p + j * kVector);
  }
  void store_to(float* p) const {
    for (int j = 0; j < kVectors; ++j) store(v[j], p + j * kVector);
  }
};

template <typename T>
struct RowSums {
  const T* x;
  NormRows rows;
  const float* shift;
  float *first, *second;

  template <int kVectors>
  void vectors(int64_t i) const {
    const Loaded<kVectors> from(shift + i);
    Loaded<kVectors> a(first + i), b(second + i);
    const auto [count, length, stride] = rows;
    const T* at = x + i;
    for (int64_t r = 0; r < count; ++r, at += stride)
      for (int j = 0; j < kVectors; ++j) {
        const Vector d = load(at + j * kVector) - from.v[j];
        a.v[j] += d, b.v[j] += d * d;
      }
    a.store_to(first + i), b.store_to(second + i);
  }
  void position(int64_t i) const {
    for (int64_t r = 0; r < rows.count; ++r) {
      const float d = static_cast<float>(x[r * rows.stride + i]) - shift[i];
      first[i] += d, second[i] += d * d;
    }
  }
};

template <typename T, bool kRelu>
struct RowDots {
  const T *grad, *x;
  NormRows rows;
  const float* mean;
  NormGates gates;
  float *first, *second;

  template <int kVectors>
  void vectors(int64_t i) const {
    const Loaded<kVectors> from(mean + i), scale((kRelu ? gates.scale : mean) + i),
        bias((kRelu ? gates.bias : mean) + i);
    Loaded<kVectors> a(first + i), b(second + i);
    const auto [count, length, stride] = rows;
    const T *slope = grad + i, *at = x + i;
    for (int64_t r = 0; r < count; ++r, slope += stride, at += stride)
      for (int j = 0; j < kVectors; ++j) {
        const Vector centred = load(at + j * kVector) - from.v[j];
        Vector g = load(slope + j * kVector);
        if constexpr (kRelu) g = gated(g, centred * scale.v[j] + bias.v[j]);
        a.v[j] += g, b.v[j] += g * centred;
      }
    a.store_to(first + i), b.store_to(second + i);
  }
  void position(int64_t i) const {
    for (int64_t r = 0; r < rows.count; ++r) {
      const float centred = static_cast<float>(x[r * rows.stride + i]) - mean[i];
      float g = static_cast<float>(grad[r * rows.stride + i]);
      if constexpr (kRelu) g = gated(g, centred * gates.scale[i] + gates.bias[i]);
      first[i] += g, second[i] += g * centred;
    }
  }
};

template <typename T, typename AnEnd>
struct RowApply {
  const T* x;
  T* y;
  NormRows rows;
  NormScales by;
  AnEnd end;

  template <int kVectors>
  void vectors(int64_t i) const {
    const Loaded<kVectors> mean(by.mean + i), scale(by.scale + i), bias(by.bias + i);
    const Loaded<kVectors, Words> keep(by.keep + i);
    const auto [count, length, stride] = rows;
    for (int64_t r = 0, at = i; r < count; ++r, at += stride)
      for (int j = 0; j < kVectors; ++j) {
        const Vector v = (load(x + at + j * kVector) - mean.v[j]) * scale.v[j] + bias.v[j];
        store(end.at(kept(v, keep.v[j]), at + j * kVector), y + at + j * kVector);
      }
  }
  void position(int64_t i) const {
    for (int64_t r = 0, at = i; r < rows.count; ++r, at += rows.stride) {
      const float v = (static_cast<float>(x[at]) - by.mean[i]) * by.scale[i] + by.bias[i];
      y[at] = element<T>(end.at(kept(v, by.keep[i]), at));
    }
  }
};

template <typename T, bool kRelu>
struct RowGradApply {
  const T *grad, *x;
  T* grad_x;
  NormRows rows;
  NormSlopes by;

  template <int kVectors>
  void vectors(int64_t i) const {
    const Loaded<kVectors> mean(by.mean + i), scale(by.scale + i), factor(by.factor + i), offset(by.offset + i),
        bias((kRelu ? by.bias : by.mean) + i);
    const Loaded<kVectors, Words> keep(by.keep + i);
    const auto [count, length, stride] = rows;
    const T *slope = grad + i, *from = x + i;
    T* to = grad_x + i;
    for (int64_t r = 0; r < count; ++r, slope += stride, from += stride, to += stride)
      for (int j = 0; j < kVectors; ++j) {
        const Vector centred = load(from + j * kVector) - mean.v[j];
        Vector g = load(slope + j * kVector);
        if constexpr (kRelu) g = gated(g, centred * scale.v[j] + bias.v[j]);
        const Vector v = scale.v[j] * g + (factor.v[j] * centred + offset.v[j]);
        store(kept(v, keep.v[j]), to + j * kVector);
      }
  }
  void position(int64_t i) const {
    for (int64_t r = 0, at = i; r < rows.count; ++r, at += rows.stride) {
      const float centred = static_cast<float>(x[at]) - by.mean[i];
      float g = static_cast<float>(grad[at]);
      if constexpr (kRelu) g = gated(g, centred * by.scale[i] + by.bias[i]);
      const float v = by.scale[i] * g + (by.factor[i] * centred + by.offset[i]);
      grad_x[at] = element<T>(kept(v, by.keep[i]));
    }
  }
};

template <typename T>
inline void sums_rows(const T* x, const NormRows& rows, const float* shift, float* first, float* second) {
  each_position(rows.length, RowSums<T>{x, rows, shift, first, second});
}

template <typename T>
inline void grad_sums_rows(const T* grad, const T* x, const NormRows& rows, const float* mean, const NormGates& gates,
                           float* first, float* second) {
  if (gates.scale)
    each_position(rows.length, RowDots<T, true>{grad, x, rows, mean, gates, first, second});
  else
    each_position(rows.length, RowDots<T, false>{grad, x, rows, mean, gates, first, second});
}

template <typename T>
inline void apply_rows(const T* x, T* y, const NormRows& rows, const NormScales& by_position, const NormEnd<T>& how) {
  with_end(how,
           [&](auto end) { each_position(rows.length, RowApply<T, decltype(end)>{x, y, rows, by_position, end}); });
}

template <typename T>
inline void grad_apply_rows(const T* grad, const T* x, T* grad_x, const NormRows& rows, const NormSlopes& by_position) {
  if (by_position.bias)
    each_position(rows.length, RowGradApply<T, true>{grad, x, grad_x, rows, by_position});
  else
    each_position(rows.length, RowGradApply<T, false>{grad, x, grad_x, rows, by_position});
}

template <typename T>
inline NormKernels<T> norm_kernels_of_target() {
  return {sums_segment<T>, apply_segment<T>, grad_sums_segment<T>, grad_apply_segment<T>,
          sums_rows<T>,    apply_rows<T>,    grad_sums_rows<T>,    grad_apply_rows<T>};
}
