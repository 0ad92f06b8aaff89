/* GELU in its tanh form; included once for each type, see kernels.c.
 *
 * gelu(x) = x s(2 u) with u = c (x + a x^3) and the sigmoid s, the same as x/2 (1 + tanh u) without a tanh.
 */
INLINE VECTOR NAMED(rest)(VECTOR x) { /* exp(-2 u), (1 - s) / s */
    const VECTOR power = x * ((REAL)-1.5957691216057308 - (REAL)0.0713548162726 * (x * x));
    return NAMED(exponential)(NAMED(select)((WHOLE)(power > 80), NAMED(all)(80), power));
}

INLINE VECTOR NAMED(gelu)(VECTOR x) { return x / (1 + NAMED(rest)(x)); }

INLINE VECTOR NAMED(gelu_slope)(VECTOR x) {
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
