// Runs cases from a file on every instruction set of this machine: for processors on which there is no Python, such as an
// emulated one. Written by tests/test_native_arm.py. Each case is eight-byte numbers (rows, inputs, group, bits, scale, zero, table,
// fixed zero as the bits of a double, m), then arrays, each after its length in bytes, in the order in which they are read below.
// Decoded values and lanes have to be the expected ones bit by bit, products within the bounds given.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "lowbit_cpu.h"

namespace {

FILE *input;
int failures = 0;

int64_t number() {
    int64_t value;
    if (fread(&value, 8, 1, input) != 1) exit(3);  // the file ends too early
    return value;
}

// An array of exactly its bytes; null if it has none.
struct Array {
    void *data;
    int64_t bytes;
    Array() : bytes(number()) {
        data = bytes ? malloc((size_t)bytes) : nullptr;
        if (bytes && fread(data, 1, (size_t)bytes, input) != (size_t)bytes) exit(3);
    }
    ~Array() { free(data); }
    Array(const Array &) = delete;
};

void expect(bool right, const char *what, const char *isa, int64_t at) {
    if (right) return;
    failures++;
    printf("case %lld: %s of %s is wrong\n", (long long)at, what, isa);
}

bool close(const std::vector<float> &found, const Array &exact, const Array &bound) {
    const double *e = (const double *)exact.data, *b = (const double *)bound.data;
    for (size_t i = 0; i < found.size(); i++)
        if (!(std::fabs(found[i] - e[i]) <= b[i])) return false;
    return true;
}

void run(int64_t at) {
    lowbit_weight w = {};
    w.rows = number(), w.inputs = number(), w.group = number();
    w.bits = (int32_t)number(), w.scale = (int32_t)number(), w.zero = (int32_t)number(), w.table = (int32_t)number();
    const int64_t fixed = number(), m = number();
    double zero;
    memcpy(&zero, &fixed, 8);
    w.fixed_zero = (float)zero;
    Array lanes, scales, scale_table, zeros, levels, codes, f32, f16, bf16, x, exact, bound, levels8, steps8, exact8, bound8;
    w.codes = (const uint16_t *)lanes.data;
    w.scales = scales.data, w.zeros = zeros.data;
    w.scale_table = (const float *)scale_table.data, w.levels = (const float *)levels.data;
    const Array *values[3] = {&f32, &f16, &bf16};
    const std::vector<char> names(lowbit_isas(), lowbit_isas() + strlen(lowbit_isas()) + 1);
    std::vector<char> list(names);
    for (char *isa = strtok(list.data(), ","); isa; isa = strtok(nullptr, ",")) {
        expect(lowbit_force_isa(isa) == LOWBIT_OK, "choice", isa, at);
        for (int dtype = 0; dtype < 3; dtype++) {
            std::vector<char> found((size_t)values[dtype]->bytes);
            expect(lowbit_dequantize(&w, nullptr, 0, w.rows, found.data(), dtype, 2) == LOWBIT_OK &&
                       !memcmp(found.data(), values[dtype]->data, found.size()), "a decoded value", isa, at);
        }
        std::vector<float> out((size_t)(m * w.rows));
        expect(lowbit_linear(&w, x.data, nullptr, out.data(), m, LOWBIT_F32, 2) == LOWBIT_OK && close(out, exact, bound),
               "a product", isa, at);
        for (int64_t i = 0; i < m; i++) lowbit_linear(&w, (float *)x.data + i * w.inputs, nullptr, out.data() + i * w.rows, 1, LOWBIT_F32, 1);
        expect(close(out, exact, bound), "a product of one row", isa, at);
        expect(lowbit_linear_int8(&w, (const uint8_t *)levels8.data, (const float *)steps8.data, x.data, nullptr, out.data(), m,
                                  LOWBIT_F32, 2) == LOWBIT_OK && close(out, exact8, bound8), "a product in 8 bits", isa, at);
        std::vector<uint16_t> packed((size_t)lanes.bytes / 2);
        std::vector<uint8_t> again((size_t)codes.bytes);
        lowbit_pack((const uint8_t *)codes.data, packed.data(), w.rows, w.inputs, w.bits, 2);
        lowbit_unpack(w.codes, again.data(), w.rows, w.inputs, w.bits, 2);
        expect(!memcmp(packed.data(), lanes.data, (size_t)lanes.bytes), "packing", isa, at);
        expect(!memcmp(again.data(), codes.data, again.size()), "unpacking", isa, at);
    }
}

}  // namespace

int main(int count, char **names) {
    if (count != 2 || !(input = fopen(names[1], "rb"))) return 2;
    const int64_t cases = number();
    for (int64_t i = 0; i < cases; i++) run(i);
    printf("%lld cases on %s: %d failures\n", (long long)cases, lowbit_isas(), failures);
    return failures != 0;
}
