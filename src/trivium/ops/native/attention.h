/* Causal softmax attention for short sequences, forward and backward; included once for each type, see kernels.c.
 *
 * One work item is one row with one key/value head. Its keys and values are copied once into a buffer that stays in the
 * nearest cache, in the order that the products read them, and the queries follow in small blocks.
 *
 * Shapes: B rows, T tokens, N queries, H query heads, G key/value heads, K head width. Token strides and head strides
 * count elements; the K of a head follow one another. Query n of row b stands at token places[n] - b T and reads the
 * tokens down to `window` before it; without `places` every token is a query. offsets[b] is the first query of row b.
 */

#ifndef QUERIES
#define QUERIES 8 /* queries in a block */
#define ROWS 4    /* rows of a product that are held in registers */
typedef struct {
    const void *query, *key, *value;
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;
    const int64_t *offsets, *places;
    int64_t rows, tokens, heads, kv_heads, width, window;
    double scale;
    int64_t threads;
} Attention;

typedef struct {
    void *query, *key, *value;
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;
} Gradients;
#endif

/* c[m, n] (+)= sum over k of a[m, k] b[k, n], for `count` rows m and one or two vectors of columns n. */
INLINE void NAMED(tile)(const int count, const int vectors, int64_t inner, const REAL *a, int64_t a_row, int64_t a_inner,
                        const REAL *b, int64_t b_row, REAL *c, int64_t c_row, const int add) {
    VECTOR sums[ROWS][2];
    for (int m = 0; m < count; m++)
        for (int v = 0; v < vectors; v++)
            sums[m][v] = add ? *(const VECTOR *)(c + m * c_row + v * LANES) : (VECTOR){0};
    for (int64_t k = 0; k < inner; k++) {
        VECTOR first = *(const VECTOR *)(b + k * b_row), second = {0};
        if (vectors > 1) second = *(const VECTOR *)(b + k * b_row + LANES);
        KEEP_IN_REGISTER(first);
        KEEP_IN_REGISTER(second);
        for (int m = 0; m < count; m++) {
            REAL factor = a[m * a_row + k * a_inner];
            sums[m][0] += factor * first;
            if (vectors > 1) sums[m][1] += factor * second;
        }
    }
    for (int m = 0; m < count; m++)
        for (int v = 0; v < vectors; v++) *(VECTOR *)(c + m * c_row + v * LANES) = sums[m][v];
}

INLINE void NAMED(stripe)(const int vectors, int64_t m, int64_t inner, const REAL *a, int64_t a_row, int64_t a_inner,
                          const REAL *b, int64_t b_row, REAL *c, int64_t c_row, const int add) {
    int64_t start = 0;
    for (; start + ROWS <= m; start += ROWS)
        NAMED(tile)(ROWS, vectors, inner, a + start * a_row, a_row, a_inner, b, b_row, c + start * c_row, c_row, add);
    for (; start < m; start++)
        NAMED(tile)(1, vectors, inner, a + start * a_row, a_row, a_inner, b, b_row, c + start * c_row, c_row, add);
}

/* c (+)= a b with m rows and `columns` columns, a multiple of LANES. */
static __attribute__((noinline)) void NAMED(product)(int64_t m, int64_t columns, int64_t inner, const REAL *a,
                                                      int64_t a_row, int64_t a_inner, const REAL *b, int64_t b_row,
                                                      REAL *c, int64_t c_row, int add) {
    int64_t n = 0;
    for (; n + 2 * LANES <= columns; n += 2 * LANES)
        if (add)
            NAMED(stripe)(2, m, inner, a, a_row, a_inner, b + n, b_row, c + n, c_row, 1);
        else
            NAMED(stripe)(2, m, inner, a, a_row, a_inner, b + n, b_row, c + n, c_row, 0);
    if (n < columns) {
        if (add)
            NAMED(stripe)(1, m, inner, a, a_row, a_inner, b + n, b_row, c + n, c_row, 1);
        else
            NAMED(stripe)(1, m, inner, a, a_row, a_inner, b + n, b_row, c + n, c_row, 0);
    }
}

/* Copy (count, width) to rows of `padded` elements, times `scale`; what is behind them is 0. */
INLINE void NAMED(gather)(const STORE *restrict from, int64_t stride, int64_t count, int64_t width, int64_t padded,
                          REAL scale, REAL *restrict to) {
    for (int64_t t = 0; t < count; t++) {
        int64_t k = 0;
        for (; k + LANES <= width; k += LANES)
            *(VECTOR *)(to + t * padded + k) = scale * NAMED(load)(from + t * stride + k);
        if (k < width) *(VECTOR *)(to + t * padded + k) = scale * NAMED(load_part)(from + t * stride + k, width - k);
    }
}

/* Transpose (count, width), both padded to whole vectors with room behind, to rows of `padded` elements. */
INLINE void NAMED(transpose)(const REAL *restrict from, int64_t from_row, int64_t count, int64_t width, int64_t padded,
                             REAL *restrict to) {
    for (int64_t t = 0; t < count; t += LANES)
        for (int64_t k = 0; k < width; k += LANES) {
            VECTOR rows[LANES], mixed[LANES];
            for (int lane = 0; lane < LANES; lane++)
                rows[lane] = t + lane < count ? *(const VECTOR *)(from + (t + lane) * from_row + k) : (VECTOR){0};
            /* Interleaving row i with row i + LANES/2, log2(LANES) times over, is a transposition. */
            for (int step = 1; step < LANES; step *= 2) {
                for (int lane = 0; lane < LANES / 2; lane++) {
                    mixed[2 * lane] = INTERLEAVE_LOW(rows[lane], rows[lane + LANES / 2]);
                    mixed[2 * lane + 1] = INTERLEAVE_HIGH(rows[lane], rows[lane + LANES / 2]);
                }
                for (int lane = 0; lane < LANES; lane++) rows[lane] = mixed[lane];
            }
            for (int lane = 0; lane < LANES && k + lane < width; lane++)
                *(VECTOR *)(to + (k + lane) * padded + t) = rows[lane];
        }
}

INLINE void NAMED(scatter)(const REAL *restrict from, int64_t from_row, int64_t count, int64_t width, REAL scale,
                           STORE *restrict to, int64_t stride) {
    for (int64_t t = 0; t < count; t++) {
        int64_t k = 0;
        for (; k + LANES <= width; k += LANES)
            NAMED(store)(to + t * stride + k, scale * *(const VECTOR *)(from + t * from_row + k));
        if (k < width) NAMED(store_part)(to + t * stride + k, scale * *(const VECTOR *)(from + t * from_row + k), width - k);
    }
}

INLINE int64_t NAMED(place)(const Attention *call, int64_t row, int64_t query) {
    return call->places ? call->places[query] - row * call->tokens : query - row * call->tokens;
}

/* Where the lanes from token s on lie within first .. last: all ones there, 0 elsewhere. */
INLINE WHOLE NAMED(inside)(int64_t s, int64_t first, int64_t last) {
    const WHOLE lane = NAMED(lanes);
    return (WHOLE)(lane >= (INTEGER)(first - s)) & (WHOLE)(lane <= (INTEGER)(last - s));
}

/* Turn the logits from start to padded into exp(logit - shift), and 0 for tokens outside first .. last. */
INLINE VECTOR NAMED(weigh)(REAL *row, int64_t start, int64_t padded, int64_t first, int64_t last, REAL shift) {
    VECTOR sum = {0};
    for (int64_t s = start; s < padded; s += LANES) {
        const WHOLE inside = NAMED(inside)(s, first, last);
        const VECTOR weight = NAMED(select)(inside, NAMED(exponential)(*(VECTOR *)(row + s) - shift), (VECTOR){0});
        *(VECTOR *)(row + s) = weight;
        sum += weight;
    }
    return sum;
}

/* Write out (N, H, K) and, (N, H, 2), the largest logit of each softmax and 1 / its denominator. Returns 0, or 1
 * without memory. */
int NAMED(attention_forward)(const Attention *call, STORE *out, REAL *softmaxes) {
    const int64_t tokens = call->tokens, width = call->width, group = call->heads / call->kv_heads;
    const int64_t padded_tokens = PADDED(tokens), padded_width = PADDED(width);
    const int64_t items = call->rows * call->kv_heads;
    const int64_t room = padded_width * tokens * 2 + width * padded_tokens + QUERIES * (padded_tokens + 2 * padded_width);
    int failed = 0;
#pragma omp parallel num_threads(call->threads)
    {
        REAL *key_TK = aligned_alloc(64, (room * sizeof(REAL) + 63) / 64 * 64);
        REAL *value_TK = key_TK + padded_width * tokens, *key_KT = value_TK + padded_width * tokens;
        REAL *query_QK = key_KT + width * padded_tokens, *out_QK = query_QK + QUERIES * padded_width;
        REAL *weight_QT = out_QK + QUERIES * padded_width;
        if (!key_TK) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < items; item++) {
            if (!key_TK) continue;
            const int64_t row = item / call->kv_heads, kv_head = item % call->kv_heads;
            const int64_t begin = call->places ? call->offsets[row] : row * tokens;
            const int64_t end = call->places ? call->offsets[row + 1] : begin + tokens;
            if (begin == end) continue;
            const int64_t reached = NAMED(place)(call, row, end - 1) + 1;
            NAMED(gather)((const STORE *)call->key + row * tokens * call->key_token + kv_head * call->key_head,
                          call->key_token, reached, width, padded_width, 1, key_TK);
            NAMED(transpose)(key_TK, padded_width, reached, width, padded_tokens, key_KT);
            NAMED(gather)((const STORE *)call->value + row * tokens * call->value_token + kv_head * call->value_head,
                          call->value_token, reached, width, padded_width, 1, value_TK);
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
                for (int64_t query = begin; query < end; query += QUERIES) {
                    const int64_t count = end - query < QUERIES ? end - query : QUERIES;
                    const int64_t limit = NAMED(place)(call, row, query + count - 1) + 1;
                    const int64_t padded = PADDED(limit);
                    int64_t from = NAMED(place)(call, row, query) + 1 - call->window;
                    from = from < 0 ? 0 : from;
                    NAMED(gather)((const STORE *)call->query + query * call->query_token + head * call->query_head,
                                  call->query_token, count, width, padded_width, call->scale, query_QK);
                    const int64_t start = from / LANES * LANES;
                    NAMED(product)(count, padded - start, width, query_QK, padded_width, 1, key_KT + start,
                                   padded_tokens, weight_QT + start, padded_tokens, 0);
                    for (int64_t n = 0; n < count; n++) {
                        REAL *weight_T = weight_QT + n * padded_tokens;
                        const int64_t last = NAMED(place)(call, row, query + n);
                        const int64_t first = last + 1 - call->window < 0 ? 0 : last + 1 - call->window;
                        VECTOR most = NAMED(all)(weight_T[first]);
                        for (int64_t s = start; s < padded; s += LANES)
                            most = NAMED(larger)(most, NAMED(select)(NAMED(inside)(s, first, last),
                                                                     *(VECTOR *)(weight_T + s), most));
                        const REAL largest = NAMED(largest)(most);
                        const REAL share =
                            1 / NAMED(total)(NAMED(weigh)(weight_T, start, padded, first, last, largest));
                        for (int64_t s = start; s < padded; s += LANES) *(VECTOR *)(weight_T + s) *= share;
                        REAL *softmax = softmaxes + 2 * ((query + n) * call->heads + head);
                        softmax[0] = largest, softmax[1] = share;
                    }
                    NAMED(product)(count, padded_width, limit - from, weight_QT + from, padded_tokens, 1,
                                   value_TK + from * padded_width, padded_width, out_QK, padded_width, 0);
                    NAMED(scatter)(out_QK, padded_width, count, width, 1, out + (query * call->heads + head) * width,
                                   call->heads * width);
                }
        }
        free(key_TK);
    }
    return failed;
}

/* Write the gradients of queries, keys and values, given that of the output (N, H, K). */
int NAMED(attention_backward)(const Attention *call, const STORE *grad_out, const REAL *softmaxes,
                              const Gradients *grads) {
    const int64_t tokens = call->tokens, width = call->width, group = call->heads / call->kv_heads;
    const int64_t padded_tokens = PADDED(tokens), padded_width = PADDED(width);
    const int64_t items = call->rows * call->kv_heads;
    const int64_t room = padded_width * tokens * 4 + 2 * width * padded_tokens + QUERIES * (2 * padded_tokens + 3 * padded_width);
    int failed = 0;
#pragma omp parallel num_threads(call->threads)
    {
        REAL *key_TK = aligned_alloc(64, (room * sizeof(REAL) + 63) / 64 * 64);
        REAL *value_TK = key_TK + padded_width * tokens, *key_KT = value_TK + padded_width * tokens;
        REAL *value_KT = key_KT + width * padded_tokens, *grad_key_TK = value_KT + width * padded_tokens;
        REAL *grad_value_TK = grad_key_TK + padded_width * tokens;
        REAL *query_QK = grad_value_TK + padded_width * tokens, *grad_query_QK = query_QK + QUERIES * padded_width;
        REAL *grad_QK = grad_query_QK + QUERIES * padded_width, *weight_QT = grad_QK + QUERIES * padded_width;
        REAL *slope_QT = weight_QT + QUERIES * padded_tokens;
        if (!key_TK) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < items; item++) {
            if (!key_TK) continue;
            const int64_t row = item / call->kv_heads, kv_head = item % call->kv_heads;
            const int64_t begin = call->places ? call->offsets[row] : row * tokens;
            const int64_t end = call->places ? call->offsets[row + 1] : begin + tokens;
            const int64_t reached = begin == end ? 0 : NAMED(place)(call, row, end - 1) + 1;
            NAMED(gather)((const STORE *)call->key + row * tokens * call->key_token + kv_head * call->key_head,
                          call->key_token, reached, width, padded_width, 1, key_TK);
            NAMED(transpose)(key_TK, padded_width, reached, width, padded_tokens, key_KT);
            NAMED(gather)((const STORE *)call->value + row * tokens * call->value_token + kv_head * call->value_head,
                          call->value_token, reached, width, padded_width, 1, value_TK);
            NAMED(transpose)(value_TK, padded_width, reached, width, padded_tokens, value_KT);
            memset(grad_key_TK, 0, padded_width * tokens * 2 * sizeof(REAL));
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
                for (int64_t query = begin; query < end; query += QUERIES) {
                    const int64_t count = end - query < QUERIES ? end - query : QUERIES;
                    const int64_t limit = NAMED(place)(call, row, query + count - 1) + 1;
                    const int64_t padded = PADDED(limit);
                    int64_t from = NAMED(place)(call, row, query) + 1 - call->window;
                    from = from < 0 ? 0 : from;
                    const int64_t start = from / LANES * LANES;
                    NAMED(gather)((const STORE *)call->query + query * call->query_token + head * call->query_head,
                                  call->query_token, count, width, padded_width, call->scale, query_QK);
                    NAMED(gather)(grad_out + (query * call->heads + head) * width, call->heads * width, count, width,
                                  padded_width, 1, grad_QK);
                    NAMED(product)(count, padded - start, width, query_QK, padded_width, 1, key_KT + start,
                                   padded_tokens, weight_QT + start, padded_tokens, 0);
                    NAMED(product)(count, padded - start, width, grad_QK, padded_width, 1, value_KT + start,
                                   padded_tokens, slope_QT + start, padded_tokens, 0);
                    for (int64_t n = 0; n < count; n++) {
                        REAL *weight_T = weight_QT + n * padded_tokens, *slope_T = slope_QT + n * padded_tokens;
                        const int64_t last = NAMED(place)(call, row, query + n);
                        const int64_t first = last + 1 - call->window < 0 ? 0 : last + 1 - call->window;
                        const REAL *softmax = softmaxes + 2 * ((query + n) * call->heads + head);
                        NAMED(weigh)(weight_T, start, padded, first, last, softmax[0]);
                        VECTOR sum = {0};
                        for (int64_t s = start; s < padded; s += LANES) {
                            *(VECTOR *)(weight_T + s) *= softmax[1];
                            sum += *(VECTOR *)(weight_T + s) * *(VECTOR *)(slope_T + s);
                        }
                        const REAL mean = NAMED(total)(sum);
                        for (int64_t s = start; s < padded; s += LANES)
                            *(VECTOR *)(slope_T + s) = *(VECTOR *)(weight_T + s) * (*(VECTOR *)(slope_T + s) - mean);
                    }
                    NAMED(product)(count, padded_width, limit - from, slope_QT + from, padded_tokens, 1,
                                   key_TK + from * padded_width, padded_width, grad_query_QK, padded_width, 0);
                    NAMED(product)(limit - from, padded_width, count, slope_QT + from, 1, padded_tokens, query_QK,
                                   padded_width, grad_key_TK + from * padded_width, padded_width, 1);
                    NAMED(product)(limit - from, padded_width, count, weight_QT + from, 1, padded_tokens, grad_QK,
                                   padded_width, grad_value_TK + from * padded_width, padded_width, 1);
                    NAMED(scatter)(grad_query_QK, padded_width, count, width, call->scale,
                                   (STORE *)grads->query + query * grads->query_token + head * grads->query_head,
                                   grads->query_token);
                }
            NAMED(scatter)(grad_key_TK, padded_width, tokens, width, 1,
                           (STORE *)grads->key + row * tokens * grads->key_token + kv_head * grads->key_head,
                           grads->key_token);
            NAMED(scatter)(grad_value_TK, padded_width, tokens, width, 1,
                           (STORE *)grads->value + row * tokens * grads->value_token + kv_head * grads->value_head,
                           grads->value_token);
        }
        free(key_TK);
    }
    return failed;
}
