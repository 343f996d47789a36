// Which instruction sets this processor has, asked at run time.
#pragma once

#include <string>
#include <vector>

namespace maml_fast {

// From lowest to highest, the first always "baseline" (what the compiler targets without flags). The others:
//   "avx2"    x86: AVX2 and FMA
//   "avx512"  x86: AVX-512 F, BW, DQ and VL, besides "avx2"
//   "neon"    Arm
// A set is named only if the operating system saves its registers too.
std::vector<std::string> instruction_sets();

}  // namespace maml_fast
