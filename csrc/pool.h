// The threads that tiles run on.
//
// Two sets of threads would be in each other's way: those of OpenMP spin for milliseconds after each operation of torch. So
// where torch's OpenMP is found at run time (share_openmp), tiles run on its threads. Nothing is linked to it. Elsewhere, and
// in the child of a fork, which OpenMP does not survive, the threads are the pool's own.
//
// In the pool's own, the caller does its share, and could do all of it: a worker that wakes too late finds the job closed. A worker waits for
// the next job by spinning for a moment, so that meta-steps in a loop start at once, and then sleeps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace maml_fast {

class Pool {
   public:
    using Body = void (*)(void* context);

    // The one of this process; after a fork, a new one.
    static Pool& of_process();
    // Rises by one in each child of a fork: what threads left half done there is not to be used.
    static std::uint64_t process_age();

    // GNU OpenMP's entry point, or null for none.
    using OpenMp = void (*)(void (*)(void*), void*, unsigned, unsigned);
    static void share_openmp(OpenMp entry);

    // body(context) on the caller and on at most threads - 1 workers; returns when all have returned. If another thread's job
    // is running, the caller works alone.
    void run(int threads, Body body, void* context);

   private:
    Pool() = default;

    void run_on_own(int threads, Body body, void* context);
    void work();
    bool enter();
    void wait_for_job(std::uint64_t seen);
    void grow(int workers);

    // (number of the job) << 32 | workers that may still enter it
    std::atomic<std::uint64_t> gate_{0};
    std::atomic<int> finished_{0};
    Body body_ = nullptr;
    void* context_ = nullptr;

    std::mutex caller_;  // held by the thread whose job it is
    std::mutex sleep_;
    std::condition_variable wake_;
    std::atomic<int> sleepers_{0};
    std::atomic<int> workers_{0};
};

}  // namespace maml_fast
