// The interface to low-rank adapters: checks, factors brought to whole tiles, and the split of work among threads.

#include "kernels.h"
#include "lowbit_cpu.h"
#include "parallel.h"

using namespace lowbit;

namespace {

constexpr int64_t MOST = (int64_t)1 << 31, MOST_THREADS = 1 << 16;
constexpr int64_t PART_ROWS = 48, PART_COLUMNS = 192;  // of a part, so many products that handing it out does not show

bool within(int64_t count, int64_t least, int64_t most) { return count >= least && count <= most; }

bool sound(const lowbit_adapter *adapter) {
    return adapter && adapter->a && adapter->b && within(adapter->rows, 1, MOST) && within(adapter->inputs, 1, MOST) &&
           within(adapter->rank, 1, 1 << 16);
}

bool callable(int64_t m, int dtype, int threads) {
    return within(m, 0, MOST) && within(dtype, LOWBIT_F32, LOWBIT_BF16) && within(threads, 1, MOST_THREADS);
}

int64_t up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// (rank, width), entry (r, k) from from[r * across + k * along], with zeros around.
struct Padded {
    Floats data;
    PaddedFactor factor;
    Padded(const float *from, int64_t rank, int64_t width, int64_t across, int64_t along) {
        factor.ranks = up(rank, RANK_TILE), factor.width = up(width, 16);
        data = floats(factor.ranks * factor.width);
        factor.data = data.get();
        for (int64_t r = 0; data && r < factor.ranks; r++) {
            float *const to = data.get() + r * factor.width;
            const int64_t inside = r < rank ? width : 0;
            for (int64_t k = 0; k < inside; k++) to[k] = from[r * across + k * along];
            for (int64_t k = inside; k < factor.width; k++) to[k] = 0;
        }
    }
};

}  // namespace

extern "C" {

int lowbit_low_rank(const lowbit_adapter *adapter, const void *x, const void *result, float *hidden, void *out, int64_t m, int dtype,
                    int threads) {
    if (!sound(adapter) || !callable(m, dtype, threads) || (m && (!x || !result || !hidden || !out))) return LOWBIT_BAD_ARGUMENT;
    const int64_t K = adapter->inputs, N = adapter->rows, rank = adapter->rank;
    const Padded a(adapter->a, rank, K, K, 1), b(adapter->b, rank, N, 1, rank);
    if (!a.data || !b.data) return LOWBIT_NO_MEMORY;
    const Kernels *k = kernels();
    auto body = [&](int part, int) {
        const int64_t first = part * PART_ROWS, last = first + PART_ROWS < m ? first + PART_ROWS : m;
        k->low_rank_dots(x, first, last, K, dtype, a.factor, hidden);
        k->low_rank_wide(hidden, b.factor, adapter->scaling, result, out, first, last, N, dtype);
    };
    run((int)parts_of(m, PART_ROWS), threads, body);
    return LOWBIT_OK;
}

int lowbit_low_rank_gradients(const lowbit_adapter *adapter, const void *gradient, const void *x, const float *hidden,
                              const void *added, void *x_gradient, float *a_gradient, float *b_gradient, int64_t m, int dtype,
                              int threads) {
    if (!sound(adapter) || !callable(m, dtype, threads) || (m && (!gradient || !x || !hidden))) return LOWBIT_BAD_ARGUMENT;
    const int64_t K = adapter->inputs, N = adapter->rows, rank = adapter->rank, ranks = up(rank, RANK_TILE);
    const Padded a(adapter->a, rank, K, K, 1), b(adapter->b, rank, N, 1, rank);
    const Floats inner = floats(m * ranks + 1);
    if (!a.data || !b.data || !inner) return LOWBIT_NO_MEMORY;
    const Kernels *k = kernels();
    auto by_rows = [&](int part, int) {
        const int64_t first = part * PART_ROWS, last = first + PART_ROWS < m ? first + PART_ROWS : m;
        k->low_rank_dots(gradient, first, last, N, dtype, b.factor, inner.get());
        if (x_gradient) k->low_rank_wide(inner.get(), a.factor, adapter->scaling, added, x_gradient, first, last, K, dtype);
    };
    run((int)parts_of(m, PART_ROWS), threads, by_rows);
    const int64_t for_a = a_gradient ? parts_of(K, PART_COLUMNS) : 0, for_b = b_gradient ? parts_of(N, PART_COLUMNS) : 0;
    auto by_columns = [&](int part, int) {
        const int64_t first = (part < for_a ? part : part - for_a) * PART_COLUMNS, width = part < for_a ? K : N;
        const int64_t last = first + PART_COLUMNS < width ? first + PART_COLUMNS : width;
        if (part < for_a)
            k->low_rank_deep(inner.get(), ranks, m, x, K, dtype, first, last, adapter->scaling, a_gradient, rank, K, 1);
        else
            k->low_rank_deep(hidden, ranks, m, gradient, N, dtype, first, last, adapter->scaling, b_gradient, rank, 1, rank);
    };
    run((int)(for_a + for_b), threads, by_columns);
    return LOWBIT_OK;
}

}  // extern "C"
