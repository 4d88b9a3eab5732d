// The report of a failed launch: what went wrong, and where. The first failure counts, until take_report() clears it.
#include <dlfcn.h>
#include <execinfo.h>

#include <cstdarg>
#include <cstdio>
#include <string>

#include "cuda/emulator/block.h"

namespace prunekernels::simt {
namespace {

std::string text;

// A line "\n  at LIBRARY+0xOFFSET" for each stack frame outside of the emulator, innermost first.
std::string places() {
  void* frames[32];
  const int count = backtrace(frames, 32);
  Dl_info own, frame;
  dladdr(reinterpret_cast<void*>(&run), &own);
  std::string found;
  for (int i = 0; i < count; ++i) {
    if (!dladdr(frames[i], &frame) || !frame.dli_fname || frame.dli_fbase == own.dli_fbase) continue;
    char line[512];
    const auto offset = static_cast<const char*>(frames[i]) - static_cast<const char*>(frame.dli_fbase) - 1;
    std::snprintf(line, sizeof(line), "\n  at %s+0x%tx", frame.dli_fname, offset);
    found += line;
  }
  return found;
}

}  // namespace

bool failed() { return !text.empty(); }

void note_failure(const char* what) {
  char where[160];
  const uint3 thread = block.self->index;
  std::snprintf(where, sizeof(where), "block (%u, %u, %u), thread (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z,
                thread.x, thread.y, thread.z);
  text = std::string(where) + what + places();
}

void refuse(const char* why) { text = why; }

void fail(const char* format, ...) {
  char what[512];
  va_list words;
  va_start(words, format);
  std::vsnprintf(what, sizeof(what), format, words);
  va_end(words);
  note_failure(what);
  for (;;) switch_to(block.self->fiber, block.scheduler);
}

const char* take_report() {
  static std::string taken;
  taken.swap(text);
  text.clear();
  return taken.c_str();
}

}  // namespace prunekernels::simt

extern "C" const char* pk_take_report() { return prunekernels::simt::take_report(); }
