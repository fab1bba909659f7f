// One pool of threads, and memory for what they do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace lowbit {

// body(context, part, worker) for parts 0 .. parts - 1, each once, in any order, on at most `threads` threads; workers are numbers from 0
// to `threads` - 1, and no two calls at a time have the same.
void run_parts(void (*body)(void *, int, int), void *context, int parts, int threads);

template <class Body> void run(int parts, int threads, Body &body) {
    run_parts([](void *context, int part, int worker) { (*(Body *)context)(part, worker); }, &body, parts, threads);
}

// Uninitialised, aligned to a cache line; null where there is none left.
struct Free { void operator()(void *p) const { std::free(p); } };
template <class T> using Memory = std::unique_ptr<T, Free>;
template <class T> Memory<T> memory(int64_t count) {
    return Memory<T>((T *)std::aligned_alloc(64, ((size_t)count * sizeof(T) + 63) / 64 * 64));
}
typedef Memory<float> Floats;
inline Floats floats(int64_t count) { return memory<float>(count); }

}  // namespace lowbit
