#include "cuda/emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

#if PK_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(PK_UCONTEXT)
extern "C" void prunekernels_simt_switch(void** save, void* load);
// Saves what a call must preserve, six registers and the stack pointer, and loads those of the other fiber. (No kernel
// changes the rounding mode.)
asm(R"(
.text
.p2align 4
.type prunekernels_simt_switch, @function
prunekernels_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size prunekernels_simt_switch, .-prunekernels_simt_switch
)");
#endif

namespace prunekernels::simt {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = (PK_ASAN ? 256 : 64) << 10;

#if PK_ASAN
Fiber* left;  // the fiber that called switch_to() last
#endif

std::vector<char*>& stacks() {
  static std::vector<char*> all;
  return all;
}

char* stack(int i) {  // its lowest page is a guard page
  while (static_cast<int>(stacks().size()) <= i) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) std::abort();
    stacks().push_back(static_cast<char*>(memory));
  }
  return stacks()[i];
}

}  // namespace

void prepare(Fiber& fiber, int i, void (*entry)()) {
  char* bottom = stack(i);
#if PK_ASAN
  __asan_unpoison_memory_region(bottom + kPage, kStackBytes - kPage);  // an abandoned fiber may have left poison
  fiber.stack = bottom + kPage;
  fiber.stack_bytes = kStackBytes - kPage;
  fiber.fake_stack = nullptr;
#endif
#if !defined(PK_UCONTEXT)
  // As if entry had been called: a return address (none) at 8 mod 16, below it entry and six registers to pop.
  auto top = reinterpret_cast<uint64_t*>(bottom + kStackBytes) - 3;
  *top = 0;
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int r = 0; r < 6; ++r) *--top = 0;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = bottom + kPage;
  fiber.context.uc_stack.ss_size = kStackBytes - kPage;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void entered() {
#if PK_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &left->stack, &left->stack_bytes);
#endif
}

void switch_to(Fiber& from, Fiber& to) {
#if PK_ASAN
  left = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#if !defined(PK_UCONTEXT)
  prunekernels_simt_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if PK_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

bool is_stack_end(const void* address) {
  for (const char* bottom : stacks())
    if (address >= bottom && address < bottom + kPage) return true;
  return false;
}

}  // namespace prunekernels::simt
