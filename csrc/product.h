// Every matrix product of a meta-step, by one register-blocked micro-kernel.
//
//     C[a][b] = alpha * sum_k P[a][k] Q[k][b] + beta * base[a][b]
//
// C and Q hold vectors. P holds vectors too (`Operand::vectors`: each lane has a matrix of its own) or single numbers that
// serve all lanes. So an activation is [features][columns] of vectors, and its lanes are either tasks or rows of one task
// (see lanes.h); nothing is ever packed, padded to a lane count or reduced across lanes inside the loop.
#pragma once

#include "simd.h"

namespace maml_fast::MAML_FAST_ISA {

// The element (a, k) of P is at p[a * by_a + k * by_k]; strides count elements of T, not vectors.
template <class T>
struct Operand {
    const T* p;
    Index by_a, by_k;
    bool vectors;
};

// The vector (k, b) of Q is at q[k * by_k + b * by_b].
template <class T>
struct Columns {
    const T* q;
    Index by_k, by_b;
};

// What a product is added to: nothing, a vector or a number at base[a * by_a + b * by_b].
template <class T>
struct Base {
    enum Kind { nothing, vector, number } kind = nothing;
    const T* p = nullptr;
    Index by_a = 0, by_b = 0;
    T beta = 1;
};

template <class T>
struct ProductArgs {
    Operand<T> left;
    Columns<T> right;
    T* c;
    Index c_by_a;  // c_by_b is a vector
    Index terms;   // values of k
    T alpha;
    Base<T> base;
};

// How many of b, and then of a, are kept in registers at once.
constexpr int MOST_B = MANY_REGISTERS ? 5 : 4;
constexpr int most_a(int b) {
    constexpr int many[] = {0, 12, 10, 8, 6, 5}, few[] = {0, 8, 6, 4, 3};
    return MANY_REGISTERS ? many[b] : few[b];
}

template <class T, int A, int B, bool VECTORS, bool CONTIGUOUS>
__attribute__((noinline)) void product_block(const ProductArgs<T>& g) {
    constexpr Index L = LANES<T>;
    Vec<T> acc[A][B];
    const T* p[A];
    const T* q[B];
    MAML_FAST_UNROLL
    for (int a = 0; a < A; ++a) {
        p[a] = g.left.p + a * g.left.by_a;
        MAML_FAST_UNROLL
        for (int b = 0; b < B; ++b) acc[a][b] = Vec<T>{};
    }
    MAML_FAST_UNROLL
    for (int b = 0; b < B; ++b) q[b] = g.right.q + b * g.right.by_b;
    Index at_p = 0, at_q = 0;
    for (Index k = 0; k < g.terms; ++k, at_p += g.left.by_k, at_q += g.right.by_k) {
        Vec<T> y[B];
        MAML_FAST_UNROLL
        for (int b = 0; b < B; ++b) y[b] = CONTIGUOUS ? load(q[0] + at_q + b * L) : load(q[b] + at_q);
        MAML_FAST_UNROLL
        for (int a = 0; a < A; ++a) {
            const Vec<T> x = VECTORS ? load(p[a] + at_p) : all(p[a][at_p]);
            MAML_FAST_UNROLL
            for (int b = 0; b < B; ++b) acc[a][b] += x * y[b];
        }
    }
    MAML_FAST_UNROLL
    for (int a = 0; a < A; ++a) {
        T* c = g.c + a * g.c_by_a;
        const T* base = g.base.p + a * g.base.by_a;
        if (g.base.kind == Base<T>::nothing) {
            MAML_FAST_UNROLL
            for (int b = 0; b < B; ++b) store(c + b * L, acc[a][b] * g.alpha);
        } else if (g.base.kind == Base<T>::vector) {
            MAML_FAST_UNROLL
            for (int b = 0; b < B; ++b)
                store(c + b * L, acc[a][b] * g.alpha + load(base + b * g.base.by_b) * g.base.beta);
        } else {
            MAML_FAST_UNROLL
            for (int b = 0; b < B; ++b)
                store(c + b * L, acc[a][b] * g.alpha + all(base[b * g.base.by_b] * g.base.beta));
        }
    }
}

// The block of `a` rows, found among the instances for 1 .. A.
template <class T, int A, int B, bool VECTORS, bool CONTIGUOUS>
void product_rows(Index a, const ProductArgs<T>& g) {
    if constexpr (A > 0) {
        if (a == A) return product_block<T, A, B, VECTORS, CONTIGUOUS>(g);
        product_rows<T, A - 1, B, VECTORS, CONTIGUOUS>(a, g);
    }
}

// All rows of B columns. Rows are cut into blocks of even size: a last block of one or two would wait for its own sums.
template <class T, int B, bool VECTORS, bool CONTIGUOUS>
void product_columns(Index rows, ProductArgs<T> g) {
    Index blocks = ceil_div(rows, most_a(B));
    while (rows > 0) {
        const Index a = ceil_div(rows, blocks--);
        product_rows<T, most_a(B), B, VECTORS, CONTIGUOUS>(a, g);
        g.left.p += a * g.left.by_a;
        g.c += a * g.c_by_a;
        g.base.p += a * g.base.by_a;
        rows -= a;
    }
}

template <class T, bool VECTORS, bool CONTIGUOUS>
void product_of(Index rows, Index columns, ProductArgs<T> g) {
    Index blocks = ceil_div(columns, MOST_B);
    while (columns > 0) {
        const Index b = ceil_div(columns, blocks--);
        switch (b) {
            case 1: product_columns<T, 1, VECTORS, CONTIGUOUS>(rows, g); break;
            case 2: product_columns<T, 2, VECTORS, CONTIGUOUS>(rows, g); break;
            case 3: product_columns<T, 3, VECTORS, CONTIGUOUS>(rows, g); break;
            case 4: product_columns<T, 4, VECTORS, CONTIGUOUS>(rows, g); break;
            default:
                if constexpr (MOST_B == 5) product_columns<T, 5, VECTORS, CONTIGUOUS>(rows, g);
        }
        g.right.q += b * g.right.by_b;
        g.c += b * LANES<T>;
        g.base.p += b * g.base.by_b;
        columns -= b;
    }
}

// C [rows][columns of vectors], over `terms` values of k.
template <class T>
void product(Index rows, Index columns, Index terms, Operand<T> left, Columns<T> right, T* c, Index c_by_a, T alpha = 1,
             Base<T> base = {}) {
    const ProductArgs<T> g{left, right, c, c_by_a, terms, alpha, base};
    const bool contiguous = right.by_b == LANES<T>;
    if (!left.vectors)
        product_of<T, false, true>(rows, columns, g);  // every caller's columns are contiguous there
    else if (contiguous)
        product_of<T, true, true>(rows, columns, g);
    else
        product_of<T, true, false>(rows, columns, g);
}

// ---- products that are summed over lanes

// C[a][b] (numbers) = alpha * sum over columns and lanes of P[a] Q[b] + base; both [features][columns] of vectors.
template <class T>
struct DotArgs {
    const T *p, *q;
    Index p_by_a, q_by_b;
    Index columns;
    T* c;
    Index c_by_a;
    T alpha;
    bool add;  // to what c holds
};

constexpr int DOT_A = 4, DOT_B = MANY_REGISTERS ? 4 : 2;

template <class T, int A, int B>
__attribute__((noinline)) void dot_block(const DotArgs<T>& g) {
    constexpr int L = LANES<T>, ALL = (A * B + L - 1) / L * L;
    Vec<T> acc[ALL];
    MAML_FAST_UNROLL
    for (int i = 0; i < ALL; ++i) acc[i] = Vec<T>{};
    for (Index k = 0; k < g.columns * L; k += L) {
        Vec<T> y[B];
        MAML_FAST_UNROLL
        for (int b = 0; b < B; ++b) y[b] = load(g.q + b * g.q_by_b + k);
        MAML_FAST_UNROLL
        for (int a = 0; a < A; ++a) {
            const Vec<T> x = load(g.p + a * g.p_by_a + k);
            MAML_FAST_UNROLL
            for (int b = 0; b < B; ++b) acc[a * B + b] += x * y[b];
        }
    }
    T sums[ALL];
    for (int i = 0; i < ALL; i += L) store(sums + i, lane_sums<T>(acc + i) * g.alpha);
    for (int a = 0; a < A; ++a)
        for (int b = 0; b < B; ++b) {
            T& c = g.c[a * g.c_by_a + b];
            c = (g.add ? c : T(0)) + sums[a * B + b];
        }
}

template <class T, int A, int B>
void dot_size(Index a, Index b, const DotArgs<T>& g) {
    if (a == A && b == B) return dot_block<T, A, B>(g);
    if constexpr (A > 1)
        if (a < A) return dot_size<T, A - 1, B>(a, b, g);
    if constexpr (B > 1)
        if (b < B) return dot_size<T, A, B - 1>(a, b, g);
}

template <class T>
void dots(Index rows, Index others, DotArgs<T> g) {
    for (Index a = 0; a < rows; a += DOT_A)
        for (Index b = 0; b < others; b += DOT_B) {
            DotArgs<T> h = g;
            h.p += a * g.p_by_a;
            h.q += b * g.q_by_b;
            h.c += a * g.c_by_a + b;
            dot_size<T, DOT_A, DOT_B>(smaller<Index>(DOT_A, rows - a), smaller<Index>(DOT_B, others - b), h);
        }
}

// [features][columns] of vectors -> [columns * L][features rounded up to whole vectors], the last ones 0.
template <class T>
void rows_of(const T* q, Index by_feature, Index features, Index columns, T* out, Index by_row) {
    constexpr Index L = LANES<T>;
    for (Index f = 0; f < features; f += L)
        for (Index k = 0; k < columns; ++k) {
            Vec<T> v[L];
            MAML_FAST_UNROLL
            for (Index j = 0; j < L; ++j) v[j] = f + j < features ? load(q + (f + j) * by_feature + k * L) : Vec<T>{};
            transpose<T>(v);
            MAML_FAST_UNROLL
            for (Index j = 0; j < L; ++j) store(out + (k * L + j) * by_row + f, v[j]);
        }
}

}  // namespace maml_fast::MAML_FAST_ISA
