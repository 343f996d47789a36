// The register-blocked micro-kernel of images, where vectors hold channels.
//
//     C[a][v] = base[v] + sum over segments, over i < count of x[a][segment.x + i * by_x] * y[segment.y + i * by_y + v]
//
// x are numbers, each serves all lanes; y and C are vectors. In a convolution a runs over pixels, i over channels and taps, and
// v over the vectors of a pixel's result. In the gradient of its weights a runs over taps and channels, and i over pixels.
//
// A sum of hundreds of terms one after another loses digits, so C takes up the sum so far every MOST_TERMS at the latest.
#pragma once

#include "simd.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T>
struct Segment {
    Index x;     // from where each a begins
    const T* y;  // of the first of the block's vectors
    Index count;
};

// A list of segments, with the strides that they have in common.
template <class T>
struct Segments {
    const Segment<T>* p = nullptr;
    Index count = 0;
    Index by_x = 1, by_y = 0;
};

// How many vectors, and then how many of a, are kept in registers at once.
constexpr int MOST_VECTORS = MANY_REGISTERS ? 4 : 2;
constexpr int most_starts(int vectors) {
    constexpr int many[] = {0, 12, 10, 8, 6}, few[] = {0, 8, 6, 4, 3};
    return MANY_REGISTERS ? many[vectors] : few[vectors];
}
constexpr int MOST_STARTS = most_starts(1);

// Where a block's sums begin and end: x[a] and c[a] of its starts, the first of its vectors, and what is added.
template <class T>
struct Starts {
    const T* x[MOST_STARTS];
    T* c[MOST_STARTS];
};
enum class Begin { zero, vectors, result };  // nothing, base[v], or what c holds

constexpr Index MOST_TERMS = 128;

// c = acc, or c + acc where it holds a sum already; acc begins again.
template <class T, int A, int V>
MAML_FAST_INLINE void put_sums_aside(Vec<T> (&acc)[A][V], T* const* c, Index v0, bool& held) {
    if (held) {
        MAML_FAST_UNROLL
        for (int a = 0; a < A; ++a) {
            MAML_FAST_UNROLL
            for (int v = 0; v < V; ++v) acc[a][v] += load(c[a] + v0 + v * LANES<T>);
        }
    }
    held = true;
    MAML_FAST_UNROLL
    for (int a = 0; a < A; ++a) {
        MAML_FAST_UNROLL
        for (int v = 0; v < V; ++v) {
            store(c[a] + v0 + v * LANES<T>, acc[a][v]);
            acc[a][v] = Vec<T>{};
        }
    }
}

template <class T, int A, int V, bool UNIT>
__attribute__((noinline)) void sum_block(const Segments<T>& segments, const Starts<T>& starts, Index v0, Begin begin,
                                         const T* base) {
    constexpr Index L = LANES<T>;
    Vec<T> acc[A][V];
    bool held = begin == Begin::result;
    MAML_FAST_UNROLL
    for (int a = 0; a < A; ++a) {
        MAML_FAST_UNROLL
        for (int v = 0; v < V; ++v) acc[a][v] = begin == Begin::vectors ? load(base + v * L) : Vec<T>{};
    }
    const Index by_x = UNIT ? 1 : segments.by_x, by_y = segments.by_y;
    Index terms = 0;
    for (const Segment<T>*s = segments.p, *end = s + segments.count; s != end; ++s) {
        if (terms && terms + s->count > MOST_TERMS) {
            put_sums_aside<T, A, V>(acc, starts.c, v0, held);
            terms = 0;
        }
        terms += s->count;
        const T *x[A], *y = s->y + v0;
        MAML_FAST_UNROLL
        for (int a = 0; a < A; ++a) x[a] = starts.x[a] + s->x;
        Index at = 0;
        for (Index i = s->count; i > 0; --i, at += by_x, y += by_y) {
            Vec<T> right[V];
            MAML_FAST_UNROLL
            for (int v = 0; v < V; ++v) right[v] = load(y + v * L);
            MAML_FAST_UNROLL
            for (int a = 0; a < A; ++a) {
                const Vec<T> left = all(x[a][at]);
                MAML_FAST_UNROLL
                for (int v = 0; v < V; ++v) acc[a][v] += left * right[v];
            }
        }
    }
    put_sums_aside<T, A, V>(acc, starts.c, v0, held);
}

}  // namespace maml_fast::MAML_FAST_ISA
