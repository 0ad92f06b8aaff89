/* Gradient clipping and AdamW over all parameters in one call; included once for each type, see kernels.c. */

#ifndef CHUNK
#define CHUNK 8192 /* elements whose squares one thread sums up: the norm does not depend on the number of threads */
#endif

/* steps, the updates that each tensor has seen, count one up; norm is that of all gradients before they are clipped. */
int NAMED(adamw)(REAL *const *weights, const REAL *const *grads, REAL *const *firsts, REAL *const *seconds,
                 float *const *steps, const int64_t *counts, const double *decays, int64_t tensors, double rate,
                 double beta1, double beta2, double epsilon, double limit, REAL *norm, int64_t threads) {
    int64_t chunks = 0;
    for (int64_t tensor = 0; tensor < tensors; tensor++) chunks += (counts[tensor] + CHUNK - 1) / CHUNK;
    double *squares = malloc((chunks + 1) * sizeof(double));
    int64_t *owners = malloc((chunks + 1) * 2 * sizeof(int64_t)), *starts = owners + chunks + 1;
    if (!squares || !owners) {
        free(squares);
        free(owners);
        return 1;
    }
    for (int64_t tensor = 0, chunk = 0; tensor < tensors; tensor++) {
        *steps[tensor] += 1;
        for (int64_t start = 0; start < counts[tensor]; start += CHUNK, chunk++)
            owners[chunk] = tensor, starts[chunk] = start;
    }
    double factor = 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const int64_t left = counts[owners[chunk]] - starts[chunk], count = left < CHUNK ? left : CHUNK;
            const REAL *grad = grads[owners[chunk]] + starts[chunk];
            VECTOR sums[4] = {{0}, {0}, {0}, {0}};
            int64_t place = 0;
            for (; place + 4 * LANES <= count; place += 4 * LANES)
                for (int v = 0; v < 4; v++) {
                    const VECTOR here = *(const VECTOR *)(grad + place + v * LANES);
                    sums[v] += here * here;
                }
            double sum = NAMED(total)((sums[0] + sums[1]) + (sums[2] + sums[3]));
            for (; place < count; place++) sum += (double)grad[place] * grad[place];
            squares[chunk] = sum;
        }
#pragma omp single
        {
            double sum = 0;
            for (int64_t chunk = 0; chunk < chunks; chunk++) sum += squares[chunk];
            *norm = (REAL)sqrt(sum);
            factor = limit / (*norm + 1e-6);
            if (factor > 1) factor = 1; /* not for a norm that is not a number, which all weights become */
        }
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const int64_t tensor = owners[chunk], start = starts[chunk], left = counts[tensor] - start;
            const int64_t count = left < CHUNK ? left : CHUNK;
            const double first_left = 1 - pow(beta1, *steps[tensor]), second_left = 1 - pow(beta2, *steps[tensor]);
            const REAL clip = (REAL)factor, keep = (REAL)(1 - rate * decays[tensor]), pace = (REAL)(rate / first_left);
            const REAL scale = (REAL)(1 / sqrt(second_left)), small = (REAL)epsilon;
            const REAL new1 = (REAL)(1 - beta1), old2 = (REAL)beta2, new2 = (REAL)(1 - beta2);
            REAL *restrict weight = weights[tensor] + start, *restrict first = firsts[tensor] + start;
            REAL *restrict second = seconds[tensor] + start;
            const REAL *restrict grad = grads[tensor] + start;
            for (int64_t place = 0; place < count; place++) {
                const REAL slope = clip * grad[place];
                first[place] += new1 * (slope - first[place]);
                second[place] = old2 * second[place] + new2 * slope * slope;
                const REAL root = SINGLE ? sqrtf(second[place]) : sqrt(second[place]);
                weight[place] = keep * weight[place] - pace * first[place] / (root * scale + small);
            }
        }
    }
    free(squares);
    free(owners);
    return 0;
}
