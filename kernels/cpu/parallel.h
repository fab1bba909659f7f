// One pool of threads.
#pragma once

namespace lowbit {

// body(context, 0), ..., body(context, parts - 1), each once, in any order, on at most `threads` threads.
void run_parts(void (*body)(void *, int), void *context, int parts, int threads);

}  // namespace lowbit
