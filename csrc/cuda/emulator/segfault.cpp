#include "cuda/emulator/segfault.h"

#include <csetjmp>
#include <csignal>
#include <cstdio>

#include "cuda/emulator/fiber.h"

namespace prunekernels::simt {

#if PK_ASAN

void guarded_run(void (*body)(), void (*)(const char*)) { body(); }

#else

namespace {

thread_local bool guarding = false;
sigjmp_buf back;
void (*tell)(const char*);
struct sigaction before;

void on_fault(int signal, siginfo_t* info, void*) {
  if (!guarding) {  // the fault of another thread: the previous handler shall have it
    sigaction(signal, &before, nullptr);
    return;
  }
  char what[96] = "overflows its stack";
  if (info->si_code != SEGV_MAPERR && info->si_code != SEGV_ACCERR)
    std::snprintf(what, sizeof(what), "touches memory through a wild or misaligned pointer");
  else if (!is_stack_end(info->si_addr))
    std::snprintf(what, sizeof(what), "touches memory at %p, outside of every array", info->si_addr);
  tell(what);
  siglongjmp(back, 1);
}

// The handler needs a stack of its own, since the fault may come from a stack that has overflowed.
void lend_signal_stack() {
  static thread_local char stack[64 << 10];
  stack_t lent{};
  lent.ss_sp = stack;
  lent.ss_size = sizeof(stack);
  sigaltstack(&lent, nullptr);
}

}  // namespace

void guarded_run(void (*body)(), void (*told)(const char*)) {
  stack_t own_signal_stack;
  sigaltstack(nullptr, &own_signal_stack);
  lend_signal_stack();
  struct sigaction ours{};
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &ours, &before);
  guarding = true;
  tell = told;
  if (sigsetjmp(back, 1) == 0) body();
  guarding = false;
  sigaction(SIGSEGV, &before, nullptr);
  sigaltstack(&own_signal_stack, nullptr);
}

#endif

}  // namespace prunekernels::simt
