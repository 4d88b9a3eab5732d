// Makes a kernel that touches a protected page end its launch instead of the process.
#pragma once

namespace prunekernels::simt {

// Calls body. On a segmentation fault in it: calls told with a description, abandons body, and returns. (Under
// AddressSanitizer it only calls body: the sanitizer reports the fault.)
void guarded_run(void (*body)(), void (*told)(const char*));

}  // namespace prunekernels::simt
