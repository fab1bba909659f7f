// For functions that must be compiled into their callers, and loops whose variables are to be held in registers.
#pragma once

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
