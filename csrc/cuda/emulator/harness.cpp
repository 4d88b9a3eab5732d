// What the tests call beside kernels: the report, and tables of masks built by the core.
#include "core/mask_table.h"
#include "cuda/emulator/simt.h"

using namespace prunekernels;

extern "C" {

const char* pk_take_report() { return simt::take_report(); }

void pk_build_mask_table(const bool* filter,  // [K]
                         const bool* kernel,  // [K, C / G]
                         const bool* input,   // [C]
                         int64_t K, int64_t C, int64_t G,
                         int32_t* table) {  // [mask_table_words(K, C, G)]
  build_mask_table(filter, kernel, input, K, C, G, table);
}
}
