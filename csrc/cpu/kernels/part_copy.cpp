// A thread owns rows of the part: in a gather it writes them whole, in a scatter it writes what they become of the
// whole. Random columns of single elements are loads by index; adjacent ones, and columns of several taps, are memcpy.
#include "cpu/kernels/part_copy.h"

#include <algorithm>
#include <cstring>

namespace prunekernels {
namespace {

constexpr int64_t kPrefetched = 4096;  // bytes; 1024 of them save a third as much, 16384 no more

template <bool kGather, typename T>
void move(T* part, T* whole, int64_t count) {
  if constexpr (kGather)
    std::memcpy(part, whole, count * sizeof(T));
  else
    std::memcpy(whole, part, count * sizeof(T));
}

template <bool kGather, typename T>
void move(T& part, T& whole) {
  if constexpr (kGather)
    part = whole;
  else
    whole = part;
}

// Where the list has a -1.
template <bool kGather, typename T>
void leave_out(T* part, int64_t count) {
  if constexpr (kGather) std::memset(part, 0, count * sizeof(T));
}

// The columns of one row and one index of outer.
template <bool kGather, typename T>
void move_runs(const PartCopy& copy, T* part, T* whole) {
  for (const ColumnRun* run = copy.runs; run < copy.runs + copy.run_count; ++run) {
    const int64_t count = run->length * copy.block;
    if (run->whole < 0)
      leave_out<kGather>(part + run->part * copy.block, count);
    else
      move<kGather>(part + run->part * copy.block, whole + run->whole * copy.block, count);
  }
}

// The same, of columns that are not adjacent.
template <bool kGather, typename T>
void move_blocks(const PartCopy& copy, T* part, T* whole) {
  for (int64_t j = 0; j < copy.column.size; ++j) {
    const int64_t column = copy.columns != nullptr ? copy.columns[j] : j;
    if (column < 0)
      leave_out<kGather>(part + j * copy.column.part, copy.block);
    else
      move<kGather>(part + j * copy.column.part, whole + column * copy.column.whole, copy.block);
  }
}

// The same, of columns of one element.
template <bool kGather, typename T>
void move_elements(const PartCopy& copy, T* part, T* whole) {
  const int64_t* columns = copy.columns;
  const int64_t size = copy.column.size, part_step = copy.column.part, whole_step = copy.column.whole;
  if (columns == nullptr) {
    for (int64_t j = 0; j < size; ++j) move<kGather>(part[j * part_step], whole[j * whole_step]);
  } else if (copy.gaps || part_step != 1 || whole_step != 1) {
    for (int64_t j = 0; j < size; ++j)
      if (columns[j] < 0)
        leave_out<kGather>(part + j * part_step, 1);
      else
        move<kGather>(part[j * part_step], whole[columns[j] * whole_step]);
  } else {
    for (int64_t j = 0; j < size; ++j) move<kGather>(part[j], whole[columns[j]]);
  }
}

template <bool kGather, typename T>
void leave_out_row(const PartCopy& copy, T* part) {
  const int64_t step = copy.runs != nullptr ? copy.block : copy.column.part;
  for (int64_t j = 0; j < copy.column.size; ++j) leave_out<kGather>(part + j * step, copy.block);
}

// Rows of a whole are short, and those between are left out: the hardware does not see the next one coming.
template <typename T>
void prefetch_row(const PartCopy& copy, int64_t row) {
  const char* next = copy.whole + row * copy.whole_row * static_cast<int64_t>(sizeof(T));
  const int64_t bytes = std::min(copy.whole_row * static_cast<int64_t>(sizeof(T)), kPrefetched);
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(next + at);
}

template <bool kGather, typename T>
void move_rows(const PartCopy& copy, int64_t begin, int64_t end) {
  auto* const line = copy.runs != nullptr ? move_runs<kGather, T>
                     : copy.block > 1     ? move_blocks<kGather, T>
                                          : move_elements<kGather, T>;
  const auto& [x, y, z] = copy.outer;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = copy.rows != nullptr ? copy.rows[i] : i;
    if (copy.rows != nullptr && i + 1 < end && copy.rows[i + 1] >= 0) prefetch_row<T>(copy, copy.rows[i + 1]);
    if (row < 0 && !kGather) continue;
    T* part_row = reinterpret_cast<T*>(copy.part) + i * copy.part_row;
    T* whole_row = reinterpret_cast<T*>(copy.whole) + std::max(row, int64_t{0}) * copy.whole_row;
    for (int64_t a = 0; a < x.size; ++a)
      for (int64_t b = 0; b < y.size; ++b)
        for (int64_t c = 0; c < z.size; ++c) {
          T* part = part_row + a * x.part + b * y.part + c * z.part;
          if (row < 0)
            leave_out_row<kGather>(copy, part);
          else
            line(copy, part, whole_row + a * x.whole + b * y.whole + c * z.whole);
        }
  }
}

template <bool kGather>
PartRows pick(int64_t element_bytes) {
  switch (element_bytes) {
    case 1:
      return move_rows<kGather, uint8_t>;
    case 2:
      return move_rows<kGather, uint16_t>;
    case 4:
      return move_rows<kGather, uint32_t>;
    case 8:
      return move_rows<kGather, uint64_t>;
    default:
      return nullptr;
  }
}

}  // namespace

PartRows pick_gather_rows(int64_t element_bytes) { return pick<true>(element_bytes); }

PartRows pick_scatter_rows(int64_t element_bytes) { return pick<false>(element_bytes); }

}  // namespace prunekernels
