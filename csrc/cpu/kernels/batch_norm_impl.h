// The loops of batch_norm.h, which the compiler vectorises. Included once for each instruction set, in an anonymous
// namespace, inside a region that is compiled for it.

constexpr int kVector = 16;
constexpr int kChains = 4;  // independent sums, enough to hide the latency of an addition

typedef float Vector __attribute__((vector_size(4 * kVector)));

inline Vector load(const float* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// Sums over a segment; term(i, first, second) adds the terms of the float, or of the vector, at i. In float over
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

struct Squares {
  const float* x;
  float shift;
  void operator()(int64_t i, Vector& first, Vector& second) const {
    const Vector d = load(x + i) - shift;
    first += d, second += d * d;
  }
  void operator()(int64_t i, float& first, float& second) const {
    const float d = x[i] - shift;
    first += d, second += d * d;
  }
};

struct Dots {
  const float* grad;
  const float* x;
  float mean;
  void operator()(int64_t i, Vector& first, Vector& second) const {
    const Vector g = load(grad + i);
    first += g, second += g * (load(x + i) - mean);
  }
  void operator()(int64_t i, float& first, float& second) const { first += grad[i], second += grad[i] * (x[i] - mean); }
};

inline void sums_segment(const float* x, int64_t length, float shift, NormSums& sums) {
  sum_terms(length, sums, Squares{x, shift});
}

inline void grad_sums_segment(const float* grad, const float* x, int64_t length, float mean, NormSums& sums) {
  sum_terms(length, sums, Dots{grad, x, mean});
}

inline void apply_segment(const float* x, float* y, int64_t length, float mean, float scale, float bias) {
  for (int64_t i = 0; i < length; ++i) y[i] = (x[i] - mean) * scale + bias;
}

inline void grad_apply_segment(const float* grad, const float* x, float* grad_x, int64_t length, float mean,
                               float scale, float factor, float offset) {
  for (int64_t i = 0; i < length; ++i) grad_x[i] = scale * grad[i] + (factor * (x[i] - mean) + offset);
}

inline void sums_rows(const float* x, int64_t rows, int64_t length, int64_t stride, const float* __restrict shift,
                      float* __restrict first, float* __restrict second) {
  for (int64_t r = 0; r < rows; ++r, x += stride)
    for (int64_t i = 0; i < length; ++i) {
      const float d = x[i] - shift[i];
      first[i] += d, second[i] += d * d;
    }
}

inline void apply_rows(const float* __restrict x, float* __restrict y, int64_t rows, int64_t length, int64_t stride,
                       const float* __restrict mean, const float* __restrict scale, const float* __restrict bias) {
  for (int64_t r = 0; r < rows; ++r, x += stride, y += stride)
    for (int64_t i = 0; i < length; ++i) y[i] = (x[i] - mean[i]) * scale[i] + bias[i];
}

inline void grad_sums_rows(const float* grad, const float* x, int64_t rows, int64_t length, int64_t stride,
                           const float* __restrict mean, float* __restrict first, float* __restrict second) {
  for (int64_t r = 0; r < rows; ++r, x += stride, grad += stride)
    for (int64_t i = 0; i < length; ++i) first[i] += grad[i], second[i] += grad[i] * (x[i] - mean[i]);
}

inline void grad_apply_rows(const float* __restrict grad, const float* __restrict x, float* __restrict grad_x,
                            int64_t rows, int64_t length, int64_t stride, const float* __restrict mean,
                            const float* __restrict scale, const float* __restrict factor,
                            const float* __restrict offset) {
  for (int64_t r = 0; r < rows; ++r, x += stride, grad += stride, grad_x += stride)
    for (int64_t i = 0; i < length; ++i) grad_x[i] = scale[i] * grad[i] + (factor[i] * (x[i] - mean[i]) + offset[i]);
}

inline NormKernels norm_kernels_of_target() {
  return {sums_segment, apply_segment, grad_sums_segment, grad_apply_segment,
          sums_rows,    apply_rows,    grad_sums_rows,    grad_apply_rows};
}
