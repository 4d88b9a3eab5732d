// A warp's share of a block's product, from tiles in shared memory: 16 x 8 tiles of tensor cores, or (fp32) the same
// sums in the same registers by FFMA.
//
// Two kinds of tiles, both free of bank conflicts when they are filled and when they are read:
//   row tile     [rows][kChunk], vectors at swizzled places     convolutions: a row is a pixel or a filter
//   column tile  [kChunk][columns], rows padded                 weight gradient: a row is a pixel
// A tile holds one chunk of the reduction, which is multiplied in kSlices steps of one mma each.
#pragma once

#include <type_traits>

#include "cuda/kernels/ptx.cuh"

namespace prunekernels {

struct Tf32 {};  // kept as float, multiplied as tf32

template <typename Math>
struct StorageOf {
  using type = Math;
};
template <>
struct StorageOf<Tf32> {
  using type = float;
};
template <typename Math>
using Storage = typename StorageOf<Math>::type;

constexpr int kChunkVectors = 4;
constexpr int kSlices = 2;
template <typename T>
constexpr int kVector = 16 / sizeof(T);
template <typename T>
constexpr int kChunk = kChunkVectors * kVector<T>;

PK_DEVICE int lane_id() { return threadIdx.x % kWarp; }
PK_DEVICE int warp_id() { return threadIdx.x / kWarp; }

// at[i][j][e] is row 16 i + 8 (e / 2) + lane / 4, column 8 j + 2 (lane % 4) + e % 2.
template <int kM, int kN>
struct Sums {
  float at[kM / 16][kN / 8][4];

  PK_DEVICE static int row(int i, int half) { return 16 * i + 8 * half + lane_id() / 4; }
  PK_DEVICE static int column(int j) { return 8 * j + lane_id() % 4 * 2; }
};

PK_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16 tag) {
  mma_m16n8k16(d, a, b, tag);
}
PK_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half tag) {
  mma_m16n8k16(d, a, b, tag);
}
PK_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Tf32) { mma_m16n8k8_tf32(d, a, b); }

template <typename Math, int kCount>
PK_DEVICE void round_fragment(uint32_t (&fragment)[kCount]) {
  if constexpr (std::is_same_v<Math, Tf32>)
#pragma unroll
    for (int i = 0; i < kCount; ++i) fragment[i] = round_to_tf32(__uint_as_float(fragment[i]));
}

// ---- row tiles

// Element index of a vector. Of eight consecutive rows, any one vector lies in eight different 16-byte banks.
template <typename T>
PK_DEVICE int row_place(int row, int vector) {
  return (row * kChunkVectors + (vector ^ (row / 2 % 4))) * kVector<T>;
}

// Elements of a stage at which this lane's rows begin, of slice 0: rows a_row + ... of the warp's a, b_row + ... of its
// b, multiples of 16. Slices are two vectors apart, which the swizzle makes one bit.
template <typename Math>
struct RowLanes {
  using T = Storage<Math>;
  int a, b;
  PK_DEVICE RowLanes(int a_row, int b_row)
      : a(kept(row_place<T>(a_row + lane_id() % 16, lane_id() / 16))),
        b(kept(row_place<T>(b_row + lane_id() % 8 + lane_id() / 16 * 8, lane_id() / 8 % 2))) {}
};

// sums[m, n] += sum over the slice of a[m, k] b[n, k], both row tiles of one stage. Elements of b are tf32 already.
template <typename Math, int kM, int kN>
struct MultiplyRows {
  using T = Storage<Math>;
  PK_DEVICE static void slice(Sums<kM, kN>& sums, Shared<T> stage, const RowLanes<Math>& lanes, int slice) {
    const Shared<T> a = stage + (lanes.a ^ slice * 2 * kVector<T>), b = stage + (lanes.b ^ slice * 2 * kVector<T>);
    uint32_t b_part[kN / 8][2];
#pragma unroll
    for (int j = 0; j < kN / 16; ++j) {
      uint32_t four[4];
      ldmatrix_x4(four, b.address(16 * j * kChunk<T>));
#pragma unroll
      for (int i = 0; i < 4; ++i) b_part[2 * j + i / 2][i % 2] = four[i];
    }
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) {
      uint32_t a_part[4];
      ldmatrix_x4(a_part, a.address(16 * i * kChunk<T>));
      round_fragment<Math>(a_part);
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) mma(sums.at[i][j], a_part, b_part[j], Math{});
    }
  }
};

template <>
struct RowLanes<float> {  // of vector 0; others are bits of the swizzle, too
  int a, b;
  PK_DEVICE RowLanes(int a_row, int b_row)
      : a(row_place<float>(a_row + Sums<16, 8>::row(0, 0), 0)),
        b(row_place<float>(b_row + Sums<16, 8>::column(0), 0)) {}
};

template <int kM, int kN>
struct MultiplyRows<float, kM, kN> {
  PK_DEVICE static void slice(Sums<kM, kN>& sums, Shared<float> stage, const RowLanes<float>& lanes, int slice) {
#pragma unroll 1  // unrolled, it would load ahead more than the registers hold
    for (int pair = 0; pair < 4; ++pair) {
      const int vector = 2 * slice + pair / 2, within = pair % 2 * 2;
      const Shared<float> a = stage + ((lanes.a ^ vector * kVector<float>)+within),
                          b = stage + ((lanes.b ^ vector * kVector<float>)+within);
      float2 b_part[kN / 4];
#pragma unroll
      for (int j = 0; j < kN / 4; ++j) b_part[j] = b.template get_vector<float2>((j / 2 * 8 + j % 2) * kChunk<float>);
#pragma unroll
      for (int i = 0; i < kM / 8; ++i) {
        const float2 x = a.template get_vector<float2>(i * 8 * kChunk<float>);
#pragma unroll
        for (int j = 0; j < kN / 4; ++j) {
          float& sum = sums.at[i / 2][j / 2][i % 2 * 2 + j % 2];
          sum = fmaf(x.x, b_part[j].x, sum);
          sum = fmaf(x.y, b_part[j].y, sum);
        }
      }
    }
  }
};

// ---- column tiles

// Elements from row to row. The padding shifts banks by 16 bytes a row where ldmatrix reads eight rows at once, and by
// 32 where single 4-byte elements of four rows and eight columns are read.
template <int kColumns>
constexpr int kColumnPitch = kColumns + 8;

// Elements of a stage at which this lane begins to read columns a_column + ... of a and b_column + ... of b: column
// tiles of kA and kB columns, b behind a.
template <typename Math, int kA, int kB>
struct ColumnLanes {
  int a, b;
  PK_DEVICE ColumnLanes(int a_column, int b_column) : ColumnLanes(a_column, b_column, lane_id(), Math{}) {}

 private:
  static constexpr int kBehindA = kColumnPitch<kA> * kChunk<Storage<Math>>;
  PK_DEVICE ColumnLanes(int a_row, int a_column, int b_row, int b_column)
      : a(kept(a_row * kColumnPitch<kA> + a_column)), b(kept(kBehindA + b_row * kColumnPitch<kB> + b_column)) {}
  template <typename Other>
  PK_DEVICE ColumnLanes(int a_column, int b_column, int lane, Other)
      : ColumnLanes(lane % 8 + lane / 16 * 8, a_column + lane / 8 % 2 * 8, lane % 16, b_column + lane / 16 * 8) {}
  PK_DEVICE ColumnLanes(int a_column, int b_column, int lane, Tf32)
      : ColumnLanes(lane % 4, a_column + lane / 4 * 2, lane % 4, b_column + lane / 4) {}
  PK_DEVICE ColumnLanes(int a_column, int b_column, int lane, float)
      : ColumnLanes(0, a_column + lane / 4, 0, b_column + lane % 4 * 2) {}
};

// sums[m, n] += sum over the slice of a[k, a_column + m] b[k, b_column + n], the columns of `lanes`.
template <typename Math, int kM, int kN, int kA, int kB>
struct MultiplyColumns {
  using T = Storage<Math>;
  using Lanes = ColumnLanes<Math, kA, kB>;
  PK_DEVICE static int row(int i, int half) { return Sums<kM, kN>::row(i, half); }  // of sums.at[i]: column of a
  PK_DEVICE static void slice(Sums<kM, kN>& sums, Shared<T> stage, const Lanes& lanes, int slice) {
    const Shared<T> a = stage + lanes.a, b = stage + lanes.b;
    const int row = slice * kChunk<T> / kSlices;
    uint32_t b_part[kN / 8][2];
#pragma unroll
    for (int j = 0; j < kN / 16; ++j) {
      uint32_t four[4];
      ldmatrix_x4_trans(four, b.address(row * kColumnPitch<kB> + 16 * j));
#pragma unroll
      for (int i = 0; i < 4; ++i) b_part[2 * j + i / 2][i % 2] = four[i];
    }
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) {
      uint32_t a_part[4];
      ldmatrix_x4_trans(a_part, a.address(row * kColumnPitch<kA> + 16 * i));
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) mma(sums.at[i][j], a_part, b_part[j], Math{});
    }
  }
};

// A lane's two rows of an mma are neighbouring columns of a here, so that one load brings both. No sum changes by it.
template <int kM, int kN, int kA, int kB>
struct MultiplyColumns<Tf32, kM, kN, kA, kB> {
  using Lanes = ColumnLanes<Tf32, kA, kB>;
  PK_DEVICE static int row(int i, int half) { return 16 * i + lane_id() / 4 * 2 + half; }
  PK_DEVICE static void slice(Sums<kM, kN>& sums, Shared<float> stage, const Lanes& lanes, int slice) {
    const Shared<float> a = stage + lanes.a, b = stage + lanes.b;
    const int row = slice * 8;
    uint32_t b_part[kN / 8][2];
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) b_part[j][i] = __float_as_uint(b.get((row + 4 * i) * kColumnPitch<kB> + 8 * j));
      round_fragment<Tf32>(b_part[j]);
    }
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) {
      uint32_t a_part[4];
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const float2 two = a.template get_vector<float2>((row + e * 2) * kColumnPitch<kA> + 16 * i);
        a_part[e] = __float_as_uint(two.x), a_part[e + 1] = __float_as_uint(two.y);
      }
      round_fragment<Tf32>(a_part);
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) mma(sums.at[i][j], a_part, b_part[j], Tf32{});
    }
  }
};

template <int kM, int kN, int kA, int kB>
struct MultiplyColumns<float, kM, kN, kA, kB> {
  using Lanes = ColumnLanes<float, kA, kB>;
  PK_DEVICE static int row(int i, int half) { return Sums<kM, kN>::row(i, half); }
  PK_DEVICE static void slice(Sums<kM, kN>& sums, Shared<float> stage, const Lanes& lanes, int slice) {
    const Shared<float> a = stage + lanes.a, b = stage + lanes.b;
#pragma unroll 2
    for (int row = slice * 8; row < slice * 8 + 8; ++row) {
      float2 b_part[kN / 8];
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) b_part[j] = b.template get_vector<float2>(row * kColumnPitch<kB> + 8 * j);
#pragma unroll
      for (int i = 0; i < kM / 8; ++i) {
        const float x = a.get(row * kColumnPitch<kA> + 8 * i);
#pragma unroll
        for (int j = 0; j < kN / 8; ++j) {
          float* sum = sums.at[i / 2][j] + i % 2 * 2;
          sum[0] = fmaf(x, b_part[j].x, sum[0]);
          sum[1] = fmaf(x, b_part[j].y, sum[1]);
        }
      }
    }
  }
};

}  // namespace prunekernels
