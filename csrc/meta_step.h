// The meta-step compiled for one instruction set; the build compiles meta_step.cpp once for each.
#pragma once

#include "program.h"

namespace maml_fast {

// A clock that only runs forward.
double seconds();

#define MAML_FAST_DECLARE_ENGINE(isa) \
    namespace isa {                   \
    extern const Engine engine;       \
    }
MAML_FAST_DECLARE_ENGINE(baseline)
MAML_FAST_DECLARE_ENGINE(avx2)
MAML_FAST_DECLARE_ENGINE(avx512)
MAML_FAST_DECLARE_ENGINE(neon)
#undef MAML_FAST_DECLARE_ENGINE

}  // namespace maml_fast
