// Fibers: threads of control that change places only where they say so.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(PK_UCONTEXT)  // slower, and everywhere
#define PK_UCONTEXT
#endif
#if defined(PK_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define PK_ASAN 1
#else
#define PK_ASAN 0
#endif

namespace prunekernels::simt {

struct Fiber {
#if defined(PK_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
#if PK_ASAN
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
#endif
};

// Makes fiber begin at entry, on stack number i of the pool. entry must leave by switch_to() and never return.
void prepare(Fiber& fiber, int i, void (*entry)());
// The first thing an entry does.
void entered();
void switch_to(Fiber& from, Fiber& to);
// Whether address lies in the page that ends a stack.
bool is_stack_end(const void* address);

}  // namespace prunekernels::simt
