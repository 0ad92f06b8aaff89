/* A step of generation in a mixer with a memory, in place, forward only; included once for each type, see kernels.c.
 *
 * One work item is one row with one head. No column of the memory meets another: a few vectors of columns at a time stay
 * in registers while the keys' channels go by. Shapes: B rows, N corrections, H heads, K key width, V value width.
 */
#define COLUMNS 4

/* On `count` columns, at most COLUMNS vectors, of one memory (K, V). */
INLINE void NAMED(memory_columns)(const REAL *query_K, const REAL *keys_NHK, const REAL *values_NHV,
                                  const REAL *strength_NH, const REAL *decay, int64_t decay_stride, REAL *memory_KV,
                                  REAL *out_V, int64_t corrections, int64_t heads, int64_t width, int64_t value_width,
                                  int64_t vectors, int64_t last) {
    VECTOR read[COLUMNS] = {{0}}, known[COLUMNS], news[COLUMNS];
    for (int64_t n = 0; n < corrections; n++) {
        const REAL *key_K = keys_NHK + n * heads * width, *value_V = values_NHV + n * heads * value_width;
        const int ends = n == corrections - 1;
        for (int64_t c = 0; c < vectors; c++) {
            known[c] = NAMED(all)(0);
            news[c] = c == vectors - 1 ? NAMED(load_part)(value_V + c * LANES, last) : NAMED(load)(value_V + c * LANES);
        }
        if (strength_NH) {
            for (int64_t k = 0; k < width; k++) {
                const REAL *row = memory_KV + k * value_width;
                const REAL weight = key_K[k] * (decay && n == 0 ? decay[k * decay_stride] : 1);
                for (int64_t c = 0; c < vectors; c++)
                    known[c] += weight * (c == vectors - 1 && last < LANES ? NAMED(load_part)(row + c * LANES, last)
                                                                           : NAMED(load)(row + c * LANES));
            }
            for (int64_t c = 0; c < vectors; c++) news[c] = strength_NH[n * heads] * (news[c] - known[c]);
        }
        for (int64_t k = 0; k < width; k++) {
            REAL *row = memory_KV + k * value_width;
            const REAL kept = decay && n == 0 ? decay[k * decay_stride] : 1;
            for (int64_t c = 0; c < vectors; c++) {
                const int part = c == vectors - 1 && last < LANES;
                VECTOR held = part ? NAMED(load_part)(row + c * LANES, last) : NAMED(load)(row + c * LANES);
                held = kept * held + key_K[k] * news[c];
                if (part) NAMED(store_part)(row + c * LANES, held, last);
                else NAMED(store)(row + c * LANES, held);
                if (ends) read[c] += query_K[k] * held;
            }
        }
    }
    for (int64_t c = 0; c < vectors; c++) {
        if (c == vectors - 1) NAMED(store_part)(out_V + c * LANES, read[c], last);
        else NAMED(store)(out_V + c * LANES, read[c]);
    }
}

/* Decay the memories (B, H, K, V) by the factors `decay`, (B, H, K) with `by_channel`, else (B, H), or not if it is
 * null; write N keys (B, N, H, K) with values (B, N, H, V), each less what the memory answers, times a strength
 * (B, N, H), or, if this is null, as they are; and read the queries (B, H, K) into out (B, H, V). Returns 0. */
int NAMED(memory_step)(const REAL *query, const REAL *keys, const REAL *values, const REAL *strength,
                       const REAL *decay, REAL *memory, REAL *out, int64_t rows, int64_t corrections, int64_t heads,
                       int64_t width, int64_t value_width, int64_t by_channel, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < rows * heads; item++) {
        const int64_t row = item / heads, head = item % heads, first = row * corrections * heads + head;
        const REAL *decays = decay ? decay + item * (by_channel ? width : 1) : decay;
        for (int64_t v = 0; v < value_width; v += COLUMNS * LANES) {
            const int64_t left = value_width - v, count = left < COLUMNS * LANES ? left : COLUMNS * LANES;
            const int64_t vectors = (count + LANES - 1) / LANES, last = count - (vectors - 1) * LANES;
            const REAL *own = strength ? strength + first : strength;
#define MEMORY_COLUMNS(vectors, last)                                                                                  \
    NAMED(memory_columns)(query + item * width, keys + first * width, values + first * value_width + v, own, decays,    \
                          by_channel, memory + item * width * value_width + v, out + item * value_width + v,           \
                          corrections, heads, width, value_width, vectors, last)
            /* With its counts known to the compiler the usual case has no loop over vectors. */
            if (count == COLUMNS * LANES) MEMORY_COLUMNS(COLUMNS, LANES);
            else MEMORY_COLUMNS(vectors, last);
#undef MEMORY_COLUMNS
        }
    }
    return 0;
}
#undef COLUMNS

/* SiLU of a causal convolution of one new input x (B, C) a row behind its last R inputs (B, R, C), each channel by
 * itself with weights (R + 1, C), into out (B, C); the new input then takes the place of the oldest. Returns 0. */
int NAMED(convolution_step)(const REAL *x, REAL *recent, const REAL *weight, REAL *out, int64_t rows, int64_t past,
                            int64_t channels, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        REAL *before = recent + row * past * channels;
        for (int64_t c = 0; c < channels; c += LANES) {
            const int64_t count = channels - c < LANES ? channels - c : LANES;
            const int part = count < LANES;
#define LOADED(from) (part ? NAMED(load_part)(from, count) : NAMED(load)(from))
            const VECTOR new = LOADED(x + row * channels + c);
            VECTOR sum = new * LOADED(weight + past * channels + c);
            for (int64_t place = 0; place < past; place++) {
                REAL *here = before + place * channels + c;
                const VECTOR next = place == past - 1 ? new : LOADED(here + channels);
                sum += LOADED(here) * LOADED(weight + place * channels + c);
                if (part) NAMED(store_part)(here, next, count);
                else NAMED(store)(here, next);
            }
#undef LOADED
            /* Of a very negative sum the exponential would leave the range of what it takes. */
            const VECTOR most = NAMED(select)((WHOLE)(-sum > (REAL)80), NAMED(all)((REAL)80), -sum);
            sum = sum / (1 + NAMED(exponential)(most));
            if (part) NAMED(store_part)(out + row * channels + c, sum, count);
            else NAMED(store)(out + row * channels + c, sum);
        }
    }
    return 0;
}
