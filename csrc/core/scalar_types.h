// bfloat16 and half as bit patterns with conversions, so that kernels need no torch header.
#pragma once

#include <cstdint>
#include <cstring>

namespace prunekernels {

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

struct BFloat16 {
  uint16_t bits;
  operator float() const { return float_from_bits(static_cast<uint32_t>(bits) << 16); }
  static BFloat16 from(float value) {
    const uint32_t b = bits_from_float(value);
    if ((b & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>(b >> 16 | 0x40)};  // NaN stays NaN, quiet
    return {static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16)};
  }
};

struct Half {
  uint16_t bits;
  operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    if (rest >= 0x7c00) return float_from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x400) return float_from_bits(sign | ((rest << 13) + 0x38000000));
    return float_from_bits(
        sign | bits_from_float(static_cast<float>(rest) * 5.9604644775390625e-8f));  // subnormal: rest * 2^-24
  }
  static Half from(float value) {
    const uint32_t b = bits_from_float(value), sign = b >> 16 & 0x8000, magnitude = b & 0x7fffffff;
    if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 0x38800000) {  // below the smallest normal: adding 0.5 lets the FPU round to a multiple of 2^-24
      return {static_cast<uint16_t>(sign | (bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000))};
    }
    return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))};
  }
};

template <typename T>
struct Arithmetic {  // the type sums and products are formed in
  using type = float;
  static T narrow(float value) { return T::from(value); }
};
template <>
struct Arithmetic<float> {
  using type = float;
  static float narrow(float value) { return value; }
};
template <>
struct Arithmetic<double> {
  using type = double;
  static double narrow(double value) { return value; }
};

}  // namespace prunekernels
