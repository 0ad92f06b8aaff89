/* GELU in its tanh form; included once for each type, see kernels.c.
 *
 * gelu(x) = x s(2 u) with u = c (x + a x^3) and the sigmoid s, the same as x/2 (1 + tanh u) without a tanh.
 */
INLINE VECTOR NAMED(rest)(VECTOR x) { /* exp(-2 u), (1 - s) / s */
    const VECTOR power = x * ((REAL)-1.5957691216057308 - (REAL)0.0713548162726 * (x * x));
    return NAMED(exponential)(NAMED(select)((WHOLE)(power > 80), NAMED(all)(80), power));
}

/* Of numbers so low that `rest` is cut off, nothing is left. */
INLINE VECTOR NAMED(gelu)(VECTOR x) { return NAMED(select)((WHOLE)(x < -10), x * 0, x / (1 + NAMED(rest)(x))); }

/* Beyond 9 the slope is 0 or 1 to the last digit, and the powers of x would overflow what is cut off. */
INLINE VECTOR NAMED(near)(VECTOR x) {
    return NAMED(select)((WHOLE)(x > 9), NAMED(all)(9), NAMED(select)((WHOLE)(x < -9), NAMED(all)(-9), x));
}

INLINE VECTOR NAMED(gelu_slope)(VECTOR x) {
    x = NAMED(near)(x);
    const VECTOR rest = NAMED(rest)(x), gate = 1 / (1 + rest);
    return gate + x * (rest * gate) * gate * ((REAL)1.5957691216057308 + (REAL)0.2140644488178 * (x * x));
}

int NAMED(gelu_forward)(const STORE *x, STORE *y, int64_t count, int64_t threads) {
    const int64_t whole = count / LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t place = 0; place < whole; place++)
        NAMED(store)(y + place * LANES, NAMED(gelu)(NAMED(load)(x + place * LANES)));
    const int64_t done = whole * LANES;
    NAMED(store_part)(y + done, NAMED(gelu)(NAMED(load_part)(x + done, count - done)), count - done);
    return 0;
}

int NAMED(gelu_backward)(const STORE *x, const STORE *grad_y, STORE *grad_x, int64_t count, int64_t threads) {
    const int64_t whole = count / LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t place = 0; place < whole; place++)
        NAMED(store)(grad_x + place * LANES,
                     NAMED(load)(grad_y + place * LANES) * NAMED(gelu_slope)(NAMED(load)(x + place * LANES)));
    const int64_t done = whole * LANES;
    NAMED(store_part)(grad_x + done,
                      NAMED(load_part)(grad_y + done, count - done) *
                          NAMED(gelu_slope)(NAMED(load_part)(x + done, count - done)),
                      count - done);
    return 0;
}

#if !STORED_BFLOAT16
/* active = gelu(x), and grad becomes that of x. */
INLINE void NAMED(gelu_both)(const REAL *x, REAL *active, REAL *grad, int64_t count) {
    for (int64_t place = 0; place < count; place += LANES) {
        const int64_t left = count - place < LANES ? count - place : LANES;
        const VECTOR here = left < LANES ? NAMED(load_part)(x + place, left) : NAMED(load)(x + place);
        const VECTOR given = left < LANES ? NAMED(load_part)(grad + place, left) : NAMED(load)(grad + place);
        const VECTOR near = NAMED(near)(here), rest = NAMED(rest)(near), gate = 1 / (1 + rest);
        const VECTOR slope =
            gate + near * (rest * gate) * gate * ((REAL)1.5957691216057308 + (REAL)0.2140644488178 * (near * near));
        /* As far out as -9 gelu is less than the rounding of what it is added to; it is the identity beyond 9. */
        const VECTOR value = here * gate, moved = given * slope;
        if (left < LANES)
            NAMED(store_part)(active + place, value, left), NAMED(store_part)(grad + place, moved, left);
        else
            NAMED(store)(active + place, value), NAMED(store)(grad + place, moved);
    }
}
#endif
