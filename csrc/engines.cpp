#include <chrono>

#include "cpu_features.h"
#include "meta_step.h"

namespace maml_fast {

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::uint64_t ticks() {
#if defined(__x86_64__) || defined(__i386__)
    return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
    std::uint64_t now;
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(now));
    return now;
#else
    return static_cast<std::uint64_t>(seconds() * 1e9);
#endif
}

const std::vector<const Engine*>& engines() {
    static const std::vector<const Engine*> found = [] {
        const Engine* const built[] = {
            &baseline::engine,
#if defined(MAML_FAST_HAS_AVX2)
            &avx2::engine,
#endif
#if defined(MAML_FAST_HAS_AVX512)
            &avx512::engine,
#endif
#if defined(MAML_FAST_HAS_NEON)
            &neon::engine,
#endif
        };
        std::vector<const Engine*> usable;
        for (const std::string& name : instruction_sets())
            for (const Engine* engine : built)
                if (name == engine->name) usable.push_back(engine);
        return usable;
    }();
    return found;
}

}  // namespace maml_fast
