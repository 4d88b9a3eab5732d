// Sparse convolution for ctypes. The mask table and the lists, which the device implementation keeps on the device, are
// made here from the masks.
#include <vector>

#include "cuda/emulator/exports_shape.h"
#include "cuda/kernels/sparse_conv.h"

using namespace prunekernels;

namespace {

struct Problem {
  std::vector<int32_t> table;
  SparseLists lists;
  SparseConv conv;

  // sizes: as shape_of() takes them. weight_strides: filter, channel, tap.
  Problem(const bool* filter, const bool* kernel, const bool* input, const int64_t* sizes,
          const int64_t* weight_strides, int multiprocessors)
      : table(mask_table_words(sizes[4], sizes[1], sizes[9])), lists(make_lists(filter, kernel, input, sizes, table)) {
    conv = {shape_of(sizes),   &lists,         lists.words().data(), weight_strides[0], weight_strides[1],
            weight_strides[2], multiprocessors};
  }
  static SparseLists make_lists(const bool* filter, const bool* kernel, const bool* input, const int64_t* z,
                                std::vector<int32_t>& table) {
    build_mask_table(filter, kernel, input, z[4], z[1], z[9], table.data());
    return SparseLists(MaskTable(table.data()));
  }
};

}  // namespace

extern "C" {

int pk_sparse_fwd(const float* x, const float* weight, const float* bias, float* y, const bool* filter,
                  const bool* kernel, const bool* input, const int64_t* sizes, const int64_t* strides,
                  int multiprocessors) {
  const Problem problem(filter, kernel, input, sizes, strides, multiprocessors);
  return launch_sparse_fwd(x, weight, bias, y, problem.conv, nullptr);
}

int pk_sparse_grad_input(const float* dy, const float* weight, float* dx, const bool* filter, const bool* kernel,
                         const bool* input, const int64_t* sizes, const int64_t* strides, int multiprocessors) {
  const Problem problem(filter, kernel, input, sizes, strides, multiprocessors);
  return launch_sparse_grad_input(dy, weight, dx, problem.conv, nullptr);
}

int pk_sparse_serves(const int64_t* sizes, bool* serves) {
  *serves = sparse_serves(shape_of(sizes));
  return cudaSuccess;
}

int pk_sparse_grad_weight_workspace(const bool* filter, const bool* kernel, const bool* input, const int64_t* sizes,
                                    const int64_t* strides, int multiprocessors, int64_t* floats) {
  *floats = sparse_grad_weight_workspace(Problem(filter, kernel, input, sizes, strides, multiprocessors).conv);
  return cudaSuccess;
}

int pk_sparse_grad_weight(const float* x, const float* dy, const float* scale, float* workspace, float* dw,
                          const bool* filter, const bool* kernel, const bool* input, const int64_t* sizes,
                          const int64_t* strides, int multiprocessors) {
  const Problem problem(filter, kernel, input, sizes, strides, multiprocessors);
  const uint32_t* pairs = MaskTable(problem.table.data()).pairs(0);
  return launch_sparse_grad_weight(x, dy, pairs, scale, workspace, dw, problem.conv, nullptr);
}
}
