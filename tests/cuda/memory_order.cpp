// Atomics and fences for ThreadSanitizer, by the rule of C++ and PTX: an atomic by itself orders nothing. What a
// thread did before a fence comes before what another does after a fence of its own, when between the two fences the
// first updates an atomic and the second then updates the same one (PTX ISA, memory consistency model, "fence").
//
// ThreadSanitizer knows no fences. A thread therefore has two companions, identities that own nothing but what they
// were told: `fenced` knows what the thread had done at its last fence and tells it to the atomics that follow;
// `unfenced` hears what the atomics were told, and the thread learns it at its next fence.
#include <vector>

#include "fibres.h"
#include "launch_on_cpu.h"

// What instrumented code calls for an atomic access; no header of g++ declares it. Order 0 is relaxed.
extern "C" int __tsan_atomic32_load(const volatile int* address, int order);
extern "C" void __tsan_atomic32_store(volatile int* address, int value, int order);

namespace pe_cpu {
namespace {

uint32_t updated(Update kind, uint32_t old, uint32_t value, uint32_t expected) {
  switch (kind) {
    case Update::add:
      return old + value;
    case Update::add_float:
      return __float_as_uint(__uint_as_float(old) + __uint_as_float(value));
    case Update::exchange:
      return value;
    case Update::compare_exchange:
      return old == expected ? value : old;
    case Update::minimum:
      return old < value ? old : value;
    case Update::maximum:
      return old < value ? value : old;
    case Update::bit_and:
      return old & value;
    case Update::bit_or:
      return old | value;
  }
  return old;
}

}  // namespace

#ifndef PE_TSAN
void fence() {}
void forget_identities() {}

uint32_t update(Update kind, uint32_t* address, uint32_t value, uint32_t expected) {
  const uint32_t old = *address;
  *address = updated(kind, old, value, expected);
  return old;
}
#else
namespace {

std::vector<void*> identities;

// Knows only what came before the launch.
void* ignorant() {
  void* me = present_identity();
  become(scheduler_identity());
  void* made = new_identity();
  identities.push_back(made);
  become(me);
  return made;
}

// Who touches a word by an atomic: a plain access that is not ordered after it is then a race. It knows nothing but
// its own updates (and, of shared memory, what the block did up to its last barrier, which the caller knows too), so
// that a thread that meets it learns nothing else.
struct Updater {
  void* identity = nullptr;
  uint64_t token = 0;
};
Updater updaters[2][64];  // global and shared memory, by address

void act_as(void* identity, void (*act)(void*), void* token) {
  void* me = present_identity();
  become(identity);
  act(token);
  become(me);
}

}  // namespace

void fence() {
  Thread* thread = self;
  release(&thread->fence_token);
  thread->has_fenced = true;
  if (thread->unfenced == nullptr) return;
  act_as(thread->unfenced, release, &thread->unfenced_token);
  acquire(&thread->unfenced_token);
}

uint32_t update(Update kind, uint32_t* address, uint32_t value, uint32_t expected) {
  Thread* thread = self;
  void* me = present_identity();
  const bool shared = in_shared(address);
  Updater& updater = updaters[shared][reinterpret_cast<uintptr_t>(address) / 4 % 64];
  if (updater.identity == nullptr) updater.identity = ignorant();
  become(updater.identity);
  if (shared) acquire(barrier_token());
  volatile int* word = reinterpret_cast<volatile int*>(address);
  const uint32_t old = static_cast<uint32_t>(__tsan_atomic32_load(word, 0));
  __tsan_atomic32_store(word, static_cast<int>(updated(kind, old, value, expected)), 0);
  release(&updater.token);
  become(me);
  acquire(&updater.token);

  // The atomic's own address is the token of what it was told.
  if (thread->has_fenced) {
    if (thread->fenced == nullptr) thread->fenced = ignorant();
    act_as(thread->fenced, acquire, &thread->fence_token);
    act_as(thread->fenced, release, address);
  }
  if (thread->unfenced == nullptr) thread->unfenced = ignorant();
  act_as(thread->unfenced, acquire, address);
  return old;
}

void forget_identities() {
  for (void* identity : identities) delete_identity(identity);
  identities.clear();
  for (auto& space : updaters) {
    for (Updater& updater : space) updater.identity = nullptr;
  }
}
#endif

}  // namespace pe_cpu
