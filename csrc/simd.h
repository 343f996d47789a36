// Vectors of the compiler's own type, and what is done across their lanes. Compiled once for each instruction set,
// in a namespace of its own: the linker must never put code for one processor into the program of another. For the same
// reason, templates of the standard library are used on types of that namespace only.
//
// L lanes of type T in a vector.
#pragma once

#include <cstdint>
#include <cstring>

// Given by the build, per instruction set: its name, the bytes of a vector, and how many vector registers there are.
#if !defined(MAML_FAST_ISA) || !defined(MAML_FAST_VECTOR_BYTES) || !defined(MAML_FAST_REGISTERS)
#error "compile this with MAML_FAST_ISA, MAML_FAST_VECTOR_BYTES and MAML_FAST_REGISTERS defined"
#endif

#define MAML_FAST_INLINE inline __attribute__((always_inline))
#define MAML_FAST_UNROLL _Pragma("GCC unroll 16")

namespace maml_fast::MAML_FAST_ISA {

using Index = std::int64_t;

constexpr int VECTOR_BYTES = MAML_FAST_VECTOR_BYTES;
constexpr bool MANY_REGISTERS = MAML_FAST_REGISTERS >= 32;

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(VECTOR_BYTES)));
    typedef T unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int LANES = VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
    using type = std::int32_t;
};
template <>
struct IntegerOf<double> {
    using type = std::int64_t;
};
template <class T>
using IntVec = Vec<typename IntegerOf<T>::type>;  // also what a comparison of two Vec<T> gives: 0 or -1 a lane

template <class T>
MAML_FAST_INLINE Vec<T> load(const T* p) {
    return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <class T>
MAML_FAST_INLINE void store(T* p, Vec<T> v) {
    *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}
template <class T>
MAML_FAST_INLINE Vec<T> all(T x) {
    return Vec<T>{} + x;
}

template <class I>
constexpr I smaller(I a, I b) {
    return a < b ? a : b;
}
template <class I>
constexpr I larger(I a, I b) {
    return a < b ? b : a;
}
constexpr Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

// ---- across lanes

template <int... I>
struct Ints {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
    using type = Ints<I...>;
};

// Of two vectors cut into pairs of blocks of H lanes, the first (ODD = 0) or second blocks of each pair, in turn.
constexpr int from_pair(int lane, int lanes, int h, int odd) {
    const int in_pair = lane % (2 * h), start = lane - in_pair;
    return start + in_pair % h + odd * h + (in_pair < h ? 0 : lanes);
}
template <int H, int ODD, class V, int... I>
MAML_FAST_INLINE V blocks_of(V a, V b, Ints<I...>) {
    return __builtin_shufflevector(a, b, from_pair(I, sizeof...(I), H, ODD)...);
}
template <class T, int H, int ODD>
MAML_FAST_INLINE Vec<T> blocks_of(Vec<T> a, Vec<T> b) {
    return blocks_of<H, ODD>(a, b, typename CountTo<LANES<T>>::type{});
}

// Lane j of the result: the sum of the lanes of v[j]. Each round halves the vectors and doubles the blocks that are summed.
template <class T, int H = 1>
MAML_FAST_INLINE Vec<T> lane_sums(Vec<T>* v) {
    if constexpr (H == LANES<T>) {
        return v[0];
    } else {
        MAML_FAST_UNROLL
        for (int j = 0; j < LANES<T> / (2 * H); ++j)
            v[j] = blocks_of<T, H, 0>(v[2 * j], v[2 * j + 1]) + blocks_of<T, H, 1>(v[2 * j], v[2 * j + 1]);
        return lane_sums<T, 2 * H>(v);
    }
}

// Halves are added to halves.
template <class T, int H = LANES<T> / 2>
MAML_FAST_INLINE T lane_sum(Vec<T> v) {
    if constexpr (H == 0)
        return v[0];
    else
        return lane_sum<T, H / 2>(v + blocks_of<T, H, 1>(v, v));
}

// Rows and columns of L vectors change places.
template <class T, int H = LANES<T> / 2>
MAML_FAST_INLINE void transpose(Vec<T>* v) {
    if constexpr (H > 0) {
        MAML_FAST_UNROLL
        for (int j = 0; j < LANES<T>; ++j)
            if (!(j & H)) {
                const Vec<T> a = v[j], b = v[j + H];
                v[j] = blocks_of<T, H, 0>(a, b);
                v[j + H] = blocks_of<T, H, 1>(a, b);
            }
        transpose<T, H / 2>(v);
    }
}

}  // namespace maml_fast::MAML_FAST_ISA
