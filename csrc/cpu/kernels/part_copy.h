// Rows and columns of a tensor into a small one, its part, and back, on elements of 1, 2, 4 or 8 bytes.
//   gather   part[i, j, ...] = whole[rows[i], columns[j], ...]   (0 where rows[i] or columns[j] is -1)
//   scatter  whole[rows[i], columns[j], ...] = part[i, j, ...]   (-1 is left out; of a place listed twice, either)
#pragma once

#include <cstdint>

namespace prunekernels {

struct ColumnRun {  // adjacent in both: columns whole.. of the whole, part.. of the part; whole < 0: zeros
  int64_t whole, part, length;
};

struct PartDim {
  int64_t size, whole, part;  // strides in elements
};

// What is in a row: for each index of outer, columns of `block` elements that lie together.
struct PartCopy {
  char *part, *whole;
  const int64_t* rows;     // [rows of the part]; null: all, in order
  const int64_t* columns;  // [column.size]; null: all, in order
  const ColumnRun* runs;   // [run_count], the columns where they are adjacent and each is block wide; null: use columns
  int64_t run_count;
  int64_t whole_row, part_row;  // strides in elements, as all below
  PartDim column;
  PartDim outer[3];
  int64_t block;
  bool gaps;  // some of columns are -1
};

// Range: rows begin..end of the part. Null for any other number of bytes.
using PartRows = void (*)(const PartCopy& copy, int64_t begin, int64_t end);
PartRows pick_gather_rows(int64_t element_bytes);
PartRows pick_scatter_rows(int64_t element_bytes);

}  // namespace prunekernels
