// What one instruction set offers to the interface. Arguments were checked by it; rows are first .. last - 1.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lowbit_cpu.h"

namespace lowbit {

// Of the entropy coder, see codec.cpp and docs/format.md.
constexpr int LANES = 32, FREQUENCY_BITS = 12, SLOTS = 1 << FREQUENCY_BITS;
constexpr uint32_t LEAST_STATE = 1u << 16;
constexpr size_t STATES_BYTES = 4 * LANES;
// Of a slot: the symbol in bits 0 to 7, its frequency less one in 8 to 19, and the slot's number among its symbol's in 20 to 31.
typedef uint32_t Slot;

// Rows of the weight whose scales are held at once, and floats of a row that are decoded at once, for several rows of x.
constexpr int PANEL_ROWS = 16, PANEL_INPUTS = 1024;
constexpr int64_t MOST_ROWS = 48;  // of x, that a panel is multiplied by
constexpr int MOST_AT_ONCE = 4;  // rows of the weight that are multiplied by one row of x
constexpr int TERNARY_LANES = 32, TERNARY_PIECE = 10 * TERNARY_LANES;  // that are decoded at once

// Floats of a row of x as the kernels want it, which is zero where the row ends.
static inline int64_t arranged_inputs(const lowbit_weight *w) {
    if (w->bits) return (w->inputs + 63) / 64 * 64;
    return ((w->inputs + 9) / 10 + TERNARY_LANES - 1) / TERNARY_LANES * TERNARY_PIECE;
}

// Floats of scratch memory that `linear` needs for m rows of x, and `dequantize` for m = 0.
static inline int64_t scratch_floats(const lowbit_weight *w, int64_t m) {
    const int64_t groups = w->group ? (w->inputs + w->group - 1) / w->group : 1;
    const int64_t own = m == 0 ? 2 * groups + w->inputs + 16 : m == 1 ? 2 * MOST_AT_ONCE * (groups + 4)
                                                                      : PANEL_ROWS * (2 * groups + PANEL_INPUTS + (m < MOST_ROWS ? m : MOST_ROWS));
    return (own + 63) / 64 * 64;
}

struct Kernels {
    const char *name;
    bool (*here)();  // whether this processor has it
    // x (m, arranged_inputs), from `arrange`; out (m, rows); scratch as many floats as scratch_floats says.
    void (*linear)(const lowbit_weight *, const float *x, int64_t m, const void *bias, void *out, int dtype, int64_t first,
                   int64_t last, float *scratch);
    // out (.., inputs); scratch as for m = 0.
    void (*dequantize)(const lowbit_weight *, const int64_t *index, int64_t start, void *out, int dtype, int64_t first,
                       int64_t last, float *scratch);
    // Rows first .. last - 1 of x (.., inputs) to floats in the order in which the weight is decoded.
    void (*arrange)(const lowbit_weight *, const void *x, float *to, int dtype, int64_t first, int64_t last);
    void (*pack)(const uint8_t *codes, uint16_t *lanes, int64_t inputs, int bits, int64_t first, int64_t last);
    void (*unpack)(const uint16_t *lanes, uint8_t *codes, int64_t inputs, int bits, int64_t first, int64_t last);
    // A row of 3-bit codes in blocks of 64, given as 32 bytes each: code i of a block in bits 0 to 2 of byte i, code 32 + i in 3 to 5.
    void (*pack_pairs)(const uint8_t *pairs, uint16_t *lanes, int64_t blocks);
    // What states and words (size bytes) decode to, symbols (count). False if the words end too early or too late or a state does
    // not end where it began; nothing outside is read or written. Here nothing was checked but the table, which has SLOTS slots.
    bool (*decode_symbols)(const uint8_t *coded, size_t size, const Slot *table, uint8_t *symbols, size_t count);
};

// The table of each copy: kernels_ and the name of its instruction set.
const Kernels &kernels_avx512();
const Kernels &kernels_avx2();
const Kernels &kernels_neon();
const Kernels &kernels_portable();

#define LOWBIT_JOIN(a, b) a##b
#define LOWBIT_JOINED(a, b) LOWBIT_JOIN(a, b)
#define LOWBIT_COPY(name) LOWBIT_JOINED(name, LOWBIT_ISA)

static inline int64_t row_lanes(int64_t inputs, int bits) {
    return bits == 0 ? (inputs + 9) / 10 : (inputs + 63) / 64 * 4 * bits;
}

// The copy that was chosen.
const Kernels *kernels();

// Of a copy, in packing.cpp and codec.cpp; arguments as in Kernels.
namespace LOWBIT_ISA {
void pack_pairs(const uint8_t *pairs, uint16_t *lanes, int64_t blocks);
bool decode_symbols(const uint8_t *coded, size_t size, const Slot *table, uint8_t *symbols, size_t count);
void pack(const uint8_t *codes, uint16_t *lanes, int64_t inputs, int bits, int64_t first, int64_t last);
void unpack(const uint16_t *lanes, uint8_t *codes, int64_t inputs, int bits, int64_t first, int64_t last);
}  // namespace LOWBIT_ISA

}  // namespace lowbit
