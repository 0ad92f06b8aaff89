/* A step of generation in attention, forward only; included once for each type, see kernels.c.
 *
 * One work item is one row with one key/value head: its new key and value go into the cache, and its queries read what
 * the cache then holds. Shapes: B rows, S slots, H query heads, G key/value heads, K head width.
 */

/* Of packed (B, H + 2 G, K), queries, keys and values of one new token a row, write out (B, H, K) and, in place, the
 * keys and values (B, S, G, K), where `added`, if it is given, is not 0. Position p of a row lies in slot p mod S;
 * length counts the tokens before. Returns 0, or 1 without memory. */
int NAMED(attention_step)(const STORE *packed, STORE *keys, STORE *values, const int64_t *length, const int64_t *added,
                          STORE *out, int64_t rows, int64_t slots, int64_t heads, int64_t kv_heads, int64_t width,
                          double scale, int64_t threads) {
    const int64_t group = heads / kv_heads, padded = PADDED(width), whole = width / LANES * LANES;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        REAL *query_K = aligned_alloc(64, ((2 * padded + PADDED(slots)) * sizeof(REAL) + 63) / 64 * 64);
        REAL *sum_K = query_K + padded, *weight_S = sum_K + padded;
        if (!query_K) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < rows * kv_heads; item++) {
            if (!query_K) continue;
            const int64_t row = item / kv_heads, kv_head = item % kv_heads;
            const STORE *given = packed + row * (heads + 2 * kv_heads) * width;
            const int64_t first = (row * slots * kv_heads + kv_head) * width, stride = kv_heads * width;
            const int64_t more = added ? added[row] : 1, after = length[row] + more;
            const int64_t count = after < 1 ? 1 : after < slots ? after : slots;
            if (more) {
                const int64_t slot = first + length[row] % slots * stride;
                memcpy(keys + slot, given + (heads + kv_head) * width, width * sizeof(STORE));
                memcpy(values + slot, given + (heads + kv_heads + kv_head) * width, width * sizeof(STORE));
            }
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
                NAMED(gather)(given + head * width, width, 1, width, padded, scale, query_K);
                REAL largest = 0;
                for (int64_t s = 0; s < count; s++) {
                    const STORE *key = keys + first + s * stride;
                    VECTOR sum = {0};
                    for (int64_t k = 0; k < whole; k += LANES) sum += *(VECTOR *)(query_K + k) * NAMED(load)(key + k);
                    if (whole < width)
                        sum += *(VECTOR *)(query_K + whole) * NAMED(load_part)(key + whole, width - whole);
                    weight_S[s] = NAMED(total)(sum);
                    if (s == 0 || weight_S[s] > largest) largest = weight_S[s];
                }
                const REAL share = 1 / NAMED(total)(NAMED(weigh)(weight_S, 0, PADDED(count), 0, count - 1, largest));
                for (int64_t k = 0; k < padded; k += LANES) {
                    const int64_t left = width - k;
                    VECTOR sum = {0};
                    for (int64_t s = 0; s < count; s++) {
                        const STORE *value = values + first + s * stride + k;
                        sum += weight_S[s] * (left < LANES ? NAMED(load_part)(value, left) : NAMED(load)(value));
                    }
                    *(VECTOR *)(sum_K + k) = share * sum;
                }
                NAMED(scatter)(sum_K, padded, 1, width, 1, out + (row * heads + head) * width, width);
            }
        }
        free(query_K);
    }
    return failed;
}
