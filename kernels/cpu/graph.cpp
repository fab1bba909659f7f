// Products for graphs that torch.compile turned into C++ (hf_lowbit/compiled.py), which call them without Python.
//
// Tensors are handles of torch's stable C interface, whose functions come as pointers: this library neither includes nor links
// anything of torch. A graph hands over the packed tensors of a layer; how they are to be read has been told before, by
// lowbit_graph_add, and is found by the address of the codes. A description may hold copies of small tensors (a table of scales, a
// codebook as float32): their sources are compared at every call, so that a change of them is seen.

#include <atomic>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "lowbit_cpu.h"

namespace {

constexpr int64_t MOST_DIMENSIONS = 8;
constexpr int64_t MOST_PRODUCTS = 16;
constexpr int64_t CALL_ROWS = 256;  // of a call, as in hf_lowbit/native_backend.py

lowbit_torch torch;

struct Source {
    const void *data;
    std::vector<uint8_t> copied;  // its bytes when it was described, if the description does not read it in place
    bool same(const void *now) const { return now == data && (copied.empty() || !std::memcmp(now, copied.data(), copied.size())); }
};

struct Known {
    lowbit_weight weight;
    const uint8_t *levels;
    const float *steps;
    std::string format;
    std::vector<Source> companions;
};

std::shared_mutex lock;
std::unordered_map<const void *, Known> all;

// A tensor of this function's own.
struct Own {
    void *handle = nullptr;
    ~Own() { if (handle) torch.delete_tensor(handle); }
};

struct Shape {
    int64_t dimensions = 0, sizes[MOST_DIMENSIONS], strides[MOST_DIMENSIONS];

    bool read(void *tensor) {
        int64_t *found;
        if (torch.get_dim(tensor, &dimensions) || dimensions < 0 || dimensions > MOST_DIMENSIONS) return false;
        if (torch.get_sizes(tensor, &found)) return false;
        std::memcpy(sizes, found, sizeof(int64_t) * (size_t)dimensions);
        if (torch.get_strides(tensor, &found)) return false;
        std::memcpy(strides, found, sizeof(int64_t) * (size_t)dimensions);
        return true;
    }
    // Of the strides that a contiguous tensor has; sets them and says whether they were so.
    bool contiguous() {
        bool was = true;
        int64_t next = 1;
        for (int64_t d = dimensions - 1; d >= 0; d--) {
            was = was && (sizes[d] == 1 || strides[d] == next);
            strides[d] = next;
            next *= sizes[d] > 0 ? sizes[d] : 1;
        }
        return was;
    }
    bool make(int32_t dtype, void **tensor) const {
        return !torch.empty_strided(dimensions, sizes, strides, dtype, torch.device, 0, tensor);
    }
};

// Where the elements of a tensor lie one after the other in this dtype: in itself, or in a copy.
bool elements(void *tensor, int32_t dtype, Own &copy, Shape &shape, void **data) {
    int32_t has;
    if (!shape.read(tensor) || torch.get_dtype(tensor, &has)) return false;
    if (!shape.contiguous() || has != dtype) {
        if (!shape.make(dtype, &copy.handle) || torch.copy(copy.handle, tensor, 0)) return false;
        tensor = copy.handle;
    }
    return !torch.get_data_ptr(tensor, data);
}

// The description of a weight as it is now, if there is one.
bool find(const void *codes, const void *const *companions, int64_t count, const char *format, Known &known) {
    std::shared_lock<std::shared_mutex> held(lock);
    const auto found = all.find(codes);
    if (found == all.end() || found->second.format != format || (int64_t)found->second.companions.size() != count) return false;
    for (int64_t i = 0; i < count; i++)
        if (!found->second.companions[(size_t)i].same(companions[i])) return false;
    known.weight = found->second.weight, known.levels = found->second.levels, known.steps = found->second.steps;
    return true;
}

// The description of a weight of a graph, asked for where it is not known.
bool look_up(void *weight, void *const *companions, int64_t count, const char *format, Known &known) {
    const void *codes, *lie[MOST_DIMENSIONS];
    if (!torch.get_data_ptr || count < 0 || count > MOST_DIMENSIONS || torch.get_data_ptr(weight, (void **)&codes)) return false;
    for (int64_t i = 0; i < count; i++)
        if (torch.get_data_ptr(companions[i], (void **)&lie[i])) return false;
    return find(codes, lie, count, format, known) || (!torch.describe(codes) && find(codes, lie, count, format, known));
}

// Of a tensor, its number in lowbit_dtype and in torch.
bool dtype_of(void *tensor, int &dtype, int32_t &has) {
    if (torch.get_dtype(tensor, &has)) return false;
    dtype = 0;
    while (dtype < 3 && torch.dtypes[dtype] != has) dtype++;
    return dtype < 3;
}

template <class Run>
int32_t product(void *x, void *weight, void *const *companions, int64_t count, void **bias, const char *format, int64_t inputs, void **out,
                const Run &run) {
    Known known;
    int32_t has;
    int dtype;
    if (!look_up(weight, companions, count, format, known) || !dtype_of(x, dtype, has)) return 1;
    Own x_copy, bias_copy;
    Shape shape, of_bias;
    void *from, *add = nullptr, *to;
    if (!elements(x, has, x_copy, shape, &from)) return 1;
    if (shape.dimensions < 1 || shape.sizes[shape.dimensions - 1] != inputs || known.weight.inputs != inputs) return 1;
    if (bias && !elements(*bias, has, bias_copy, of_bias, &add)) return 1;
    int64_t m = 1;
    for (int64_t d = 0; d < shape.dimensions - 1; d++) m *= shape.sizes[d];
    shape.sizes[shape.dimensions - 1] = known.weight.rows;
    shape.contiguous();
    uint32_t threads;
    if (torch.get_num_threads(&threads) || !shape.make(has, out)) return 1;
    if (torch.get_data_ptr(*out, &to)) return 1;
    return run(known, from, add, to, m, dtype, (int)threads) != LOWBIT_OK;
}

int32_t products(void *x, void *const *weights, int64_t count, void *const *companions, int64_t companion_count, const char *format,
                 int64_t inputs, int int8, void **out) {
    if (count < 1 || count > MOST_PRODUCTS || companion_count % count) return 1;
    const int64_t each = companion_count / count;
    Known known[MOST_PRODUCTS];
    lowbit_product all[MOST_PRODUCTS];
    int32_t has;
    int dtype;
    int64_t rows = 0, m = 1;
    for (int64_t i = 0; i < count; i++) {
        if (!look_up(weights[i], companions + i * each, each, format, known[i]) || known[i].weight.inputs != inputs) return 1;
        all[i] = {&known[i].weight, known[i].levels, known[i].steps, nullptr, nullptr};
        rows += known[i].weight.rows;
    }
    Own x_copy;
    Shape shape;
    void *from, *to;
    uint32_t threads;
    if (!dtype_of(x, dtype, has) || !elements(x, has, x_copy, shape, &from)) return 1;
    for (int64_t d = 0; d < shape.dimensions - 1; d++) m *= shape.sizes[d];
    if (shape.dimensions < 1 || shape.sizes[shape.dimensions - 1] != inputs || m != 1) return 1;
    shape.sizes[shape.dimensions - 1] = rows;
    shape.contiguous();
    if (torch.get_num_threads(&threads) || !shape.make(has, out) || torch.get_data_ptr(*out, &to)) return 1;
    for (int64_t i = 0; i < count; i++) {
        all[i].out = to;
        to = (char *)to + known[i].weight.rows * (dtype == LOWBIT_F32 ? 4 : 2);
    }
    return lowbit_linears(all, count, from, 1, dtype, int8, (int)threads) != LOWBIT_OK;
}

}  // namespace

void lowbit_use_torch(const lowbit_torch *functions) { torch = *functions; }

int lowbit_graph_add(const lowbit_weight *weight, const uint8_t *levels, const float *steps, const char *format,
                     const void *const *companions, const int64_t *copied, int64_t count) {
    if (!weight || !format || count < 0 || count > MOST_DIMENSIONS) return LOWBIT_BAD_ARGUMENT;
    Known known{*weight, levels, steps, format, {}};
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *bytes = (const uint8_t *)companions[i];
        known.companions.push_back({bytes, std::vector<uint8_t>(bytes, bytes + copied[i])});
    }
    std::unique_lock<std::shared_mutex> held(lock);
    all[weight->codes] = std::move(known);
    return LOWBIT_OK;
}

void lowbit_graph_forget(const void *codes) {
    std::unique_lock<std::shared_mutex> held(lock);
    all.erase(codes);
}

int32_t lowbit_graph_linear(void *x, void *weight, void *const *companions, int64_t count, void **bias, const char *format,
                            int64_t in_features, const char *, void **out) {
    return product(x, weight, companions, count, bias, format, in_features, out,
                   [](const Known &w, const void *from, const void *add, void *to, int64_t m, int dtype, int threads) {
                       const int64_t size = dtype == LOWBIT_F32 ? 4 : 2;
                       for (int64_t first = 0; first < m; first += CALL_ROWS) {
                           const char *start = (const char *)from + first * w.weight.inputs * size;
                           char *end = (char *)to + first * w.weight.rows * size;
                           const int64_t some = m - first < CALL_ROWS ? m - first : CALL_ROWS;
                           if (int error = lowbit_linear(&w.weight, start, add, end, some, dtype, threads)) return error;
                       }
                       return (int)LOWBIT_OK;
                   });
}

int32_t lowbit_graph_linear_int8(void *x, void *weight, void *const *companions, int64_t count, void **bias, const char *format,
                                 int64_t in_features, const char *, void **out) {
    return product(x, weight, companions, count, bias, format, in_features, out,
                   [](const Known &w, const void *from, const void *add, void *to, int64_t m, int dtype, int threads) {
                       return lowbit_linear_int8(&w.weight, w.levels, w.steps, from, add, to, m, dtype, threads);
                   });
}

int32_t lowbit_graph_linears(void *x, void *const *weights, int64_t count, void *const *companions, int64_t companion_count, const char *format,
                             int64_t in_features, const char *, void **out) {
    return products(x, weights, count, companions, companion_count, format, in_features, 0, out);
}

int32_t lowbit_graph_linears_int8(void *x, void *const *weights, int64_t count, void *const *companions, int64_t companion_count,
                                  const char *format, int64_t in_features, const char *, void **out) {
    return products(x, weights, count, companions, companion_count, format, in_features, 1, out);
}
