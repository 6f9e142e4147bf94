// The instruction set the CPU kernels run with, chosen at run time, and how a kernel is compiled once for each.
//
// A kernel file `name.inl` holds plain functions and templates. `name.cpp` compiles it for every level:
//
//     #define PE_KERNELS "cpu/name.inl"
//     #include "cpu/foreach_isa.h"
//
// which puts each copy into a namespace of its own (pe::scalar, pe::avx2, ...), and calls the one in use with
//
//     PE_CALL(function)(arguments);
//
// System headers must be included before foreach_isa.h: code shared between levels must not be compiled for a high one.
#pragma once

// For the innermost steps: a call there would spill every vector register.
#define PE_INLINE inline __attribute__((always_inline))

namespace pe {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

Isa best_isa();     // what this CPU and operating system have
Isa current_isa();  // what is in use: the best, unless pinned
void set_isa(Isa level);

}  // namespace pe

#if defined(__x86_64__)
#define PE_CALL(function)                                                        \
  (::pe::current_isa() == ::pe::Isa::amx           ? ::pe::amx::function         \
   : ::pe::current_isa() == ::pe::Isa::avx512_bf16 ? ::pe::avx512_bf16::function \
   : ::pe::current_isa() == ::pe::Isa::avx512      ? ::pe::avx512::function      \
   : ::pe::current_isa() == ::pe::Isa::avx2        ? ::pe::avx2::function        \
                                                   : ::pe::scalar::function)
#else
#define PE_CALL(function) ::pe::scalar::function
#endif
