/* A residual sum and its layer norm; included once for each type, see kernels.c. Shapes: M rows, K width. */

#ifndef NORM_ROWS
#define NORM_ROWS 96 /* rows whose share of the weight's gradient one thread sums up */
#endif

/* sum = x + y and out = (sum - mean) * rate * weight + bias with the mean and rate = 1 / sqrt(variance + epsilon) of each
 * row, which are written to moments (M, 2). Without y, x is the sum and none is written. */
int NAMED(norm_forward)(const REAL *x, const REAL *y, const REAL *weight, const REAL *bias, REAL *sum, REAL *out,
                        REAL *moments, int64_t rows, int64_t width, double epsilon, int64_t threads) {
    const int64_t whole = width / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const REAL *here = x + row * width;
        if (y) {
            REAL *to = sum + row * width;
            for (int64_t k = 0; k < width; k++) to[k] = here[k] + y[row * width + k];
            here = to;
        }
        VECTOR total = {0};
        REAL rest = 0;
        for (int64_t k = 0; k < whole; k += LANES) total += *(const VECTOR *)(here + k);
        for (int64_t k = whole; k < width; k++) rest += here[k];
        const REAL mean = (NAMED(total)(total) + rest) / width;
        total = (VECTOR){0}, rest = 0;
        for (int64_t k = 0; k < whole; k += LANES) {
            const VECTOR away = *(const VECTOR *)(here + k) - mean;
            total += away * away;
        }
        for (int64_t k = whole; k < width; k++) rest += (here[k] - mean) * (here[k] - mean);
        const REAL spread = (NAMED(total)(total) + rest) / width + (REAL)epsilon;
        const REAL rate = 1 / (SINGLE ? sqrtf(spread) : sqrt(spread));
        for (int64_t k = 0; k < width; k++) out[row * width + k] = (here[k] - mean) * rate * weight[k] + bias[k];
        moments[2 * row] = mean, moments[2 * row + 1] = rate;
    }
    return 0;
}

/* grad_x, of x and y alike, is what comes through the norm from grad plus grad_sum, if there is one. */
int NAMED(norm_backward)(const REAL *grad, const REAL *grad_sum, const REAL *sum, const REAL *moments, const REAL *weight,
                         REAL *grad_x, REAL *grad_weight, REAL *grad_bias, int64_t rows, int64_t width,
                         int64_t threads) {
    const int64_t pieces = (rows + NORM_ROWS - 1) / NORM_ROWS, whole = width / LANES * LANES, padded = PADDED(width);
    REAL *parts = aligned_alloc(64, ((pieces + 1) * 2 * padded * sizeof(REAL) + 63) / 64 * 64);
    if (!parts) return 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < pieces; piece++) {
            REAL *restrict part_weight = parts + piece * 2 * padded, *restrict part_bias = part_weight + padded;
            memset(part_weight, 0, 2 * padded * sizeof(REAL));
            const int64_t end = (piece + 1) * NORM_ROWS < rows ? (piece + 1) * NORM_ROWS : rows;
            for (int64_t row = piece * NORM_ROWS; row < end; row++) {
                const REAL *restrict slope = grad + row * width, *restrict here = sum + row * width;
                const REAL mean = moments[2 * row], rate = moments[2 * row + 1];
                VECTOR flat = {0}, steep = {0};
                REAL flat_rest = 0, steep_rest = 0;
                for (int64_t k = 0; k < whole; k += LANES) {
                    const VECTOR given = *(const VECTOR *)(slope + k), scaled = given * *(const VECTOR *)(weight + k);
                    const VECTOR normed = (*(const VECTOR *)(here + k) - mean) * rate;
                    flat += scaled, steep += scaled * normed;
                    *(VECTOR *)(part_weight + k) += given * normed;
                    *(VECTOR *)(part_bias + k) += given;
                }
                for (int64_t k = whole; k < width; k++) {
                    const REAL normed = (here[k] - mean) * rate;
                    flat_rest += slope[k] * weight[k], steep_rest += slope[k] * weight[k] * normed;
                    part_weight[k] += slope[k] * normed, part_bias[k] += slope[k];
                }
                const REAL level = (NAMED(total)(flat) + flat_rest) / width;
                const REAL tilt = (NAMED(total)(steep) + steep_rest) / width;
                REAL *restrict to = grad_x + row * width;
                if (grad_sum)
                    for (int64_t k = 0; k < width; k++)
                        to[k] = grad_sum[row * width + k] +
                                rate * (slope[k] * weight[k] - level - (here[k] - mean) * rate * tilt);
                else
                    for (int64_t k = 0; k < width; k++)
                        to[k] = rate * (slope[k] * weight[k] - level - (here[k] - mean) * rate * tilt);
            }
        }
#pragma omp single
        for (int64_t k = 0; k < width; k++) {
            REAL total_weight = 0, total_bias = 0;
            for (int64_t piece = 0; piece < pieces; piece++) {
                total_weight += parts[piece * 2 * padded + k];
                total_bias += parts[piece * 2 * padded + padded + k];
            }
            grad_weight[k] = total_weight, grad_bias[k] = total_bias;
        }
    }
    free(parts);
    return 0;
}
