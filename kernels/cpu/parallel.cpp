// Threads: those of the process's OpenMP if it gave us its entry point, else a small pool of our own.
//
// torch runs its own operators on OpenMP threads, which spin for a while after each. A second pool beside them would wait for a
// core at every call, so its pool is used where its library is libgomp or speaks its interface. Parts are handed out by a
// counter: a team that is smaller than asked for, or a thread that comes late, costs balance and never work.

#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "lowbit_cpu.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace lowbit {
namespace {

typedef void (*GompParallel)(void (*)(void *), void *, unsigned, unsigned);
std::atomic<GompParallel> openmp{nullptr};

struct Job {
    void (*body)(void *, int, int);
    void *context;
    int parts;
    std::atomic<int> next{0}, workers{0};
};

void work(void *pointer) {
    Job *job = (Job *)pointer;
    const int worker = job->workers.fetch_add(1, std::memory_order_relaxed);
    for (int part; (part = job->next.fetch_add(1, std::memory_order_relaxed)) < job->parts;) job->body(job->context, part, worker);
}

// Workers that sleep until there is a job. It is never destroyed: threads may outlive static objects at exit.
class Pool {
  public:
    void run(Job *job, int helpers) {
        std::unique_lock<std::mutex> only(entry_, std::try_to_lock);  // one job at a time; a second caller works alone
        if (!only.owns_lock()) return work(job);
        while ((int)workers_.size() < helpers) {
            const int number = (int)workers_.size();
            workers_.emplace_back([this, number] { serve(number); });
            workers_.back().detach();
        }
        {
            std::lock_guard<std::mutex> hold(state_);
            job_ = job;
            wanted_ = helpers;
            busy_ = helpers;
            turn_++;
        }
        start_.notify_all();
        work(job);
        std::unique_lock<std::mutex> hold(state_);
        done_.wait(hold, [this] { return busy_ == 0; });
    }

  private:
    void serve(int number) {
        uint64_t seen = 0;
        for (;;) {
            Job *job;
            {
                std::unique_lock<std::mutex> hold(state_);
                start_.wait(hold, [&] { return turn_ != seen && number < wanted_; });
                seen = turn_;
                job = job_;
            }
            work(job);
            std::lock_guard<std::mutex> hold(state_);
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex entry_, state_;
    std::condition_variable start_, done_;
    std::vector<std::thread> workers_;
    Job *job_ = nullptr;
    int wanted_ = 0, busy_ = 0;
    uint64_t turn_ = 0;
};

Pool *pool = nullptr;
std::mutex making;

void forget() {  // in a forked child the workers are gone, and GCC's OpenMP would wait for its own for ever
    pool = nullptr;
    openmp = nullptr;
}

void forget_when_forked() {
#if !defined(_WIN32)
    static const bool once = pthread_atfork(nullptr, nullptr, forget) == 0;
    (void)once;
#endif
}

Pool *the_pool() {
    std::lock_guard<std::mutex> hold(making);
    if (!pool) {
        pool = new Pool;
        forget_when_forked();
    }
    return pool;
}

}  // namespace

void run_parts(void (*body)(void *, int, int), void *context, int parts, int threads) {
    Job job{body, context, parts, {0}, {0}};
    if (threads > parts) threads = parts;
    if (threads <= 1) return work(&job);
    if (GompParallel parallel = openmp.load()) return parallel(work, &job, (unsigned)threads, 0);
    the_pool()->run(&job, threads - 1);
}

}  // namespace lowbit

extern "C" void lowbit_use_openmp(void *gomp_parallel) {
    lowbit::forget_when_forked();
    lowbit::openmp = (lowbit::GompParallel)gomp_parallel;
}
