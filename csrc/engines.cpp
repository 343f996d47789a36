#include <chrono>

#include "cpu_features.h"
#include "meta_step.h"

namespace maml_fast {

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
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
