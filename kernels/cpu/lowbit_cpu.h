/* CPU kernels over packed low-bit weights: a C interface that knows nothing of torch.
 *
 * A packed weight is described by plain pointers (docs/format.md of hf-lowbit says what they point to, bit by bit). Every
 * function returns 0, or a negative number of the enum lowbit_error and touches nothing. The instruction set is chosen when
 * the library is loaded; lowbit_force_isa chooses another for tests. Results depend on the arguments and the instruction set,
 * not on the number of threads: every output is computed by one thread, in one order.
 */
#ifndef LOWBIT_CPU_H
#define LOWBIT_CPU_H

#include <stdint.h>

#if defined(_WIN32)
#define LOWBIT_EXPORT __declspec(dllexport)
#else
#define LOWBIT_EXPORT __attribute__((visibility("default")))
#endif

/* Of this interface; a caller compares it with what lowbit_version returns. */
#define LOWBIT_VERSION 4

#ifdef __cplusplus
extern "C" {
#endif

enum lowbit_dtype { LOWBIT_F32 = 0, LOWBIT_F16 = 1, LOWBIT_BF16 = 2 };
enum lowbit_scale { LOWBIT_SCALE_NONE = 0, LOWBIT_SCALE_F32 = 1, LOWBIT_SCALE_F16 = 2, LOWBIT_SCALE_BF16 = 3, LOWBIT_SCALE_BYTE = 4 };
enum lowbit_zero { LOWBIT_ZERO_FIXED = 0, LOWBIT_ZERO_STREAM = 1, LOWBIT_ZERO_F16 = 2 };
enum lowbit_table { LOWBIT_TABLE_NONE = 0, LOWBIT_TABLE_SHARED = 1, LOWBIT_TABLE_ROW = 2 };
enum lowbit_error { LOWBIT_OK = 0, LOWBIT_BAD_WEIGHT = -1, LOWBIT_BAD_ARGUMENT = -2, LOWBIT_NO_MEMORY = -3, LOWBIT_BAD_CODED = -4 };

/* A weight of rows x inputs. Pointers may be unaligned to anything but their own element. */
typedef struct {
    const uint16_t *codes;     /* (rows, lanes) */
    const void *scales;        /* (rows, groups), in the dtype that `scale` names; NULL for LOWBIT_SCALE_NONE */
    const float *scale_table;  /* 256 values of an 8-bit scale, for LOWBIT_SCALE_BYTE */
    const void *zeros;         /* a stream of bits for each row, (rows, ceil(groups * bits / 8)), or float16 (rows, groups) */
    const float *levels;       /* (1 or rows, 2^bits), for tables */
    int64_t rows, inputs;
    int64_t group;             /* inputs that share a scale, a power of two from 16; 0: the whole row */
    int32_t bits;              /* 1 to 8; 0 is ternary, ten digits to a lane */
    int32_t scale, zero, table;
    float fixed_zero;          /* the code of value 0, for LOWBIT_ZERO_FIXED without a table */
} lowbit_weight;

LOWBIT_EXPORT int lowbit_version(void);

/* out (m, rows) = x (m, inputs) times the weight transposed, plus bias (rows) or NULL; x, bias and out of one dtype, contiguous.
 * Sums are float32. */
LOWBIT_EXPORT int lowbit_linear(const lowbit_weight *weight, const void *x, const void *bias, void *out, int64_t m, int dtype,
                                int threads);

/* The same with x in 8 bits, a scale for each row of x and each `group` of inputs (at least 32, at most 128): the largest magnitude
 * over 127. A row of x with anything that is not finite gives NaN. Tables have levels in 8 bits as well: levels (1 or rows,
 * 2^bits) with 128 added, and steps (1 or rows), what one is worth; both NULL without a table. */
LOWBIT_EXPORT int lowbit_linear_int8(const lowbit_weight *weight, const uint8_t *levels, const float *steps, const void *x,
                                     const void *bias, void *out, int64_t m, int dtype, int threads);

/* Products of one x (m, inputs) with up to 16 weights of the same inputs, as lowbit_linear or lowbit_linear_int8 computes each; every out
 * (m, rows of its weight) is a place of its own. One row is multiplied by all in one piece of work. */
typedef struct {
    const lowbit_weight *weight;
    const uint8_t *levels; /* for int8 */
    const float *steps;    /* for int8 */
    const void *bias;
    void *out;
} lowbit_product;

LOWBIT_EXPORT int lowbit_linears(const lowbit_product *products, int64_t count, const void *x, int64_t m, int dtype, int int8, int threads);

/* out (m, inputs) = gradient (m, rows) times the weight, both of one dtype, contiguous. Sums are float32. */
LOWBIT_EXPORT int lowbit_input_gradient(const lowbit_weight *weight, const void *gradient, void *out, int64_t m, int dtype,
                                        int threads);

/* out (count, inputs), contiguous: rows first .. first + count - 1 of the weight, or rows index[0 .. count - 1]. */
LOWBIT_EXPORT int lowbit_dequantize(const lowbit_weight *weight, const int64_t *index, int64_t first, int64_t count, void *out,
                                    int dtype, int threads);

/* A low-rank adapter: factors a (rank, inputs) and b (rows, rank), and what their product is multiplied by. */
typedef struct {
    const float *a, *b;
    int64_t rows, inputs, rank;
    float scaling;
} lowbit_adapter;

/* hidden (m, rank rounded up to a multiple of 8) = x (m, inputs) times a transposed, and out (m, rows) = result + scaling * hidden times b
 * transposed; x, result and out of one dtype, contiguous. `out` may be `result`. */
LOWBIT_EXPORT int lowbit_low_rank(const lowbit_adapter *adapter, const void *x, const void *result, float *hidden, void *out, int64_t m,
                                  int dtype, int threads);

/* Gradients of that from gradient (m, rows), of the dtype of x: x_gradient (m, inputs), of that dtype, a_gradient and b_gradient, each
 * NULL if it is not wanted. x_gradient is added to `added` (m, inputs), which may be NULL, or x_gradient itself. */
LOWBIT_EXPORT int lowbit_low_rank_gradients(const lowbit_adapter *adapter, const void *gradient, const void *x, const float *hidden,
                                            const void *added, void *x_gradient, float *a_gradient, float *b_gradient, int64_t m,
                                            int dtype, int threads);

/* codes (rows, inputs), one byte each, to lanes and back. */
LOWBIT_EXPORT int lowbit_pack(const uint8_t *codes, uint16_t *lanes, int64_t rows, int64_t inputs, int bits, int threads);
LOWBIT_EXPORT int lowbit_unpack(const uint16_t *lanes, uint8_t *codes, int64_t rows, int64_t inputs, int bits, int threads);

/* Lanes of a packed row, or a negative number. */
LOWBIT_EXPORT int64_t lowbit_row_lanes(int64_t inputs, int bits);

/* Coded tensors, docs/format.md: `coded` (size bytes) to the rows that it stands for, out_size bytes, blocks in any order. Returns 0,
 * LOWBIT_BAD_CODED for a damaged head, LOWBIT_BAD_ARGUMENT where out_size is not that of the rows, or 1 + the number of a damaged
 * block; nothing outside of the two is read or written, whatever `coded` holds. `out` is even for codes of 3, 5, 6 and 7 bits. */
LOWBIT_EXPORT int64_t lowbit_decode(const uint8_t *coded, int64_t size, uint8_t *out, int64_t out_size, int threads);

/* counts (256): how often each symbol occurs in (rows, bytes), read as `symbols` says. */
LOWBIT_EXPORT int lowbit_count_symbols(const uint8_t *in, int64_t rows, int64_t bytes, int symbols, int64_t *counts);

/* The blocks of (rows, bytes), `step` rows each, by frequencies (256) whose sum is 4096 and which are not 0 for a symbol that occurs:
 * to `out` one after the other, which has room for rows * bytes, and sizes and checksums to index (blocks, 2). Returns the bytes
 * written or a negative number. */
LOWBIT_EXPORT int64_t lowbit_encode(const uint8_t *in, int64_t rows, int64_t bytes, int64_t step, int symbols,
                                    const uint16_t *frequencies, uint8_t *out, uint32_t *index, int threads);

/* The instruction sets that were compiled in and that this processor has, best first, separated by commas. */
LOWBIT_EXPORT const char *lowbit_isas(void);
LOWBIT_EXPORT const char *lowbit_isa(void);
LOWBIT_EXPORT int lowbit_force_isa(const char *name);

/* Given the entry point of the OpenMP that the process already has (GOMP_parallel of libgomp, or what speaks its interface), work
 * runs on its threads, so that nothing spins beside them; without one the library has a pool of its own. */
LOWBIT_EXPORT void lowbit_use_openmp(void *gomp_parallel);

/* Graphs that torch.compile turned into C++ (see graph.cpp). Functions of torch's stable C interface, aoti_torch_*, each of which returns 0,
 * and its numbers for the CPU and for the dtypes of lowbit_dtype. `describe` is asked for a weight that is not known, by its codes, and
 * calls lowbit_graph_add. */
typedef struct {
    int32_t (*get_data_ptr)(void *tensor, void **data);
    int32_t (*get_dim)(void *tensor, int64_t *dimensions);
    int32_t (*get_sizes)(void *tensor, int64_t **sizes);
    int32_t (*get_strides)(void *tensor, int64_t **strides);
    int32_t (*get_dtype)(void *tensor, int32_t *dtype);
    int32_t (*empty_strided)(int64_t dimensions, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device, int32_t index,
                             void **tensor);
    int32_t (*copy)(void *to, void *from, int32_t non_blocking);
    int32_t (*delete_tensor)(void *tensor);
    int32_t (*get_num_threads)(uint32_t *threads);
    int32_t (*describe)(const void *codes);
    int32_t device, dtypes[3];
} lowbit_torch;

LOWBIT_EXPORT void lowbit_use_torch(const lowbit_torch *functions);

/* A weight that graphs will ask for: what it points to stays until lowbit_graph_forget. levels and steps as for lowbit_linear_int8, format
 * the text that the graphs have, companions (count) where the other stored tensors lie, and of each how many bytes the description has a
 * copy of, 0 where it reads the tensor itself. */
LOWBIT_EXPORT int lowbit_graph_add(const lowbit_weight *weight, const uint8_t *levels, const float *steps, const char *format,
                                   const void *const *companions, const int64_t *copied, int64_t count);
LOWBIT_EXPORT void lowbit_graph_forget(const void *codes);

/* The ops lowbit::linear and lowbit::linear_int8 over handles of tensors: a new one in *out, and 0, or 1. */
LOWBIT_EXPORT int32_t lowbit_graph_linear(void *x, void *weight, void *const *companions, int64_t count, void **bias, const char *format,
                                          int64_t in_features, const char *backend, void **out);
LOWBIT_EXPORT int32_t lowbit_graph_linear_int8(void *x, void *weight, void *const *companions, int64_t count, void **bias,
                                               const char *format, int64_t in_features, const char *backend, void **out);

/* The ops lowbit::linears and lowbit::linears_int8: one row, (1, .., inputs), by several weights of one format; `each` times as many
 * companions as weights, those of the first weight first. *out has the rows of all one after the other. */
LOWBIT_EXPORT int32_t lowbit_graph_linears(void *x, void *const *weights, int64_t count, void *const *companions, int64_t companion_count,
                                           const char *format, int64_t in_features, const char *backend, void **out);
LOWBIT_EXPORT int32_t lowbit_graph_linears_int8(void *x, void *const *weights, int64_t count, void *const *companions,
                                                int64_t companion_count, const char *format, int64_t in_features, const char *backend,
                                                void **out);

#ifdef __cplusplus
}
#endif
#endif
