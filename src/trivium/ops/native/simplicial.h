/* A step of generation in 2-simplicial attention, trilinear, forward only; included once for each type, see kernels.c.
 *
 * One work item is one row with one key/value head. Its visible keys lie packed; logits and answers are two products of
 * matrices, four rows by two vectors at a time. Shapes: B rows, H query heads, G key/value heads, D head width, C slots.
 */
#define PAIR (2 * LANES)
#define PAIRED(count) (((count) + PAIR - 1) / PAIR * PAIR)

/* sums[4][2] = a (4, depth), rows `a_stride` apart, times two vectors of b (depth, ...), rows `b_stride` apart. */
INLINE void NAMED(product_4x2)(const REAL *a, int64_t a_stride, const REAL *b, int64_t b_stride, int64_t depth,
                               VECTOR sums[4][2]) {
    for (int row = 0; row < 4; row++) sums[row][0] = sums[row][1] = NAMED(all)(0);
    for (int64_t k = 0; k < depth; k++) {
        const VECTOR left = *(const VECTOR *)(b + k * b_stride), right = *(const VECTOR *)(b + k * b_stride + LANES);
#pragma GCC unroll 4
        for (int row = 0; row < 4; row++) {
            sums[row][0] += a[row * a_stride + k] * left;
            sums[row][1] += a[row * a_stride + k] * right;
        }
    }
}

/* The slots of a ring that a row of `length` tokens sees through a window, into `seen`; returns how many. */
INLINE int64_t NAMED(seen_slots)(int64_t length, int64_t slots, int64_t window, int64_t *seen) {
    const int64_t newest = length - 1;
    int64_t count = 0;
    for (int64_t age = 0; age < window && age < slots && age <= newest; age++) seen[count++] = (newest - age) % slots;
    return count;
}

/* Of queries (B, H, D), rings (B, C, G, D) of keys and values and the rows' lengths, out (B, H, D); a row without tokens
 * gives 0. Returns 0, or 1 without memory. */
int NAMED(simplicial_step)(const REAL *query, const REAL *keys1, const REAL *keys2, const REAL *values1,
                           const REAL *values2, const int64_t *lengths, REAL *out, int64_t rows, int64_t heads,
                           int64_t kv_heads, int64_t width, int64_t slots1, int64_t slots2, int64_t window1,
                           int64_t window2, double scale, int64_t threads) {
    const int64_t group = heads / kv_heads, most1 = (slots1 + 3) / 4 * 4, most2 = PAIRED(slots2), wide = PAIRED(width);
    const int64_t numbers = most1 * width + width * most2 + most1 * most2 + slots2 * wide + wide;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        REAL *left_SD = aligned_alloc(64, (numbers * sizeof(REAL) + 63) / 64 * 64);
        int64_t *seen1 = malloc((slots1 + slots2) * sizeof(int64_t)), *seen2 = seen1 + slots1;
        const int ready = left_SD && seen1;
        REAL *right_DS = left_SD + most1 * width, *weight_SS = right_DS + width * most2;
        REAL *value_SD = weight_SS + most1 * most2, *sum_D = value_SD + slots2 * wide;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < rows * kv_heads; item++) {
            if (!ready) continue;
            const int64_t row = item / kv_heads, kv_head = item % kv_heads, stride = kv_heads * width;
            const REAL *key1 = keys1 + (row * slots1 * kv_heads + kv_head) * width;
            const REAL *key2 = keys2 + (row * slots2 * kv_heads + kv_head) * width;
            const REAL *value1 = values1 + (row * slots1 * kv_heads + kv_head) * width;
            const REAL *value2 = values2 + (row * slots2 * kv_heads + kv_head) * width;
            const int64_t count1 = NAMED(seen_slots)(lengths[row], slots1, window1, seen1);
            const int64_t count2 = NAMED(seen_slots)(lengths[row], slots2, window2, seen2);
            const int64_t rows1 = (count1 + 3) / 4 * 4, columns2 = PAIRED(count2);
            memset(right_DS, 0, width * columns2 * sizeof(REAL));
            memset(value_SD, 0, count2 * wide * sizeof(REAL));
            for (int64_t s = 0; s < count2; s++) {
                for (int64_t d = 0; d < width; d++) right_DS[d * columns2 + s] = key2[seen2[s] * stride + d];
                memcpy(value_SD + s * wide, value2 + seen2[s] * stride, width * sizeof(REAL));
            }
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
                const REAL *query_D = query + (row * heads + head) * width;
                REAL *out_D = out + (row * heads + head) * width;
                memset(left_SD + count1 * width, 0, (rows1 - count1) * width * sizeof(REAL));
                for (int64_t s = 0; s < count1; s++)
                    for (int64_t d = 0; d < width; d++)
                        left_SD[s * width + d] = (REAL)scale * query_D[d] * key1[seen1[s] * stride + d];
                VECTOR sums[4][2], most = NAMED(all)(-(REAL)INFINITY);
                for (int64_t s = 0; s < rows1; s += 4)
                    for (int64_t c = 0; c < columns2; c += PAIR) {
                        NAMED(product_4x2)(left_SD + s * width, width, right_DS + c, columns2, width, sums);
                        for (int r = 0; r < 4; r++)
                            for (int half = 0; half < 2; half++) {
                                const int64_t left = s + r < count1 ? count2 - c - half * LANES : 0;
                                if (left < LANES)  /* what pads the keys weighs nothing */
                                    sums[r][half] =
                                        NAMED(select)((WHOLE)(NAMED(lanes) < (INTEGER)(left > 0 ? left : 0)),
                                                      sums[r][half], NAMED(all)(-(REAL)INFINITY));
                                *(VECTOR *)(weight_SS + (s + r) * columns2 + c + half * LANES) = sums[r][half];
                                most = NAMED(larger)(most, sums[r][half]);
                            }
                    }
                const REAL largest = NAMED(largest)(most);
                VECTOR total = {0};
                for (int64_t s = 0; s < rows1 * columns2; s += LANES) {
                    VECTOR *weight = (VECTOR *)(weight_SS + s);
                    const WHOLE there = (WHOLE)(*weight > -(REAL)INFINITY);
                    *weight = NAMED(select)(there, NAMED(exponential)(*weight - largest), NAMED(all)(0));
                    total += *weight;
                }
                memset(sum_D, 0, wide * sizeof(REAL));
                for (int64_t s = 0; s < rows1; s += 4)
                    for (int64_t d = 0; d < wide; d += PAIR) {
                        NAMED(product_4x2)(weight_SS + s * columns2, columns2, value_SD + d, wide, count2, sums);
                        for (int r = 0; r < 4 && s + r < count1; r++) {
                            const REAL *value = value1 + seen1[s + r] * stride + d;
                            for (int half = 0; half < 2; half++) {
                                const int64_t left = width - d - half * LANES;
                                if (left <= 0) continue;
                                *(VECTOR *)(sum_D + d + half * LANES) +=
                                    sums[r][half] * (left < LANES ? NAMED(load_part)(value + half * LANES, left)
                                                                  : NAMED(load)(value + half * LANES));
                            }
                        }
                    }
                const REAL whole = NAMED(total)(total);
                for (int64_t d = 0; d < width; d++) out_D[d] = whole > 0 ? sum_D[d] / whole : 0;
            }
        }
        free(left_SD);
        free(seen1);
    }
    return failed;
}
#undef PAIR
#undef PAIRED
