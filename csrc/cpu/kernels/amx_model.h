// What the instructions of AMX do, in plain C++, by the operation sections of Intel's Software Developer's Manual: so
// that kernels for them can be tested on any CPU. Where an instruction would fault, std::logic_error.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels/amx_tiles.h"

namespace prunekernels {

// Arithmetic of floats in which subnormal operands and results are zeros of their sign, rounded to nearest even. A
// result is subnormal if it were so when rounded with any exponent.
struct FlushedFloat {
  static float operand(float v) { return std::fabs(v) < FLT_MIN ? std::copysign(0.0f, v) : v; }
  static float result(float v) { return operand(v); }

  static float add(float a, float b) { return result(operand(a) + operand(b)); }  // what is subnormal is exact
  static float multiply_add(float a, float b, float c) {
    a = operand(a), b = operand(b), c = operand(c);
    const float v = std::fma(a, b, c);
    if (std::fabs(v) != FLT_MIN) return result(v);
    const double sign = std::copysign(1.0, v), least = FLT_MIN - 0x1p-151;  // from here on it is rounded up to FLT_MIN
    return std::fma(sign * a, static_cast<double>(b), sign * c - least) < 0 ? std::copysign(0.0f, v) : v;
  }
};

inline float widened_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// As VCVTNEPS2BF16: subnormal floats are zeros of their sign, NaN stays one.
inline uint16_t narrowed_to_bfloat16(float value) {
  const float flushed = FlushedFloat::operand(value);
  uint32_t bits;
  std::memcpy(&bits, &flushed, sizeof(bits));
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

class TileModel {
 public:
  // LDTILECFG
  void configure(const TileConfig& config) {
    const TileConfig none{};
    const char* const name = "ldtilecfg";
    require(config.palette <= 1, name, "a palette that is not there");
    if (config.palette == 0) return release();
    const bool reserved = !std::memcmp(config.reserved, none.reserved, sizeof(none.reserved)) &&
                          !std::memcmp(config.reserved_tiles, none.reserved_tiles, sizeof(none.reserved_tiles)) &&
                          !std::memcmp(config.reserved_rows, none.reserved_rows, sizeof(none.reserved_rows));
    require(reserved, name, "reserved bytes are not zero");
    for (int t = 0; t < kTiles; ++t) {
      require(config.row_bytes[t] <= kTileBytes && config.rows[t] <= kTileRows, name, "a tile is too large");
      require((config.row_bytes[t] == 0) == (config.rows[t] == 0), name,
              "a tile has rows without bytes, or bytes alone");
    }
    config_ = config;
    std::memset(tiles_, 0, sizeof(tiles_));
  }
  // STTILECFG: zeros where nothing is configured
  const TileConfig& configuration() const { return config_; }
  // TILERELEASE
  void release() {
    config_ = TileConfig{};
    std::memset(tiles_, 0, sizeof(tiles_));
  }
  // TILEZERO
  void zero(int t) {
    check(t, "tilezero");
    std::memset(tiles_[t], 0, sizeof(tiles_[t]));
    config_.start_row = 0;
  }
  // TILELOADD, TILELOADDT1: rows from start_row on; bytes behind a row's, and rows behind the last, are zero
  void load(int t, const void* from, int64_t stride) {
    check_memory(t, "tileloadd");
    int row = config_.start_row;
    if (row == 0) std::memset(tiles_[t], 0, sizeof(tiles_[t]));
    for (; row < config_.rows[t]; ++row) {
      std::memset(tiles_[t][row], 0, kTileBytes);
      std::memcpy(tiles_[t][row], static_cast<const char*>(from) + row * stride, config_.row_bytes[t]);
    }
    config_.start_row = 0;
  }
  // TILESTORED
  void store(int t, void* to, int64_t stride) {
    check_memory(t, "tilestored");
    for (int row = config_.start_row; row < config_.rows[t]; ++row)
      std::memcpy(static_cast<char*>(to) + row * stride, tiles_[t][row], config_.row_bytes[t]);
    config_.start_row = 0;
  }
  // TDPBF16PS: even and odd products are summed apart, the two sums then added to each other and to the destination.
  void dot(int c, int a, int b) {
    const char* const name = "tdpbf16ps";
    for (int t : {c, a, b}) check(t, name);
    require(c != a && c != b && a != b, name, "a tile twice");
    for (int t : {c, a, b}) require(config_.row_bytes[t] % 4 == 0, name, "bytes of a row that are no numbers");
    require(config_.rows[c] == config_.rows[a], name, "rows of the sums and of the first factor differ");
    require(config_.row_bytes[c] == config_.row_bytes[b], name, "columns of the sums and of the second factor differ");
    require(config_.row_bytes[a] / 4 == config_.rows[b], name, "pairs of the factors differ");
    const int pairs = config_.rows[b], columns = config_.row_bytes[c] / 4;
    Row x, w[kTileRows];
    for (int k = 0; k < pairs; ++k) w[k] = numbers(b, k);
    for (int m = 0; m < config_.rows[c]; ++m) {
      x = numbers(a, m);
      float products[kRowNumbers] = {}, sums[kRowNumbers / 2] = {};
      for (int k = 0; k < pairs; ++k)
        for (int n = 0; n < 2 * columns; ++n)
          products[n] = FlushedFloat::multiply_add(x.values[2 * k + n % 2], w[k].values[n], products[n]);
      std::memcpy(sums, tiles_[c][m], 4 * columns);
      for (int n = 0; n < columns; ++n)
        sums[n] = FlushedFloat::add(sums[n], FlushedFloat::add(products[2 * n], products[2 * n + 1]));
      std::memcpy(tiles_[c][m], sums, sizeof(sums));
    }
    for (int m = config_.rows[c]; m < kTileRows; ++m) std::memset(tiles_[c][m], 0, kTileBytes);
    config_.start_row = 0;
  }

 private:
  static void require(bool right, const char* instruction, const char* wrong) {
    if (!right) throw std::logic_error(std::string(instruction) + ": " + wrong);
  }
  void check(int t, const char* name) const {
    require(config_.palette != 0, name, "no tiles are configured");
    require(t >= 0 && t < kTiles && config_.rows[t] != 0, name, "a tile that is not configured");
  }
  void check_memory(int t, const char* name) const {
    check(t, name);
    require(config_.row_bytes[t] % 4 == 0, name, "bytes of a row that are no numbers");
    require(config_.start_row < config_.rows[t], name, "starts behind the last row");
  }
  static constexpr int kRowNumbers = kTileBytes / 2;
  struct Row {
    float values[kRowNumbers];
  };
  Row numbers(int t, int row) const {
    Row wide;
    for (int n = 0; n < kRowNumbers; ++n) {
      uint16_t bits;
      std::memcpy(&bits, tiles_[t][row] + 2 * n, sizeof(bits));
      wide.values[n] = widened_bfloat16(bits);
    }
    return wide;
  }

  TileConfig config_{};
  uint8_t tiles_[kTiles][kTileRows][kTileBytes] = {};
};

}  // namespace prunekernels
