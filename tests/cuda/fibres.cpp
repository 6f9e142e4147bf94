// See fibres.h. Compiled without sanitizers: it runs between two fibres and belongs to neither.
#include "fibres.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__x86_64__) && !defined(PE_UCONTEXT)
#define PE_SWAP 1
#else
#include <ucontext.h>
#endif
#ifdef PE_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef PE_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace pe_cpu {
namespace {

constexpr size_t kStack = 256 << 10, kGuard = 4096;  // sanitizers make frames large; pages count when touched

void* scheduler_pointer = nullptr;  // the scheduler's stack pointer while a fibre runs
Fibre* running = nullptr;

#ifdef PE_ASAN
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
#endif

void fibre_main();

#ifdef PE_SWAP
// Saves what the System V ABI asks a callee to keep, and goes on where the other stack left off.
extern "C" void pe_cpu_swap(void** save, void* load);
asm(R"(
.text
.type pe_cpu_swap, @function
pe_cpu_swap:
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
.size pe_cpu_swap, . - pe_cpu_swap
)");

void* first_pointer(Fibre* fibre) {
  void** top = reinterpret_cast<void**>(fibre->stack + kGuard + kStack);
  *--top = nullptr;  // no return address: fibre_main never returns; also the alignment a call leaves
  *--top = reinterpret_cast<void*>(&fibre_main);
  return top - 6;  // what pe_cpu_swap pops
}
#else
void pe_cpu_swap(void** save, void* load) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(load));
}

void* first_pointer(Fibre* fibre) {
  ucontext_t* context = reinterpret_cast<ucontext_t*>(fibre->stack + kGuard);
  getcontext(context);
  context->uc_stack.ss_sp = context + 1;
  context->uc_stack.ss_size = kStack - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, &fibre_main, 0);
  return context;
}
#endif

void to_scheduler() {
#ifdef PE_ASAN
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, scheduler_stack, scheduler_stack_size);
#endif
  pe_cpu_swap(&running->stack_pointer, scheduler_pointer);
#ifdef PE_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void fibre_main() {
#ifdef PE_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  for (;;) {
    running->body(running->argument);
    running->done = true;
    to_scheduler();
  }
}

}  // namespace

Fibre* new_fibre() {
  Fibre* fibre = new Fibre;
  void* stack = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED || mprotect(stack, kGuard, PROT_NONE) != 0) {
    std::perror("CUDA on CPU: no memory for a thread's stack");
    std::abort();
  }
  fibre->stack = static_cast<char*>(stack);
  return fibre;
}

void prepare(Fibre* fibre, void (*body)(void*), void* argument) {
  fibre->body = body;
  fibre->argument = argument;
  fibre->done = false;
  if (fibre->stack_pointer == nullptr) fibre->stack_pointer = first_pointer(fibre);
}

void forget(Fibre* fibre) {
  fibre->stack_pointer = nullptr;
  fibre->done = true;
}

void resume(Fibre* fibre) {
  running = fibre;
#ifdef PE_ASAN
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, fibre->stack + kGuard, kStack);
#endif
  pe_cpu_swap(&scheduler_pointer, fibre->stack_pointer);
#ifdef PE_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  running = nullptr;
}

void pause() { to_scheduler(); }

#ifdef PE_TSAN
void* new_identity() { return __tsan_create_fiber(0); }
void delete_identity(void* identity) { __tsan_destroy_fiber(identity); }
void* present_identity() { return __tsan_get_current_fiber(); }
void become(void* identity) { __tsan_switch_to_fiber(identity, __tsan_switch_to_fiber_no_sync); }
void release(void* token) { __tsan_release(token); }
void acquire(void* token) { __tsan_acquire(token); }
#else
void* new_identity() { return nullptr; }
void delete_identity(void*) {}
void* present_identity() { return nullptr; }
void become(void*) {}
void release(void*) {}
void acquire(void*) {}
#endif

}  // namespace pe_cpu
