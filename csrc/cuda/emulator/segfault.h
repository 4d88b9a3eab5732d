// A kernel that touches a page nobody may touch ends its launch, not the process.
#pragma once

namespace prunekernels::simt {

// Calls body. On a segmentation fault in it: calls told with what happened, abandons body, and returns. (Under
// AddressSanitizer the fault is left to it.)
void guarded_run(void (*body)(), void (*told)(const char*));

}  // namespace prunekernels::simt
