/* A step of generation in attention, forward only; included once for each type, see kernels.c.
 *
 * One work item is one row with some of its key/value heads, with all of them where the rows are enough for the threads:
 * the caches are then read from front to back. Its new keys and values go in first, and its queries read what the cache
 * then holds. Shapes: B rows, S slots, H query heads, G key/value heads, K head width.
 */

#define SLOTS 4 /* read at a time */

/* Write the sums of four vectors. */
INLINE void NAMED(four_totals)(const VECTOR *sums, REAL *out) {
#if VECTOR_BYTES == 16 && !SINGLE
    for (int n = 0; n < 4; n++) out[n] = NAMED(total)(sums[n]);
#else
    const VECTOR ab = INTERLEAVE_LOW(sums[0], sums[1]) + INTERLEAVE_HIGH(sums[0], sums[1]);
    const VECTOR cd = INTERLEAVE_LOW(sums[2], sums[3]) + INTERLEAVE_HIGH(sums[2], sums[3]);
    const VECTOR acbd = INTERLEAVE_LOW(ab, cd) + INTERLEAVE_HIGH(ab, cd);
    REAL total[4] = {0};
    for (int lane = 0; lane < LANES; lane++) total[lane % 4] += acbd[lane];
    out[0] = total[0], out[1] = total[2], out[2] = total[1], out[3] = total[3];
#endif
}

/* The vector at k of a stored row; behind the row there are zeros. */
INLINE VECTOR NAMED(load_at)(const STORE *row, int64_t k, int64_t width) {
    return width - k < LANES ? NAMED(load_part)(row + k, width - k) : NAMED(load)(row + k);
}

/* Write to logit_S what one query reads in `slots` slots (at most SLOTS of them) `stride` numbers apart. */
INLINE void NAMED(step_logits)(const REAL *query_K, const STORE *keys, int64_t stride, int64_t slots, int64_t width,
                               REAL *logit_S) {
    VECTOR sums[SLOTS] = {{0}};
    if (slots < SLOTS) {
        for (int64_t s = 0; s < slots; s++) {
            for (int64_t k = 0; k < width; k += LANES)
                sums[0] += *(VECTOR *)(query_K + k) * NAMED(load_at)(keys + s * stride, k, width);
            logit_S[s] = NAMED(total)(sums[0]);
            sums[0] = (VECTOR){0};
        }
        return;
    }
    for (int64_t k = 0; k < width; k += LANES)
        for (int s = 0; s < SLOTS; s++)
            sums[s] += *(VECTOR *)(query_K + k) * NAMED(load_at)(keys + s * stride, k, width);
    NAMED(four_totals)(sums, logit_S);
}

/* Add to sum_K the values of `slots` slots (at most SLOTS of them), each times its weight. */
INLINE void NAMED(step_values)(const REAL *weight_S, const STORE *values, int64_t stride, int64_t slots, int64_t width,
                               REAL *sum_K) {
    if (slots < SLOTS) {
        for (int64_t s = 0; s < slots; s++)
            for (int64_t k = 0; k < width; k += LANES)
                *(VECTOR *)(sum_K + k) += weight_S[s] * NAMED(load_at)(values + s * stride, k, width);
        return;
    }
    for (int64_t k = 0; k < width; k += LANES) {
        VECTOR sum = *(VECTOR *)(sum_K + k);
        for (int s = 0; s < SLOTS; s++) sum += weight_S[s] * NAMED(load_at)(values + s * stride, k, width);
        *(VECTOR *)(sum_K + k) = sum;
    }
}

/* Of packed (B, H + 2 G, K), queries, keys and values of one new token a row, write out (B, H, K) and, in place, the
 * keys and values (B, S, G, K), where `added`, if it is given, is not 0. Position p of a row lies in slot p mod S;
 * length counts the tokens before. Returns 0, or 1 without memory. */
int NAMED(attention_step)(const STORE *packed, STORE *keys, STORE *values, const int64_t *length, const int64_t *added,
                          STORE *out, int64_t rows, int64_t slots, int64_t heads, int64_t kv_heads, int64_t width,
                          double scale, int64_t threads) {
    const int64_t group = heads / kv_heads, padded = PADDED(width), room = PADDED(slots), stride = kv_heads * width;
    const int64_t wanted = (4 * threads + rows - 1) / (rows > 0 ? rows : 1);
    const int64_t parts = threads == 1 || wanted <= 1 ? 1 : wanted < kv_heads ? wanted : kv_heads;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        REAL *query_HK = aligned_alloc(64, (heads * (2 * padded + room) * sizeof(REAL) + 63) / 64 * 64);
        REAL *sum_HK = query_HK + heads * padded, *weight_HS = sum_HK + heads * padded;
        if (!query_HK) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < rows * parts; item++) {
            if (!query_HK) continue;
            const int64_t row = item / parts, part = item % parts;
            const int64_t first = part * kv_heads / parts, last = (part + 1) * kv_heads / parts;
            const STORE *given = packed + row * (heads + 2 * kv_heads) * width;
            STORE *key_SGK = keys + row * slots * stride, *value_SGK = values + row * slots * stride;
            const int64_t more = added ? added[row] : 1, after = length[row] + more;
            const int64_t count = after < 1 ? 1 : after < slots ? after : slots;
            if (more) {
                const int64_t slot = length[row] % slots * stride + first * width, size = (last - first) * width;
                memcpy(key_SGK + slot, given + (heads + first) * width, size * sizeof(STORE));
                memcpy(value_SGK + slot, given + (heads + kv_heads + first) * width, size * sizeof(STORE));
            }
            NAMED(gather)(given + first * group * width, width, (last - first) * group, width, padded, scale, query_HK);
            memset(sum_HK, 0, (last - first) * group * padded * sizeof(REAL));
            for (int64_t s = 0; s < count; s += SLOTS)
                for (int64_t n = 0; n < (last - first) * group; n++)
                    NAMED(step_logits)(query_HK + n * padded, key_SGK + s * stride + (first + n / group) * width, stride,
                                       count - s, width, weight_HS + n * room + s);
            for (int64_t n = 0; n < (last - first) * group; n++) {
                REAL *weight_S = weight_HS + n * room, largest = weight_S[0];
                for (int64_t s = 1; s < count; s++) largest = weight_S[s] > largest ? weight_S[s] : largest;
                const REAL share = 1 / NAMED(total)(NAMED(weigh)(weight_S, 0, PADDED(count), 0, count - 1, largest));
                for (int64_t s = 0; s < count; s++) weight_S[s] *= share;
            }
            for (int64_t s = 0; s < count; s += SLOTS)
                for (int64_t n = 0; n < (last - first) * group; n++)
                    NAMED(step_values)(weight_HS + n * room + s, value_SGK + s * stride + (first + n / group) * width,
                                       stride, count - s, width, sum_HK + n * padded);
            NAMED(scatter)(sum_HK, padded, (last - first) * group, width, 1, out + (row * heads + first * group) * width,
                           width);
        }
        free(query_HK);
    }
    return failed;
}

#undef SLOTS
