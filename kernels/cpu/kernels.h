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
// A block: states and words (size bytes), and what they are decoded to, symbols (count).
struct CodedSymbols {
    const uint8_t *coded;
    size_t size;
    uint8_t *symbols;
    size_t count;
};

// Rows of the weight whose scales are held at once, and floats of a row that are decoded at once, for several rows of x.
constexpr int PANEL_ROWS = 16, PANEL_INPUTS = 1024;
constexpr int64_t MOST_ROWS = 48;  // of x, that a panel is multiplied by
constexpr int MOST_AT_ONCE = 4;  // rows of the weight that are multiplied by one row of x
constexpr int TERNARY_LANES = 32, TERNARY_PIECE = 10 * TERNARY_LANES;  // that are decoded at once
// Of the input gradient: rows of the weight and inputs that are decoded at once, rows of the gradient that they are multiplied by, and
// of these how many by one reading of the weight.
constexpr int GRADIENT_ROWS = 128, GRADIENT_INPUTS = TERNARY_PIECE, GRADIENT_TILE = 6;
constexpr int64_t GRADIENT_MOST = 44 * GRADIENT_TILE;

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

// Inputs that the gradient takes together, and how many such pieces a row has.
static inline int64_t piece_inputs(const lowbit_weight *w) { return w->bits ? 64 : TERNARY_PIECE; }
static inline int64_t pieces_of(const lowbit_weight *w) { return arranged_inputs(w) / piece_inputs(w); }

// Floats of scratch memory that `decoder` needs for the scales and zero points of a row.
static inline int64_t grid_floats(const lowbit_weight *w) {
    return 2 * (w->group ? (w->inputs + w->group - 1) / w->group : 1) + 32;
}

// Decodes rows first .. last - 1, pieces from .. to - 1: 64 floats each, those of a row `block` floats apart, rows `row` floats.
typedef void Decode(const lowbit_weight *w, int64_t first, int64_t last, int64_t from, int64_t to, float *grids, float *panel, int64_t row,
                    int64_t block);

// Floats of scratch memory that `input_gradient` needs for m rows and `pieces` pieces.
static inline int64_t gradient_floats(const lowbit_weight *w, int64_t m, int64_t pieces) {
    const int64_t most = m < GRADIENT_MOST ? m : GRADIENT_MOST;
    const int64_t own = grid_floats(w) + most * GRADIENT_ROWS + (GRADIENT_ROWS + most) * pieces * piece_inputs(w);
    return (own + 63) / 64 * 64;
}

// A factor of an adapter, or its transpose, with zeros behind its ranks up to a multiple of RANK_TILE, and behind its width up to one
// of 16.
constexpr int RANK_TILE = 8;
struct PaddedFactor {
    const float *data;
    int64_t ranks, width;  // as padded
};

struct Kernels {
    bool (*here)();  // whether this processor has it
    // x (m, arranged_inputs), from `arrange`; out (m, rows); scratch as many floats as scratch_floats says.
    void (*linear)(const lowbit_weight *, const float *x, int64_t m, const void *bias, void *out, int dtype, int64_t first,
                   int64_t last, float *scratch);
    // out (.., inputs); scratch as for m = 0.
    void (*dequantize)(const lowbit_weight *, const int64_t *index, int64_t start, void *out, int dtype, int64_t first,
                       int64_t last, float *scratch);
    // out (.., inputs) from gradient (.., rows): their rows begin .. end - 1, pieces from .. to - 1 of each, GRADIENT_INPUTS inputs at
    // most; scratch as many floats as gradient_floats says.
    void (*input_gradient)(const lowbit_weight *, const void *gradient, int64_t begin, int64_t end, void *out, int dtype, int64_t from,
                           int64_t to, float *scratch);
    Decode *(*decoder)(const lowbit_weight *);
    // Rows begin .. end - 1 of x (.., width) times a factor transposed, to (.., ranks).
    void (*low_rank_dots)(const void *x, int64_t begin, int64_t end, int64_t width, int dtype, const PaddedFactor &factor, float *to);
    // Rows begin .. end - 1 of left (.., ranks) times a factor times a scale, plus `added` (or null), to out, both (.., width).
    void (*low_rank_wide)(const float *left, const PaddedFactor &factor, float scale, const void *added, void *out, int64_t begin,
                          int64_t end, int64_t width, int dtype);
    // left (m, ranks) transposed times columns from .. to - 1 of x (m, width) times a scale: entry (r, k), r below `rank`, to
    // out[r * across + k * along].
    void (*low_rank_deep)(const float *left, int64_t ranks, int64_t m, const void *x, int64_t width, int dtype, int64_t from, int64_t to,
                          float scale, float *out, int64_t rank, int64_t across, int64_t along);
    // Rows first .. last - 1 of x (.., inputs) to floats in the order in which the weight is decoded.
    void (*arrange)(const lowbit_weight *, const void *x, float *to, int dtype, int64_t first, int64_t last);
    void (*pack)(const uint8_t *codes, uint16_t *lanes, int64_t inputs, int bits, int64_t first, int64_t last);
    void (*unpack)(const uint16_t *lanes, uint8_t *codes, int64_t inputs, int bits, int64_t first, int64_t last);
    // A row of 3-bit codes in blocks of 64, given as 32 bytes each: code i of a block in bits 0 to 2 of byte i, code 32 + i in 3 to 5.
    void (*pack_pairs)(const uint8_t *pairs, uint16_t *lanes, int64_t blocks);
    // What the states and words of one or two blocks (blocks) decode to; how many of these, from the first on, are sound. One is not if
    // its words end too early or too late or a state does not end where it began; nothing outside is read or written. Here nothing was
    // checked but the table, which has SLOTS slots.
    int (*decode_symbols)(const CodedSymbols *coded, int blocks, const Slot *table);
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

// Of a copy, in gradient.cpp, low_rank.cpp, packing.cpp and codec.cpp; arguments as in Kernels.
namespace LOWBIT_ISA {
void input_gradient(const lowbit_weight *w, const void *gradient, int64_t begin, int64_t end, void *out, int dtype, int64_t from,
                    int64_t to, float *scratch);
Decode *decoder(const lowbit_weight *w);
void low_rank_dots(const void *x, int64_t begin, int64_t end, int64_t width, int dtype, const PaddedFactor &factor, float *to);
void low_rank_wide(const float *left, const PaddedFactor &factor, float scale, const void *added, void *out, int64_t begin, int64_t end,
                   int64_t width, int dtype);
void low_rank_deep(const float *left, int64_t ranks, int64_t m, const void *x, int64_t width, int dtype, int64_t from, int64_t to,
                   float scale, float *out, int64_t rank, int64_t across, int64_t along);
void pack_pairs(const uint8_t *pairs, uint16_t *lanes, int64_t blocks);
int decode_symbols(const CodedSymbols *coded, int blocks, const Slot *table);
void pack(const uint8_t *codes, uint16_t *lanes, int64_t inputs, int bits, int64_t first, int64_t last);
void unpack(const uint16_t *lanes, uint8_t *codes, int64_t inputs, int bits, int64_t first, int64_t last);
}  // namespace LOWBIT_ISA

}  // namespace lowbit
