// The C interface: checks, the choice of an instruction set, and the split of work among threads.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <string>

#include "bfloat16.h"
#include "int8.h"
#include "kernels.h"
#include "lowbit_cpu.h"
#include "one_row.h"
#include "parallel.h"

using namespace lowbit;

namespace {

constexpr int64_t PART_WEIGHTS = 32768;  // of a part: some ten microseconds, far above what handing one out costs
constexpr int PARTS_PER_THREAD = 4;
// Of one row of x in integers: weights for which a thread is worth waking, and that it takes at a time, some microseconds each.
constexpr int64_t ONE_ROW_WEIGHTS = 1 << 19, ONE_ROW_TURN = 1 << 18;
constexpr int MOST_PRODUCTS = 16;
constexpr int INT8_DIGITS = 1, FLOAT_DIGITS = 3;

// An instruction set: the copies that serve it.
struct Isa {
    const char *name;
    const Kernels *kernels;
    const Int8Kernels *int8;
    const Bfloat16Kernels *bfloat16;  // or null
    const OneRowKernels *one_row;     // or null
    bool here() const { return kernels->here() && int8->here() && (!bfloat16 || bfloat16->here()) && (!one_row || one_row->here()); }
};

// All that were compiled, the best first; the portable one runs everywhere. (Cooper Lake has products of bfloat16 but cannot permute
// bytes, and takes avx512vnni.)
const Isa ALL[] = {
#if defined(LOWBIT_X86)
    {"avx512bf16", &kernels_avx512(), &int8_avx512vnni(), &bfloat16_avx512(), &one_row_avx512vbmi()},
    {"avx512vbmi", &kernels_avx512(), &int8_avx512vnni(), nullptr, &one_row_avx512vbmi()},
    {"avx512vnni", &kernels_avx512(), &int8_avx512vnni(), nullptr, nullptr},
    {"avx512", &kernels_avx512(), &int8_avx512(), nullptr, nullptr},
    {"avx2", &kernels_avx2(), &int8_avx2(), nullptr, nullptr},
#elif defined(LOWBIT_ARM64)
    {"neondot", &kernels_neon(), &int8_neondot(), nullptr, nullptr},
    {"neon", &kernels_neon(), &int8_neon(), nullptr, nullptr},
#endif
    {"portable", &kernels_portable(), &int8_portable(), nullptr, nullptr}};

const Isa *best() {
    for (const Isa &isa : ALL)
        if (isa.here()) return &isa;
    return nullptr;
}

std::atomic<const Isa *> chosen{nullptr};

const Isa *isa() {
    const Isa *found = chosen.load(std::memory_order_relaxed);
    if (!found) chosen = found = best();
    return found;
}

// Of rows, inputs and threads: far above any real one, and no product of two of them overflows.
constexpr int64_t MOST = (int64_t)1 << 31, MOST_THREADS = 1 << 16;

bool within(int64_t count, int64_t least, int64_t most = MOST) { return count >= least && count <= most; }

bool sound(const lowbit_weight *w) {
    if (!w || !w->codes || !within(w->rows, 0) || !within(w->inputs, 1) || w->bits < 0 || w->bits > 8) return false;
    if (w->group && (w->group < 16 || (w->group & (w->group - 1)))) return false;
    if (w->scale < LOWBIT_SCALE_NONE || w->scale > LOWBIT_SCALE_BYTE || (w->scale && !w->scales)) return false;
    if (w->scale == LOWBIT_SCALE_BYTE && !w->scale_table) return false;
    if (w->zero < LOWBIT_ZERO_FIXED || w->zero > LOWBIT_ZERO_F16 || (w->zero && !w->zeros)) return false;
    if (w->table && w->zero) return false;  // levels need no zero point
    if (w->table < LOWBIT_TABLE_NONE || w->table > LOWBIT_TABLE_ROW || (w->table && (!w->levels || w->bits == 0))) return false;
    return true;
}

bool packable(int64_t rows, int64_t inputs, int bits, int threads) {
    return within(rows, 0) && within(inputs, 1) && within(bits, 0, 8) && within(threads, 1, MOST_THREADS);
}

bool known(int dtype) { return dtype >= LOWBIT_F32 && dtype <= LOWBIT_BF16; }

// Splits `count` rows of `width` weights; never so small that handing them out would show.
struct Split {
    int64_t count, size;
    int parts;
    Split(int64_t count, int64_t width, int threads) : count(count) {
        int64_t least = PART_WEIGHTS / (width > 0 ? width : 1) + 1;
        size = threads <= 1 ? count : (count + threads * PARTS_PER_THREAD - 1) / (threads * PARTS_PER_THREAD);
        if (size < least) size = least;
        parts = size ? (int)((count + size - 1) / size) : 0;
    }
    int workers(int threads) const { return threads < parts ? threads : parts; }
    int64_t first(int part) const { return part * size; }
    int64_t last(int part) const { return (part + 1) * size < count ? (part + 1) * size : count; }
};

template <class Body> void run(const Split &split, int threads, Body &body) { lowbit::run(split.parts, threads, body); }

// Parts of a product that is cut into pieces of columns, `most` of them in a part, and of the m rows that meet them where there
// are too few such ranges for all threads: each range decodes the weight anew for every share of the rows.
struct Parts {
    int64_t m, pieces, ranges, size, shares;
    int threads;
    Parts(const lowbit_weight *w, int64_t m, int64_t pieces, int64_t most, int64_t tile, int threads) : m(m), pieces(pieces) {
        const int64_t useful = 1 + w->rows * w->inputs / PART_WEIGHTS * (m < 8 ? m : 8);
        this->threads = threads < useful ? threads : (int)useful;
        ranges = (pieces + most - 1) / most;
        const bool enough = ranges % this->threads == 0 || ranges >= PARTS_PER_THREAD * this->threads;
        const int64_t tiles = (m + tile - 1) / tile, wanted = enough ? 1 : this->threads;
        size = (tiles + wanted - 1) / wanted * tile;
        shares = (m + size - 1) / size;
    }
    int count() const { return (int)(ranges * shares); }
    int workers() const { return threads < count() ? threads : count(); }
    int64_t rows() const { return size < m ? size : m; }              // of a part, at most
    int64_t width() const { return (pieces + ranges - 1) / ranges; }  // the same of pieces
    int64_t first(int part) const { return part / ranges * size; }
    int64_t last(int part) const { return first(part) + size < m ? first(part) + size : m; }
    int64_t from(int part) const { return part % ranges * pieces / ranges; }
    int64_t to(int part) const { return (part % ranges + 1) * pieces / ranges; }
};

// The kernels of bfloat16, if they are to multiply m rows of it.
const Bfloat16Kernels *bfloat16_for(const lowbit_weight *w, int64_t m, int dtype) {
    return dtype == LOWBIT_BF16 && m >= BFLOAT16_FEW && w->bits ? isa()->bfloat16 : nullptr;
}

// Where a thread is in its share of the rows.
struct alignas(64) Turn {
    std::atomic<int64_t> next{0};
};

// One row of x in integers times one or more weights, if there are kernels that do that with all of them and with such an x; else
// LOWBIT_BAD_ARGUMENT, and out is not touched. Every thread has a share of its own, since a new place in memory is slow to begin with, and
// helps others when it is done.
int one_row(const lowbit_product *products, int64_t count, const void *x, int64_t m, int dtype, int digits, int threads) {
    const OneRowKernels *k = isa()->one_row;
    if (!k || m != 1) return LOWBIT_BAD_ARGUMENT;
    const int64_t inputs = products[0].weight->inputs;
    int64_t sizes[MOST_PRODUCTS + 1] = {0}, ends[MOST_PRODUCTS + 1] = {0}, own = 0;  // bytes that are prepared, tiles; of those before
    for (int64_t i = 0; i < count; i++) {
        const lowbit_weight *w = products[i].weight;
        if (!k->serves(w, digits)) return LOWBIT_BAD_ARGUMENT;
        sizes[i + 1] = sizes[i] + (k->prepared_bytes(w, digits) + 63) / 64 * 64;
        ends[i + 1] = ends[i] + (w->rows + ONE_ROW_TILE - 1) / ONE_ROW_TILE;
        own = std::max(own, k->scratch_floats(w));
    }
    const int64_t tiles = ends[count], useful = 1 + tiles * ONE_ROW_TILE * inputs / ONE_ROW_WEIGHTS;
    const int64_t shares = threads < useful ? threads : useful;
    const int64_t turn = shares == 1 ? tiles : 1 + ONE_ROW_TURN / (inputs * ONE_ROW_TILE);
    const Memory<uint8_t> prepared = memory<uint8_t>(sizes[count]);
    const Floats scratch = floats(shares * own);
    const Memory<Turn> turns = memory<Turn>(shares);
    if (!prepared || !scratch || !turns) return LOWBIT_NO_MEMORY;
    for (int64_t i = 0; i < count; i++)
        if (!k->prepare(products[i].weight, products[i].levels, products[i].steps, x, dtype, digits, prepared.get() + sizes[i])) return LOWBIT_BAD_ARGUMENT;
    for (int64_t i = 0; i < shares; i++) new (turns.get() + i) Turn;
    auto some = [&](int64_t at, int64_t to, int worker) {
        for (int64_t i = 0; i < count; i++) {
            const int64_t first = std::max(at, ends[i]) - ends[i], last = std::min(to, ends[i + 1]) - ends[i];
            if (first >= last) continue;
            const lowbit_product &p = products[i];
            k->linear(p.weight, digits, prepared.get() + sizes[i], p.bias, p.out, dtype, first * ONE_ROW_TILE,
                      std::min(last * ONE_ROW_TILE, p.weight->rows), scratch.get() + worker * own);
        }
    };
    auto body = [&](int part, int worker) {
        for (int64_t i = 0; i < shares; i++) {
            const int64_t share = (part + i) % shares, begin = tiles * share / shares, end = tiles * (share + 1) / shares;
            for (int64_t at; (at = begin + turns.get()[share].next.fetch_add(turn, std::memory_order_relaxed)) < end;)
                some(at, std::min(at + turn, end), worker);
        }
    };
    lowbit::run((int)shares, (int)shares, body);
    return LOWBIT_OK;
}

}  // namespace

const Kernels *lowbit::kernels() { return isa()->kernels; }

extern "C" {

int lowbit_version(void) { return LOWBIT_VERSION; }

int lowbit_linear(const lowbit_weight *w, const void *x, const void *bias, void *out, int64_t m, int dtype, int threads) {
    if (!sound(w)) return LOWBIT_BAD_WEIGHT;
    if (!within(m, 0) || !known(dtype) || !within(threads, 1, MOST_THREADS) || (m && w->rows && (!x || !out))) return LOWBIT_BAD_ARGUMENT;
    if (m == 0 || w->rows == 0) return LOWBIT_OK;
    const lowbit_product one{w, nullptr, nullptr, bias, out};
    const int done = one_row(&one, 1, x, m, dtype, FLOAT_DIGITS, threads);
    if (done != LOWBIT_BAD_ARGUMENT) return done;
    const Kernels *k = kernels();
    if (const Bfloat16Kernels *narrow = bfloat16_for(w, m, dtype)) {
        const Parts parts(w, m, (w->rows + 63) / 64, BFLOAT16_COLUMNS / 64, BFLOAT16_TILE, threads);
        const int64_t own = narrow->scratch_floats(w, parts.rows());
        Floats scratch = floats(parts.workers() * own);
        if (!scratch) return LOWBIT_NO_MEMORY;
        auto body = [&](int part, int worker) {
            narrow->linear(w, k->decoder(w), (const uint16_t *)x, (const uint16_t *)bias, (uint16_t *)out, parts.first(part),
                           parts.last(part), parts.from(part), parts.to(part), scratch.get() + worker * own);
        };
        lowbit::run(parts.count(), parts.threads, body);
        return LOWBIT_OK;
    }
    const int64_t stride = arranged_inputs(w), own = scratch_floats(w, m);
    const Split split(w->rows, w->inputs * (m < 8 ? m : 8), threads);
    Floats arranged = floats(m * stride), scratch = floats(split.workers(threads) * own);
    if (!arranged || !scratch) return LOWBIT_NO_MEMORY;
    k->arrange(w, x, arranged.get(), dtype, 0, m);
    auto body = [&](int part, int worker) {
        k->linear(w, arranged.get(), m, bias, out, dtype, split.first(part), split.last(part), scratch.get() + worker * own);
    };
    run(split, threads, body);
    return LOWBIT_OK;
}

int lowbit_linear_int8(const lowbit_weight *w, const uint8_t *levels, const float *steps, const void *x, const void *bias, void *out,
                       int64_t m, int dtype, int threads) {
    if (!sound(w)) return LOWBIT_BAD_WEIGHT;
    if (!within(m, 0) || !known(dtype) || !within(threads, 1, MOST_THREADS) || (m && w->rows && (!x || !out))) return LOWBIT_BAD_ARGUMENT;
    if (w->table && (!levels || !steps)) return LOWBIT_BAD_ARGUMENT;
    if (m == 0 || w->rows == 0) return LOWBIT_OK;
    const lowbit_product one{w, levels, steps, bias, out};
    const int done = one_row(&one, 1, x, m, dtype, INT8_DIGITS, threads);
    if (done != LOWBIT_BAD_ARGUMENT) return done;
    const Int8Kernels *k = isa()->int8;
    const int64_t stride = (w->inputs + 63) / 64 * 64, units = (stride + int8_unit(w) - 1) / int8_unit(w);
    const int64_t rows = INT8_STRIP * INT8_STRIPS, own = int8_scratch(w, m) / 64 * 64 + 64;
    const Split tokens(m, 4 * stride, threads), split((w->rows + rows - 1) / rows, rows * stride * (m < 8 ? m : 8), threads);
    const Memory<int8_t> codes = memory<int8_t>(m * stride + 64);
    const Floats scales = floats(2 * m * units), wide = floats(tokens.workers(threads) * stride);
    const Memory<uint8_t> scratch = memory<uint8_t>(split.workers(threads) * own);
    if (!codes || !scales || !wide || !scratch) return LOWBIT_NO_MEMORY;
    std::memset(codes.get() + m * stride, 0, 64);  // blocks are read in pairs
    const Tokens quantized{codes.get(), scales.get(), scales.get() + m * units, m, stride, units};
    auto quantize = [&](int part, int worker) {
        k->quantize(w, x, dtype, quantized, tokens.first(part), tokens.last(part), wide.get() + worker * stride);
    };
    run(tokens, threads, quantize);
    auto multiply = [&](int part, int worker) {
        const int64_t last = split.last(part) * rows;
        k->linear(w, {levels, steps}, quantized, bias, out, dtype, split.first(part) * rows, last < w->rows ? last : w->rows,
                  scratch.get() + worker * own);
    };
    run(split, threads, multiply);
    return LOWBIT_OK;
}

int lowbit_linears(const lowbit_product *products, int64_t count, const void *x, int64_t m, int dtype, int int8, int threads) {
    if (!products || !within(count, 1, MOST_PRODUCTS) || !within(m, 0) || !known(dtype) || !within(threads, 1, MOST_THREADS)) return LOWBIT_BAD_ARGUMENT;
    bool together = m == 1 && x;
    for (int64_t i = 0; i < count; i++) {
        const lowbit_product &p = products[i];
        if (!sound(p.weight)) return LOWBIT_BAD_WEIGHT;
        if (p.weight->inputs != products[0].weight->inputs) return LOWBIT_BAD_ARGUMENT;
        together = together && p.out && !(int8 && p.weight->table && (!p.levels || !p.steps));
    }
    if (together) {
        const int done = one_row(products, count, x, m, dtype, int8 ? INT8_DIGITS : FLOAT_DIGITS, threads);
        if (done != LOWBIT_BAD_ARGUMENT) return done;
    }
    for (int64_t i = 0; i < count; i++) {
        const lowbit_product &p = products[i];
        const int error = int8 ? lowbit_linear_int8(p.weight, p.levels, p.steps, x, p.bias, p.out, m, dtype, threads)
                               : lowbit_linear(p.weight, x, p.bias, p.out, m, dtype, threads);
        if (error) return error;
    }
    return LOWBIT_OK;
}

int lowbit_input_gradient(const lowbit_weight *w, const void *gradient, void *out, int64_t m, int dtype, int threads) {
    if (!sound(w)) return LOWBIT_BAD_WEIGHT;
    if (!within(m, 0) || !known(dtype) || !within(threads, 1, MOST_THREADS) || (m && (!out || (w->rows && !gradient)))) return LOWBIT_BAD_ARGUMENT;
    if (m == 0) return LOWBIT_OK;
    const Kernels *k = kernels();
    const Bfloat16Kernels *narrow = bfloat16_for(w, m, dtype);
    const Parts parts(w, m, pieces_of(w), (narrow ? BFLOAT16_COLUMNS : GRADIENT_INPUTS) / piece_inputs(w), GRADIENT_TILE, threads);
    const int64_t own = narrow ? narrow->scratch_floats(w, parts.rows()) : gradient_floats(w, parts.rows(), parts.width());
    Floats scratch = floats(parts.workers() * own);
    if (!scratch) return LOWBIT_NO_MEMORY;
    auto body = [&](int part, int worker) {
        float *const mine = scratch.get() + worker * own;
        const int64_t first = parts.first(part), last = parts.last(part), from = parts.from(part), to = parts.to(part);
        if (narrow)
            narrow->input_gradient(w, k->decoder(w), (const uint16_t *)gradient, (uint16_t *)out, first, last, from, to, mine);
        else
            k->input_gradient(w, gradient, first, last, out, dtype, from, to, mine);
    };
    lowbit::run(parts.count(), parts.threads, body);
    return LOWBIT_OK;
}

int lowbit_dequantize(const lowbit_weight *w, const int64_t *index, int64_t first, int64_t count, void *out, int dtype,
                      int threads) {
    if (!sound(w)) return LOWBIT_BAD_WEIGHT;
    if (!within(count, 0) || !known(dtype) || !within(threads, 1, MOST_THREADS) || (count && !out)) return LOWBIT_BAD_ARGUMENT;
    if (!index && (first < 0 || first > w->rows - count)) return LOWBIT_BAD_ARGUMENT;
    for (int64_t i = 0; index && i < count; i++)
        if (index[i] < 0 || index[i] >= w->rows) return LOWBIT_BAD_ARGUMENT;
    if (count == 0) return LOWBIT_OK;
    const Kernels *k = kernels();
    const Split split(count, w->inputs, threads);
    const int64_t own = scratch_floats(w, 0);
    Floats scratch = floats(split.workers(threads) * own);
    if (!scratch) return LOWBIT_NO_MEMORY;
    auto body = [&](int part, int worker) {
        k->dequantize(w, index, first, out, dtype, split.first(part), split.last(part), scratch.get() + worker * own);
    };
    run(split, threads, body);
    return LOWBIT_OK;
}

int lowbit_pack(const uint8_t *codes, uint16_t *lanes, int64_t rows, int64_t inputs, int bits, int threads) {
    if (!packable(rows, inputs, bits, threads) || (rows && (!codes || !lanes))) return LOWBIT_BAD_ARGUMENT;
    const Split split(rows, inputs, threads);
    auto body = [&](int part, int) { kernels()->pack(codes, lanes, inputs, bits, split.first(part), split.last(part)); };
    run(split, threads, body);
    return LOWBIT_OK;
}

int lowbit_unpack(const uint16_t *lanes, uint8_t *codes, int64_t rows, int64_t inputs, int bits, int threads) {
    if (!packable(rows, inputs, bits, threads) || (rows && (!codes || !lanes))) return LOWBIT_BAD_ARGUMENT;
    const Split split(rows, inputs, threads);
    auto body = [&](int part, int) { kernels()->unpack(lanes, codes, inputs, bits, split.first(part), split.last(part)); };
    run(split, threads, body);
    return LOWBIT_OK;
}

int64_t lowbit_row_lanes(int64_t inputs, int bits) {
    return !packable(0, inputs, bits, 1) ? (int64_t)LOWBIT_BAD_ARGUMENT : row_lanes(inputs, bits);
}

const char *lowbit_isas(void) {
    static const std::string names = [] {
        std::string found;
        for (const Isa &isa : ALL)
            if (isa.here()) found += (found.empty() ? "" : ",") + std::string(isa.name);
        return found;
    }();
    return names.c_str();
}

const char *lowbit_isa(void) { return isa()->name; }

int lowbit_force_isa(const char *name) {
    for (const Isa &isa : ALL)
        if (name && !std::strcmp(isa.name, name) && isa.here()) {
            chosen = &isa;
            return LOWBIT_OK;
        }
    return LOWBIT_BAD_ARGUMENT;
}

}  // extern "C"
