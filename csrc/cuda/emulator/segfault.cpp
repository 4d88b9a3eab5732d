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
void* faulting_address;
struct sigaction before;

void on_fault(int signal, siginfo_t* info, void*) {
  if (!guarding) {  // some other thread's: as if this handler had never been
    sigaction(signal, &before, nullptr);
    return;
  }
  faulting_address = info->si_code > 0 && info->si_code != SI_KERNEL ? info->si_addr : nullptr;
  siglongjmp(back, 1);
}

// The fault may come from a stack that has run over: the handler needs one of its own.
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
  if (sigsetjmp(back, 1) == 0) {
    body();
  } else if (faulting_address == nullptr) {
    told("touches memory through a null, wild or misaligned pointer");
  } else if (is_stack_end(faulting_address)) {
    told("overflows its stack");
  } else {
    char what[96];
    std::snprintf(what, sizeof(what), "touches memory at %p, outside of every array", faulting_address);
    told(what);
  }
  guarding = false;
  sigaction(SIGSEGV, &before, nullptr);
  sigaltstack(&own_signal_stack, nullptr);
}

#endif

}  // namespace prunekernels::simt
