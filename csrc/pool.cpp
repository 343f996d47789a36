#include "pool.h"

#include <chrono>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace maml_fast {
namespace {

// Longer than what Python does between two meta-steps of a training loop, short beside anything a person notices.
constexpr auto SPIN = std::chrono::microseconds(300);

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

constexpr std::uint64_t job_of(std::uint64_t gate) { return gate >> 32; }
constexpr std::uint64_t places_of(std::uint64_t gate) { return gate & 0xffffffffu; }

std::atomic<Pool*> the_pool{nullptr};
std::atomic<std::uint64_t> age{0};
std::atomic<Pool::OpenMp> openmp{nullptr};

#if !defined(_WIN32)
// The child of a fork has no workers, and locks may be held by threads that are gone: it starts anew.
void in_child() {
    the_pool.store(nullptr);
    openmp.store(nullptr);
    age.fetch_add(1);
}
const int registered = pthread_atfork(nullptr, nullptr, in_child);
#endif

}  // namespace

Pool& Pool::of_process() {
#if !defined(_WIN32)
    (void)registered;
#endif
    Pool* pool = the_pool.load();
    if (!pool) {
        Pool* made = new Pool();  // never deleted: its threads may run until the process ends
        if (the_pool.compare_exchange_strong(pool, made)) return *made;
        delete made;
    }
    return *pool;
}

std::uint64_t Pool::process_age() { return age.load(std::memory_order_relaxed); }

void Pool::share_openmp(OpenMp entry) { openmp.store(entry); }

void Pool::run(int threads, Body body, void* context) {
    if (threads <= 1) return body(context);
    if (const OpenMp entry = openmp.load()) return entry(body, context, static_cast<unsigned>(threads), 0);
    run_on_own(threads, body, context);
}

void Pool::run_on_own(int threads, Body body, void* context) {
    std::unique_lock<std::mutex> caller(caller_, std::try_to_lock);
    if (!caller.owns_lock()) return body(context);
    grow(threads - 1);
    body_ = body;
    context_ = context;
    finished_.store(0, std::memory_order_relaxed);
    const std::uint64_t places = static_cast<std::uint64_t>(threads - 1);
    const std::uint64_t job = (job_of(gate_.load()) + 1) << 32;
    gate_.store(job | places);
    if (sleepers_.load() > 0) {
        const std::lock_guard<std::mutex> lock(sleep_);
        wake_.notify_all();
    }
    body(context);
    const std::uint64_t left = places_of(gate_.exchange(job));
    const int entered = static_cast<int>(places - left);
    for (int spins = 0; finished_.load(std::memory_order_acquire) < entered; ++spins) {
        pause();
        if (spins > 20000) std::this_thread::yield();
    }
}

void Pool::grow(int workers) {
    for (; workers_.load() < workers; workers_.fetch_add(1)) std::thread([this] { work(); }).detach();
}

void Pool::work() {
    std::uint64_t seen = 0;
    for (;;) {
        wait_for_job(seen);
        seen = job_of(gate_.load());
        if (!enter()) continue;
        body_(context_);
        finished_.fetch_add(1, std::memory_order_release);
    }
}

// Takes a place in the job that is open, if one is.
bool Pool::enter() {
    std::uint64_t gate = gate_.load();
    while (places_of(gate) > 0)
        if (gate_.compare_exchange_weak(gate, gate - 1)) return true;
    return false;
}

// Until a job with places, other than the one seen last, is open.
void Pool::wait_for_job(std::uint64_t seen) {
    const auto open = [&] {
        const std::uint64_t gate = gate_.load();
        return places_of(gate) > 0 && job_of(gate) != seen;
    };
    // Spinning would take the processor from those who work if there are fewer than threads.
    const bool spins = static_cast<unsigned>(workers_.load()) < std::thread::hardware_concurrency();
    const auto end = std::chrono::steady_clock::now() + SPIN;
    while (spins) {
        for (int i = 0; i < 64; ++i) {
            if (open()) return;
            pause();
        }
        if (std::chrono::steady_clock::now() > end) break;
    }
    std::unique_lock<std::mutex> lock(sleep_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, open);
    sleepers_.fetch_sub(1);
}

}  // namespace maml_fast
