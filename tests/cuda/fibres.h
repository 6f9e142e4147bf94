// Fibres: stacks that one OS thread runs by turns, each a thread of its own to the sanitizers.
// ThreadSanitizer orders memory by the barriers we report to it, never by the turns taken, so it finds a race in
// every order of the fibres. (sanitizer/tsan_interface.h, sanitizer/common_interface_defs.h)
#pragma once

#include <cstddef>

namespace pe_cpu {

struct Fibre {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  bool done = true;
};

// A fibre with a fresh stack above a page that may not be touched. It is there to be used again, for good.
Fibre* new_fibre();

// Makes an idle fibre run body(argument) when it is next resumed.
void prepare(Fibre* fibre, void (*body)(void*), void* argument);
void forget(Fibre* fibre);  // what it was running will not go on
void resume(Fibre* fibre);  // by the scheduler: runs the fibre until it pauses or is done
void pause();               // by a fibre: back to the scheduler

// Whom ThreadSanitizer takes us for. Nothing happens without it.
void* new_identity();  // knows what the present one knows
void delete_identity(void* identity);
void* present_identity();
void become(void* identity);
void release(void* token);  // what we did comes before whatever acquires the token later
void acquire(void* token);

}  // namespace pe_cpu
