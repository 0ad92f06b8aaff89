/* Vectors of REAL, included once for each type; see kernels.c. */
#define LANES ((int64_t)(VECTOR_BYTES / sizeof(REAL)))
#define PADDED(count) (((count) + LANES - 1) / LANES * LANES)
#define VECTOR NAMED(vector)
#define WHOLE NAMED(whole)

typedef REAL VECTOR __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
typedef INTEGER WHOLE __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

/* 0, 1, 2 ... and the two halves of two vectors interleaved. */
#if VECTOR_BYTES == 64 && SINGLE
static const WHOLE NAMED(lanes) = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#undef INTERLEAVE_LOW
#undef INTERLEAVE_HIGH
#define INTERLEAVE_LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define INTERLEAVE_HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif VECTOR_BYTES == 64 || (VECTOR_BYTES == 32 && SINGLE)
static const WHOLE NAMED(lanes) = {0, 1, 2, 3, 4, 5, 6, 7};
#undef INTERLEAVE_LOW
#undef INTERLEAVE_HIGH
#define INTERLEAVE_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define INTERLEAVE_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#elif VECTOR_BYTES == 32 || SINGLE
static const WHOLE NAMED(lanes) = {0, 1, 2, 3};
#undef INTERLEAVE_LOW
#undef INTERLEAVE_HIGH
#define INTERLEAVE_LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define INTERLEAVE_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#else
static const WHOLE NAMED(lanes) = {0, 1};
#undef INTERLEAVE_LOW
#undef INTERLEAVE_HIGH
#define INTERLEAVE_LOW(a, b) __builtin_shufflevector(a, b, 0, 2)
#define INTERLEAVE_HIGH(a, b) __builtin_shufflevector(a, b, 1, 3)
#endif

INLINE VECTOR NAMED(all)(REAL value) { return value - (VECTOR){0}; }

/* Lanes of `yes` where the mask is all ones, of `no` where it is 0. */
INLINE VECTOR NAMED(select)(WHOLE mask, VECTOR yes, VECTOR no) {
    return (VECTOR)(((WHOLE)yes & mask) | ((WHOLE)no & ~mask));
}

/* exp(x) for x <= 88 (709 in double); what would be below the normal numbers is the smallest of them, or 0. */
INLINE VECTOR NAMED(exponential)(VECTOR x) {
#if SINGLE
    const REAL lowest = -87.0f, magic = 12582912.0f, high = 0.693359375f, low = -2.12194440e-4f;
    const int bits = 23;
#else
    const REAL lowest = -708.0, magic = 6755399441055744.0, high = 6.93145751953125e-1, low = 1.42860682030941723212e-6;
    const int bits = 52;
#endif
    x = NAMED(select)((WHOLE)(x < lowest), NAMED(all)(lowest), x);
    VECTOR shifted = x * (REAL)1.4426950408889634 + magic;
    VECTOR count = shifted - magic;
    VECTOR rest = x - count * high - count * low;
#if SINGLE
    VECTOR sum = NAMED(all)(1.9875691500e-4f);
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
#else
    VECTOR sum = NAMED(all)(1.0 / 6227020800.0);
    static const double factors[] = {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0,
                                     720.0,       120.0,      24.0,      6.0,      2.0,     1.0, 1.0};
    for (int term = 0; term < 13; term++) sum = sum * rest + 1.0 / factors[term];
#endif
    /* The magic number leaves the count in the lowest bits of the sum; it moves to the exponent. */
    WHOLE power = ((WHOLE)shifted - (WHOLE)NAMED(all)(magic)) << bits;
    return (VECTOR)((WHOLE)sum + power);
}

/* STORED, one vector's worth of what is stored, to and from a vector of REAL. */
#if STORED_BFLOAT16
typedef uint16_t NAMED(halves) __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t NAMED(bits) __attribute__((vector_size(VECTOR_BYTES), may_alias));

INLINE VECTOR NAMED(load)(const STORE *from) {
    return (VECTOR)(__builtin_convertvector(*(const NAMED(halves) *)from, NAMED(bits)) << 16);
}

INLINE void NAMED(store)(STORE *to, VECTOR value) {
    NAMED(bits) bits = (NAMED(bits))value;
    NAMED(bits) rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    WHOLE missing = (WHOLE)(value != value);
    rounded = (NAMED(bits))(((WHOLE)rounded & ~missing) | (missing & 0x7fc0));
    *(NAMED(halves) *)to = __builtin_convertvector(rounded, NAMED(halves));
}
#else
INLINE VECTOR NAMED(load)(const STORE *from) { return *(const VECTOR *)from; }
INLINE void NAMED(store)(STORE *to, VECTOR value) { *(VECTOR *)to = value; }
#endif

/* The first `count` lanes, the others 0. */
INLINE VECTOR NAMED(load_part)(const STORE *from, int64_t count) {
    STORE lanes[LANES];
    memset(lanes, 0, sizeof lanes);
    memcpy(lanes, from, count * sizeof(STORE));
    return NAMED(load)(lanes);
}

INLINE void NAMED(store_part)(STORE *to, VECTOR value, int64_t count) {
    STORE lanes[LANES];
    NAMED(store)(lanes, value);
    memcpy(to, lanes, count * sizeof(STORE));
}

INLINE VECTOR NAMED(larger)(VECTOR a, VECTOR b) { return NAMED(select)((WHOLE)(a > b), a, b); }

INLINE REAL NAMED(largest)(VECTOR x) {
    REAL largest = x[0];
    for (int lane = 1; lane < LANES; lane++) largest = x[lane] > largest ? x[lane] : largest;
    return largest;
}

INLINE REAL NAMED(total)(VECTOR x) {
    REAL sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}
