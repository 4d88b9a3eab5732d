// Fibers: threads of control of which one runs until it calls switch_to().
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(PK_UCONTEXT)  // slower than the assembly of fiber.cpp, but portable
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

// Prepares fiber to begin at entry, on stack i of the pool. entry must call entered() first, and must leave by
// switch_to(), never by returning.
void prepare(Fiber& fiber, int i, void (*entry)());
void entered();
void switch_to(Fiber& from, Fiber& to);
// Whether address lies in the guard page below a stack.
bool is_stack_end(const void* address);

}  // namespace prunekernels::simt
