/* The native backend's kernels, each compiled for float, bfloat16 (stored; computed in float) and double.
 *
 * kernels.py compiles this file for the processor it runs on and calls it through ctypes. Vectors are those of GCC and
 * Clang, as wide as the processor's. Work is split among OpenMP threads so that the result does not depend on their
 * number: whatever is summed is summed by one of them, or in pieces that the shape alone decides.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#define INLINE static inline __attribute__((always_inline))

/* GCC else reads a vector from memory again at each of its uses. */
#if defined(__x86_64__)
#define KEEP_IN_REGISTER(vector) __asm__("" : "+v"(vector))
#else
#define KEEP_IN_REGISTER(vector) (void)0
#endif

#define JOIN_(name, suffix) name##_##suffix
#define JOIN(name, suffix) JOIN_(name, suffix)
#define NAMED(name) JOIN(name, SUFFIX)

#define REAL float
#define INTEGER int32_t
#define STORE float
#define SUFFIX float32
#define SINGLE 1
#define STORED_BFLOAT16 0
#include "vectors.h"
#include "attention.h"
#include "step.h"
#include "pointwise.h"
#if !STORED_BFLOAT16
#include "linear.h"
#include "adamw.h"
#include "norm.h"
#include "memory.h"
#include "simplicial.h"
#endif
#undef STORE
#undef SUFFIX

#define STORE uint16_t
#define SUFFIX bfloat16
#undef STORED_BFLOAT16
#define STORED_BFLOAT16 1
#include "vectors.h"
#include "attention.h"
#include "step.h"
#include "pointwise.h"
#undef REAL
#undef INTEGER
#undef STORE
#undef SUFFIX
#undef SINGLE

#define REAL double
#define INTEGER int64_t
#define STORE double
#define SUFFIX float64
#define SINGLE 0
#undef STORED_BFLOAT16
#define STORED_BFLOAT16 0
#include "vectors.h"
#include "attention.h"
#include "step.h"
#include "pointwise.h"
#if !STORED_BFLOAT16
#include "linear.h"
#include "adamw.h"
#include "norm.h"
#include "memory.h"
#include "simplicial.h"
#endif
