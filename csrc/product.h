// Every matrix product of a meta-step, by one register-blocked micro-kernel.
//
//     C[a][b] = gate( alpha * sum_k P1[a][k] Q1[k][b] + sum_k P2[a][k] Q2[k][b] + beta * base[a][b] )
//
// C and Q hold vectors. P holds vectors too (`Operand::vectors`: each lane has a matrix of its own) or single numbers that
// serve all lanes. So an activation is [features][columns] of vectors, and its lanes are either tasks or rows of one task
// (see lanes.h); nothing is ever packed, padded to a lane count or reduced across lanes inside the loop.
#pragma once

#include "vector_math.h"

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

// One of the sums, over `terms` values of k.
template <class T>
struct Sum {
    Operand<T> left{};
    Columns<T> right{};
    Index terms = 0;
};

// What a product is added to: nothing, a vector or a number at base[a * by_a + b * by_b].
template <class T>
struct Base {
    enum Kind { nothing, vector, number } kind = nothing;
    const T* p = nullptr;
    Index by_a = 0, by_b = 0;
    T beta = 1;
};

// What a result goes through before it is stored: nothing; rectify, negative ones become 0; or a mask, those become 0 where
// the vector y[a * by_a + b * L] is not positive. A ReLU and its derivative, without a pass of their own.
template <class T>
struct Gate {
    enum Kind { open, rectify, mask } kind = open;
    const T* y = nullptr;
    Index by_a = 0;

    MAML_FAST_INLINE Vec<T> operator()(Vec<T> v, Index a, Index b) const {
        if (kind == open) return v;
        if (kind == rectify) return positive_part<T>(v);
        return where_positive<T>(load(y + a * by_a + b * LANES<T>), v);
    }
};

template <class T>
struct Product {
    Sum<T> first;
    T alpha = 1;  // of the first sum
    Base<T> base;
    Sum<T> second;
    Gate<T> gate;
    T* c = nullptr;
    Index c_by_a = 0;  // c_by_b is a vector
};

// How many of b, and then of a, are kept in registers at once.
constexpr int MOST_B = MANY_REGISTERS ? 5 : 4;
constexpr int most_a(int b) {
    constexpr int many[] = {0, 12, 10, 8, 6, 5}, few[] = {0, 8, 6, 4, 3};
    return MANY_REGISTERS ? many[b] : few[b];
}

template <class T, int A, int B, bool VECTORS, bool CONTIGUOUS>
MAML_FAST_INLINE void add_sum(const Sum<T>& sum, Index a0, Index b0, Vec<T> (&acc)[A][B]) {
    const T *p[A], *q[B];
    MAML_FAST_UNROLL
    for (int a = 0; a < A; ++a) p[a] = sum.left.p + (a0 + a) * sum.left.by_a;
    MAML_FAST_UNROLL
    for (int b = 0; b < B; ++b) q[b] = sum.right.q + (b0 + b) * sum.right.by_b;
    Index at_p = 0, at_q = 0;
    for (Index k = 0; k < sum.terms; ++k, at_p += sum.left.by_k, at_q += sum.right.by_k) {
        Vec<T> y[B];
        MAML_FAST_UNROLL
        for (int b = 0; b < B; ++b) y[b] = CONTIGUOUS ? load(q[0] + at_q + b * LANES<T>) : load(q[b] + at_q);
        MAML_FAST_UNROLL
        for (int a = 0; a < A; ++a) {
            const Vec<T> x = VECTORS ? load(p[a] + at_p) : all(p[a][at_p]);
            MAML_FAST_UNROLL
            for (int b = 0; b < B; ++b) acc[a][b] += x * y[b];
        }
    }
}

template <int A, int B, class Visit>
MAML_FAST_INLINE void each(Visit visit) {
    MAML_FAST_UNROLL
    for (int a = 0; a < A; ++a) {
        MAML_FAST_UNROLL
        for (int b = 0; b < B; ++b) visit(a, b);
    }
}

// Rows a0 .. a0 + A - 1 of columns b0 .. b0 + B - 1.
template <class T, int A, int B, bool VECTORS, bool CONTIGUOUS>
__attribute__((noinline)) void product_block(const Product<T>& g, Index a0, Index b0) {
    Vec<T> acc[A][B];
    each<A, B>([&](int a, int b) { acc[a][b] = Vec<T>{}; });
    add_sum<T, A, B, VECTORS, CONTIGUOUS>(g.first, a0, b0, acc);
    // Each case is straight code of its own, or the compiler would put what has been summed aside.
    const T* base = g.base.p + a0 * g.base.by_a + b0 * g.base.by_b;
    if (g.base.kind == Base<T>::nothing) {
        each<A, B>([&](int a, int b) { acc[a][b] *= g.alpha; });
    } else if (g.base.kind == Base<T>::vector) {
        each<A, B>([&](int a, int b) {
            acc[a][b] = acc[a][b] * g.alpha + load(base + a * g.base.by_a + b * g.base.by_b) * g.base.beta;
        });
    } else {
        each<A, B>([&](int a, int b) {
            acc[a][b] = acc[a][b] * g.alpha + all(base[a * g.base.by_a + b * g.base.by_b] * g.base.beta);
        });
    }
    if (g.second.terms) add_sum<T, A, B, VECTORS, CONTIGUOUS>(g.second, a0, b0, acc);
    const Index by_a = g.c_by_a;
    T* const c = g.c + a0 * by_a + b0 * LANES<T>;
    if (g.gate.kind == Gate<T>::open) {
        each<A, B>([&](int a, int b) { store(c + a * by_a + b * LANES<T>, acc[a][b]); });
    } else if (g.gate.kind == Gate<T>::rectify) {
        each<A, B>([&](int a, int b) { store(c + a * by_a + b * LANES<T>, positive_part<T>(acc[a][b])); });
    } else {
        const T* y = g.gate.y + a0 * g.gate.by_a + b0 * LANES<T>;
        each<A, B>([&](int a, int b) {
            store(c + a * by_a + b * LANES<T>, where_positive<T>(load(y + a * g.gate.by_a + b * LANES<T>), acc[a][b]));
        });
    }
}

// The instances for 1 .. MOST rows, by number of rows.
template <class T, int B, bool VECTORS, bool CONTIGUOUS>
struct Blocks {
    using Block = void (*)(const Product<T>&, Index, Index);
    static constexpr int MOST = most_a(B);
    Block of[MOST + 1];
    template <int... A>
    constexpr explicit Blocks(Ints<A...>) : of{nullptr, product_block<T, A + 1, B, VECTORS, CONTIGUOUS>...} {}
};
template <class T, int B, bool VECTORS, bool CONTIGUOUS>
constexpr Blocks<T, B, VECTORS, CONTIGUOUS> BLOCKS{typename CountTo<most_a(B)>::type{}};

// All rows of B columns. Rows are cut into blocks of even size: a last block of one or two would wait for its own sums.
template <class T, int B, bool VECTORS, bool CONTIGUOUS>
void product_columns(Index rows, const Product<T>& g, Index b0) {
    Index a0 = 0;
    for (Index blocks = ceil_div(rows, most_a(B)); blocks > 0; --blocks) {
        const Index a = ceil_div(rows - a0, blocks);
        BLOCKS<T, B, VECTORS, CONTIGUOUS>.of[a](g, a0, b0);
        a0 += a;
    }
}

// Columns outside: they stay near while weights pass by.
template <class T, bool VECTORS, bool CONTIGUOUS>
void product_of(Index rows, Index columns, const Product<T>& g) {
    Index b0 = 0;
    for (Index blocks = ceil_div(columns, MOST_B); blocks > 0; --blocks) {
        const Index b = ceil_div(columns - b0, blocks);
        switch (b) {
            case 1: product_columns<T, 1, VECTORS, CONTIGUOUS>(rows, g, b0); break;
            case 2: product_columns<T, 2, VECTORS, CONTIGUOUS>(rows, g, b0); break;
            case 3: product_columns<T, 3, VECTORS, CONTIGUOUS>(rows, g, b0); break;
            case 4: product_columns<T, 4, VECTORS, CONTIGUOUS>(rows, g, b0); break;
            default:
                if constexpr (MOST_B == 5) product_columns<T, 5, VECTORS, CONTIGUOUS>(rows, g, b0);
        }
        b0 += b;
    }
}

// C [rows][columns of vectors]. Both sums have operands of one kind, and columns that are both contiguous or both not.
template <class T>
void product(Index rows, Index columns, const Product<T>& g) {
    if (!g.first.left.vectors)
        product_of<T, false, true>(rows, columns, g);  // columns are always contiguous there
    else if (g.first.right.by_b == LANES<T>)
        product_of<T, true, true>(rows, columns, g);
    else
        product_of<T, true, false>(rows, columns, g);
}

// ---- products that are summed over lanes

// C[a][b] (numbers) = alpha * sum over columns and lanes of P[a] Q[b], of both pairs, + C; P, Q [features][columns] of
// vectors. Sums over lanes are the costly part, so they are done once for a block, for as many vectors as there are lanes.
template <class T>
struct Dots {
    struct Pair {
        const T *p = nullptr, *q = nullptr;
        Index p_by_a = 0, q_by_b = 0;
        Index columns = 0;
    } first, second;
    T* c = nullptr;
    Index c_by_a = 0;  // 0: c is in blocks, see dot_place
    T alpha = 1;
    bool add = false;  // to what c holds
};

constexpr int DOT_A = 4, DOT_B = MANY_REGISTERS ? 4 : 2, DOT_BLOCK = DOT_A * DOT_B;

// Where C[a][b] is if C is in blocks, each as the sums over lanes come out; and how long that is.
constexpr Index dot_place(Index a, Index b, Index others) {
    const Index block = (a / DOT_A) * ceil_div(others, DOT_B) + b / DOT_B;
    return block * DOT_BLOCK + a % DOT_A * DOT_B + b % DOT_B;
}
constexpr Index dot_length(Index rows, Index others) {
    return ceil_div(rows, DOT_A) * ceil_div(others, DOT_B) * DOT_BLOCK;
}

template <class T, int A, int B>
MAML_FAST_INLINE void add_pair(const typename Dots<T>::Pair& pair, Vec<T>* acc) {
    for (Index k = 0; k < pair.columns * LANES<T>; k += LANES<T>) {
        Vec<T> y[B];
        MAML_FAST_UNROLL
        for (int b = 0; b < B; ++b) y[b] = load(pair.q + b * pair.q_by_b + k);
        MAML_FAST_UNROLL
        for (int a = 0; a < A; ++a) {
            const Vec<T> x = load(pair.p + a * pair.p_by_a + k);
            MAML_FAST_UNROLL
            for (int b = 0; b < B; ++b) acc[a * DOT_B + b] += x * y[b];
        }
    }
}

template <class T, int A, int B>
__attribute__((noinline)) void dot_block(const Dots<T>& g) {
    constexpr int L = LANES<T>, ALL = larger(DOT_BLOCK, L);
    Vec<T> acc[ALL];
    MAML_FAST_UNROLL
    for (int i = 0; i < ALL; ++i) acc[i] = Vec<T>{};
    add_pair<T, A, B>(g.first, acc);
    if (g.second.columns) add_pair<T, A, B>(g.second, acc);
    if (g.c_by_a == 0 && DOT_BLOCK % L == 0) {
        MAML_FAST_UNROLL
        for (int i = 0; i < ALL; i += L) {
            const Vec<T> sums = lane_sums<T>(acc + i) * g.alpha;
            store(g.c + i, g.add ? sums + load(g.c + i) : sums);
        }
        return;
    }
    T sums[ALL];
    for (int i = 0; i < ALL; i += L) store(sums + i, lane_sums<T>(acc + i) * g.alpha);
    const Index by_a = g.c_by_a ? g.c_by_a : DOT_B;
    for (int a = 0; a < A; ++a)
        for (int b = 0; b < B; ++b) {
            T& c = g.c[a * by_a + b];
            c = (g.add ? c : T(0)) + sums[a * DOT_B + b];
        }
}

template <class T, int A, int B>
void dot_size(Index a, Index b, const Dots<T>& g) {
    if (a == A && b == B) return dot_block<T, A, B>(g);
    if constexpr (A > 1)
        if (a < A) return dot_size<T, A - 1, B>(a, b, g);
    if constexpr (B > 1)
        if (b < B) return dot_size<T, A, B - 1>(a, b, g);
}

template <class T>
void dots(Index rows, Index others, const Dots<T>& g) {
    Dots<T> h = g;
    for (Index a = 0; a < rows; a += DOT_A)
        for (Index b = 0; b < others; b += DOT_B) {
            h.first.p = g.first.p + a * g.first.p_by_a;
            h.first.q = g.first.q + b * g.first.q_by_b;
            h.second.p = g.second.p + a * g.second.p_by_a;
            h.second.q = g.second.q + b * g.second.q_by_b;
            h.c = g.c + (g.c_by_a ? a * g.c_by_a + b : dot_place(a, b, others));
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
