#include "cpu_features.h"

#include <cstdint>

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)
#define MAML_FAST_X86 1
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace maml_fast {

#if defined(MAML_FAST_X86)
namespace {

// The instruction itself, not __builtin_cpu_supports: that one needs a runtime library which clang lacks on Windows.
struct Registers {
    std::uint32_t eax, ebx, ecx, edx;
};

Registers cpuid(std::uint32_t leaf) {  // subleaf 0
#if defined(_MSC_VER)
    int r[4];
    __cpuidex(r, static_cast<int>(leaf), 0);
    return {static_cast<std::uint32_t>(r[0]), static_cast<std::uint32_t>(r[1]), static_cast<std::uint32_t>(r[2]),
            static_cast<std::uint32_t>(r[3])};
#else
    Registers r{};
    __cpuid_count(leaf, 0, r.eax, r.ebx, r.ecx, r.edx);
    return r;
#endif
}

// Which register files the operating system saves (XCR0). Only to be asked where cpuid reports OSXSAVE.
std::uint64_t saved_registers() {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    std::uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

constexpr bool all(std::uint64_t value, std::uint64_t bits) { return (value & bits) == bits; }
constexpr std::uint32_t bit(int i) { return std::uint32_t{1} << i; }

void add_x86(std::vector<std::string>& sets) {
    if (cpuid(0).eax < 7) return;
    constexpr std::uint32_t fma = bit(12), osxsave = bit(27), avx = bit(28);               // leaf 1, ecx
    constexpr std::uint32_t avx2 = bit(5);                                                 // leaf 7, ebx
    constexpr std::uint32_t f = bit(16), dq = bit(17), bw = bit(30), vl = bit(31);         // leaf 7, ebx
    constexpr std::uint64_t ymm = bit(1) | bit(2), zmm = ymm | bit(5) | bit(6) | bit(7);   // XCR0

    if (!all(cpuid(1).ecx, fma | osxsave | avx)) return;
    const std::uint32_t extended = cpuid(7).ebx;
    const std::uint64_t saved = saved_registers();
    if (!all(extended, avx2) || !all(saved, ymm)) return;
    sets.emplace_back("avx2");
    if (all(extended, f | dq | bw | vl) && all(saved, zmm)) sets.emplace_back("avx512");
}

}  // namespace
#endif

std::vector<std::string> instruction_sets() {
    std::vector<std::string> sets{"baseline"};
#if defined(MAML_FAST_X86)
    add_x86(sets);
#elif defined(__aarch64__) || defined(_M_ARM64) || defined(__ARM_NEON)
    // Part of every 64-bit Arm processor; on 32 bits, of every one that the compiler was told to target.
    sets.emplace_back("neon");
#endif
    return sets;
}

}  // namespace maml_fast
