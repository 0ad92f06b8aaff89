/* Products with a weight, as linear maps and their gradients need them; included once for each type, see kernels.c.
 *
 * One factor is copied into panels of two vectors' width, each read from front to back, and the rows of the other follow,
 * as many at a time as their sums fit in registers. Rows come in blocks that stay in the nearer caches until all that is
 * to be computed from them is done.
 *
 * Shapes: M rows, K inputs, N outputs, F hidden width.
 */

#ifndef PANEL
#define PANEL (2 * LANES)
#if VECTOR_BYTES == 64
#define HELD 12 /* rows whose sums are held in registers, of two vectors each */
#else
#define HELD 6
#endif
#define BLOCK 96 /* rows of a block, a multiple of HELD */
#define PIECES 8 /* of the sums over rows, at most: they do not depend on the number of threads */
#define PANELS(width) (((width) + PANEL - 1) / PANEL)
#define GROUPS(width) (((width) + HELD - 1) / HELD)
#define ROOM(count) (((count) * sizeof(REAL) + 63) / 64 * 64)
/* Elements of packed (inner, outer) with the row that the sums start from, of a weight's gradient in a piece, and of what
 * adding to that copies. */
#define PACKED(inner, outer) (((inner) + 1) * PANELS(outer) * PANEL)
#define PART(outer, inner) (GROUPS(outer) * HELD * (PANELS(inner) * PANEL + 1))
#define COPIED(inner) ((PANELS(inner) * PANEL + HELD) * BLOCK)
#endif

/* c[m, 0 .. wide) (+)= start + sum over k of a[m, k] b[k], b a panel, for `count` rows m. */
INLINE void NAMED(sums)(const int count, int64_t inner, const REAL *a, int64_t a_row, int64_t a_inner, const REAL *b,
                        const REAL *start, const int add, REAL *c, int64_t c_row, int64_t wide) {
    VECTOR sums[HELD][2];
    for (int m = 0; m < count; m++)
        for (int v = 0; v < 2; v++) sums[m][v] = start ? *(const VECTOR *)(start + v * LANES) : (VECTOR){0};
    for (int64_t k = 0; k < inner; k++) {
        VECTOR first = *(const VECTOR *)(b + k * PANEL), second = *(const VECTOR *)(b + k * PANEL + LANES);
        KEEP_IN_REGISTER(first);
        KEEP_IN_REGISTER(second);
        for (int m = 0; m < count; m++) {
            const REAL factor = a[m * a_row + k * a_inner];
            sums[m][0] += factor * first;
            sums[m][1] += factor * second;
        }
    }
    for (int m = 0; m < count; m++)
        for (int v = 0; v < 2; v++) {
            REAL *to = c + m * c_row + v * LANES;
            const int64_t left = wide - v * LANES;
            if (left >= LANES) {
                if (add) sums[m][v] += *(VECTOR *)to;
                *(VECTOR *)to = sums[m][v];
            } else
                for (int64_t n = 0; n < left; n++) to[n] = sums[m][v][n] + (add ? to[n] : 0);
        }
}

/* c (rows, outer) = a (rows, inner) times what `pack` made. */
static __attribute__((noinline)) void NAMED(times)(int64_t rows, int64_t inner, int64_t outer, const REAL *a,
                                                    const REAL *packed, REAL *c) {
    const REAL *starts = packed + PANELS(outer) * inner * PANEL;
    for (int64_t first = 0; first < outer; first += PANEL) {
        const REAL *b = packed + first * inner;
        int64_t m = 0;
        for (; m + HELD <= rows; m += HELD)
            NAMED(sums)(HELD, inner, a + m * inner, inner, 1, b, starts + first, 0, c + m * outer + first, outer,
                        outer - first);
        for (; m < rows; m++)
            NAMED(sums)(1, inner, a + m * inner, inner, 1, b, starts + first, 0, c + m * outer + first, outer,
                        outer - first);
    }
}

/* to[k, 0 .. PANEL) = from[k, 0 .. wide) and 0 behind, for `count` rows k. */
INLINE void NAMED(copy_panel)(const REAL *from, int64_t row, int64_t count, int64_t wide, REAL *to) {
    if (wide >= PANEL)
        for (int64_t k = 0; k < count; k++) memcpy(to + k * PANEL, from + k * row, PANEL * sizeof(REAL));
    else
        for (int64_t k = 0; k < count; k++)
            for (int64_t n = 0; n < PANEL; n++) to[k * PANEL + n] = n < wide ? from[k * row + n] : 0;
}

/* Make a panel of a weight (inner, outer), or of one (outer, inner) if it is `transposed`; its sums start with the bias,
 * or 0 without one. */
static __attribute__((noinline)) void NAMED(pack)(const REAL *weight, const REAL *bias, int64_t inner, int64_t outer,
                                                   int64_t transposed, int64_t panel, REAL *packed) {
    const int64_t first = panel * PANEL, wide = outer - first < PANEL ? outer - first : PANEL;
    REAL *to = packed + first * inner, *starts = packed + PANELS(outer) * inner * PANEL + first;
    if (transposed)
        for (int64_t n = 0; n < PANEL; n++)
            for (int64_t k = 0; k < inner; k++) to[k * PANEL + n] = n < wide ? weight[(first + n) * inner + k] : 0;
    else
        NAMED(copy_panel)(weight + first, outer, inner, wide, to);
    for (int64_t n = 0; n < PANEL; n++) starts[n] = bias && n < wide ? bias[first + n] : 0;
}

/* part (PART(outer, inner)) (+)= grad^T x, and behind it the sum of grad's rows, for up to BLOCK rows of grad
 * (rows, outer) and x (rows, inner); `copied` has room for COPIED(inner). */
static __attribute__((noinline)) void NAMED(add_product)(int64_t rows, int64_t outer, int64_t inner, const REAL *grad,
                                                          const REAL *x, int add, REAL *part, REAL *copied) {
    const int64_t width = PANELS(inner) * PANEL;
    REAL *group_MN = copied + width * BLOCK, *part_bias = part + GROUPS(outer) * HELD * width;
    for (int64_t first = 0; first < inner; first += PANEL)
        NAMED(copy_panel)(x + first, inner, rows, inner - first, copied + first * BLOCK);
    for (int64_t first = 0; first < outer; first += HELD) {
        const int64_t wide = outer - first < HELD ? outer - first : HELD;
        if (wide == HELD)
            for (int64_t m = 0; m < rows; m++)
                memcpy(group_MN + m * HELD, grad + m * outer + first, HELD * sizeof(REAL));
        else
            for (int64_t m = 0; m < rows; m++)
                for (int64_t n = 0; n < HELD; n++) group_MN[m * HELD + n] = n < wide ? grad[m * outer + first + n] : 0;
        for (int64_t panel = 0; panel < width; panel += PANEL) {
            const REAL *b = copied + panel * BLOCK;
            REAL *to = part + first * width + panel;
            if (add)
                NAMED(sums)(HELD, rows, group_MN, 1, HELD, b, 0, 1, to, width, PANEL);
            else
                NAMED(sums)(HELD, rows, group_MN, 1, HELD, b, 0, 0, to, width, PANEL);
        }
    }
    int64_t n = 0;
    for (; n + LANES <= outer; n += LANES) {
        VECTOR sum = {0};
        if (add) sum += *(VECTOR *)(part_bias + n);
        for (int64_t m = 0; m < rows; m++) sum += *(const VECTOR *)(grad + m * outer + n);
        *(VECTOR *)(part_bias + n) = sum;
    }
    for (; n < outer; n++) {
        REAL sum = add ? part_bias[n] : 0;
        for (int64_t m = 0; m < rows; m++) sum += grad[m * outer + n];
        part_bias[n] = sum;
    }
}

/* Row n of a weight's gradient (outer, inner) and of the bias's, from the parts of all pieces. */
INLINE void NAMED(add_parts)(int64_t n, int64_t outer, int64_t inner, const REAL *parts, int64_t stride, int64_t pieces,
                             REAL *grad_weight, REAL *grad_bias) {
    const int64_t width = PANELS(inner) * PANEL;
    for (int64_t k = 0; k < inner; k++) grad_weight[n * inner + k] = parts[n * width + k];
    for (int64_t piece = 1; piece < pieces; piece++)
        for (int64_t k = 0; k < inner; k++) grad_weight[n * inner + k] += parts[piece * stride + n * width + k];
    if (!grad_bias) return;
    REAL sum = 0;
    for (int64_t piece = 0; piece < pieces; piece++) sum += parts[piece * stride + GROUPS(outer) * HELD * width + n];
    grad_bias[n] = sum;
}

/* Rows of a piece. */
INLINE int64_t NAMED(share)(int64_t rows) {
    const int64_t share = (rows + PIECES - 1) / PIECES;
    return share < BLOCK && rows ? BLOCK : (share + HELD - 1) / HELD * HELD;
}

/* y = x weight^T + bias; no bias where it is 0. */
int NAMED(linear_forward)(const REAL *x, const REAL *weight, const REAL *bias, REAL *y, int64_t rows, int64_t inner,
                          int64_t outer, int64_t threads) {
    REAL *packed = aligned_alloc(64, ROOM(PACKED(inner, outer)));
    if (!packed) return 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < PANELS(outer); panel++) NAMED(pack)(weight, bias, inner, outer, 1, panel, packed);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row += BLOCK)
            NAMED(times)(rows - row < BLOCK ? rows - row : BLOCK, inner, outer, x + row * inner, packed, y + row * outer);
    }
    free(packed);
    return 0;
}

/* grad_x = grad weight, grad_weight = grad^T x and grad_bias the sum of grad's rows; each is left out where it is 0. */
int NAMED(linear_backward)(const REAL *grad, const REAL *x, const REAL *weight, REAL *grad_x, REAL *grad_weight,
                           REAL *grad_bias, int64_t rows, int64_t inner, int64_t outer, int64_t threads) {
    const int64_t share = NAMED(share)(rows), pieces = share ? (rows + share - 1) / share : 0;
    const int64_t stride = PART(outer, inner);
    REAL *packed = aligned_alloc(64, ROOM(PACKED(outer, inner))), *parts = aligned_alloc(64, ROOM((pieces + 1) * stride));
    int failed = !packed || !parts;
    if (!pieces && !failed) memset(parts, 0, stride * sizeof(REAL));
#pragma omp parallel num_threads(threads) if (!failed)
    {
        REAL *copied = aligned_alloc(64, ROOM(COPIED(inner)));
        if (!copied) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < PANELS(inner); panel++)
            if (packed) NAMED(pack)(weight, 0, outer, inner, 0, panel, packed);
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < pieces; piece++) {
            if (!copied || !packed || !parts) continue;
            const int64_t first = piece * share, end = first + share < rows ? first + share : rows;
            for (int64_t row = first; row < end; row += BLOCK) {
                const int64_t count = end - row < BLOCK ? end - row : BLOCK;
                if (grad_x)
                    NAMED(times)(count, outer, inner, grad + row * outer, packed, grad_x + row * inner);
                if (grad_weight)
                    NAMED(add_product)(count, outer, inner, grad + row * outer, x + row * inner, row > first,
                                       parts + piece * stride, copied);
            }
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < outer; n++)
            if (grad_weight && parts)
                NAMED(add_parts)(n, outer, inner, parts, stride, pieces ? pieces : 1, grad_weight, grad_bias);
        free(copied);
    }
    free(packed);
    free(parts);
    return failed;
}

typedef struct {
    const REAL *x, *input, *input_bias, *output, *output_bias; /* weights (F, K) and (K, F) */
    const REAL *stream;                                        /* (M, K), or 0: what the result is added to */
    int64_t rows, width, hidden_width, threads;
} NAMED(FeedForward);

/* hidden (M, F) = x input^T + input_bias, y = stream + gelu(hidden) output^T + output_bias. */
int NAMED(feedforward_forward)(const NAMED(FeedForward) *call, REAL *hidden, REAL *y) {
    const int64_t rows = call->rows, width = call->width, wide = call->hidden_width;
    REAL *first = aligned_alloc(64, ROOM(PACKED(width, wide))), *second = aligned_alloc(64, ROOM(PACKED(wide, width)));
    int failed = !first || !second;
#pragma omp parallel num_threads(call->threads) if (!failed)
    {
        REAL *active = failed ? 0 : aligned_alloc(64, ROOM(BLOCK * wide));
        if (!active) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < PANELS(wide) + PANELS(width); panel++) {
            if (!active) continue;
            if (panel < PANELS(wide))
                NAMED(pack)(call->input, call->input_bias, width, wide, 1, panel, first);
            else
                NAMED(pack)(call->output, call->output_bias, wide, width, 1, panel - PANELS(wide), second);
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row += BLOCK) {
            if (!active) continue;
            const int64_t count = rows - row < BLOCK ? rows - row : BLOCK;
            REAL *here = hidden + row * wide;
            NAMED(times)(count, width, wide, call->x + row * width, first, here);
            NAMED(gelu_forward)(here, active, count * wide, 1);
            NAMED(times)(count, wide, width, active, second, y + row * width);
            if (call->stream)
                for (int64_t place = row * width; place < (row + count) * width; place++) y[place] += call->stream[place];
        }
        free(active);
    }
    free(first);
    free(second);
    return failed;
}

/* The gradients of x and of both weights and biases, given that of y. */
int NAMED(feedforward_backward)(const NAMED(FeedForward) *call, const REAL *hidden, const REAL *grad, REAL *grad_x,
                                REAL *grad_input, REAL *grad_input_bias, REAL *grad_output, REAL *grad_output_bias) {
    const int64_t rows = call->rows, width = call->width, wide = call->hidden_width;
    const int64_t share = NAMED(share)(rows), pieces = share ? (rows + share - 1) / share : 0;
    const int64_t input_part = PART(wide, width), stride = input_part + PART(width, wide);
    REAL *first = aligned_alloc(64, ROOM(PACKED(wide, width))), *second = aligned_alloc(64, ROOM(PACKED(width, wide)));
    REAL *parts = aligned_alloc(64, ROOM((pieces + 1) * stride));
    int failed = !first || !second || !parts;
    if (!pieces && !failed) memset(parts, 0, stride * sizeof(REAL));
#pragma omp parallel num_threads(call->threads) if (!failed)
    {
        const int64_t most = width > wide ? width : wide;
        REAL *active = failed ? 0 : aligned_alloc(64, ROOM(2 * BLOCK * wide + COPIED(most)));
        REAL *slope = active + BLOCK * wide, *copied = slope + BLOCK * wide;
        if (!active) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < PANELS(wide) + PANELS(width); panel++) {
            if (!active) continue;
            if (panel < PANELS(wide))
                NAMED(pack)(call->output, 0, width, wide, 0, panel, second);
            else
                NAMED(pack)(call->input, 0, wide, width, 0, panel - PANELS(wide), first);
        }
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < pieces; piece++) {
            if (!active) continue;
            REAL *part = parts + piece * stride;
            const int64_t begin = piece * share, end = begin + share < rows ? begin + share : rows;
            for (int64_t row = begin; row < end; row += BLOCK) {
                const int64_t count = end - row < BLOCK ? end - row : BLOCK;
                const REAL *here = hidden + row * wide;
                NAMED(times)(count, width, wide, grad + row * width, second, slope);
                NAMED(gelu_both)(here, active, slope, count * wide);
                NAMED(add_product)(count, width, wide, grad + row * width, active, row > begin, part + input_part, copied);
                NAMED(add_product)(count, wide, width, slope, call->x + row * width, row > begin, part, copied);
                NAMED(times)(count, wide, width, slope, first, grad_x + row * width);
            }
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < wide + width; n++) {
            if (!active) continue;
            if (n < wide)
                NAMED(add_parts)(n, wide, width, parts, stride, pieces ? pieces : 1, grad_input, grad_input_bias);
            else
                NAMED(add_parts)(n - wide, width, wide, parts + input_part, stride, pieces ? pieces : 1, grad_output,
                                 grad_output_bias);
        }
        free(active);
    }
    free(first);
    free(second);
    free(parts);
    return failed;
}
