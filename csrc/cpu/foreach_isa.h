// Compiles PE_KERNELS once for each instruction set; see isa.h. No include guard: each op's .cpp includes it once.
//
// In the kernel file PE_LEVEL is 0 (scalar) to 4 (amx), and PE_NAMESPACE the namespace it is in.
#ifndef PE_KERNELS
#error "define PE_KERNELS to the kernel file first"
#endif
#include "cpu/isa.h"

#define PE_LEVEL 0
#define PE_NAMESPACE scalar
namespace pe::scalar {
#include PE_KERNELS
}
#undef PE_LEVEL
#undef PE_NAMESPACE

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#define PE_LEVEL 1
#define PE_NAMESPACE avx2
namespace pe::avx2 {
#include PE_KERNELS
}
#undef PE_LEVEL
#undef PE_NAMESPACE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#define PE_LEVEL 2
#define PE_NAMESPACE avx512
namespace pe::avx512 {
#include PE_KERNELS
}
#undef PE_LEVEL
#undef PE_NAMESPACE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#define PE_LEVEL 3
#define PE_NAMESPACE avx512_bf16
namespace pe::avx512_bf16 {
#include PE_KERNELS
}
#undef PE_LEVEL
#undef PE_NAMESPACE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target( \
    "amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#define PE_LEVEL 4
#define PE_NAMESPACE amx
namespace pe::amx {
#include PE_KERNELS
}
#undef PE_LEVEL
#undef PE_NAMESPACE
#pragma GCC pop_options
#endif
