// What tests and benchmarks ask of an instruction set directly.
#pragma once

#include <memory>

#include "meta_step.h"
#include "ops/pointwise.h"
#include "product.h"

namespace maml_fast::MAML_FAST_ISA {

// All four rules of an activation on flat arrays.
template <class T>
void activation_of(const Layer& layer, Index n, const void* const in[4], void* const out[4]) {
    const Index columns = ceil_div(n, LANES<T>);
    Arena counting;
    const auto lay_out = [&](Arena& arena, PointwiseStage<T>& stage, Edge<T>& x, Edge<T>& y) {
        for (Edge<T>* edge : {&x, &y}) {
            *edge = {1, columns, columns, {}, {}, {}, {}};
            for (auto* views : {&edge->value, &edge->cotangent, &edge->tangent, &edge->t_cotangent})
                *views = {arena.view<T>(1, columns), arena.view<T>(1, columns)};
        }
        stage.in = &x;
        stage.out = &y;
        stage.allocate(arena, 1);
    };
    Edge<T> x, y;
    {
        std::unique_ptr<PointwiseStage<T>> stage(new_pointwise<T>(layer));
        lay_out(counting, *stage, x, y);
    }
    Block memory;
    memory.fit(counting.used());
    std::memset(memory.p, 0, static_cast<std::size_t>(memory.bytes));
    Arena arena(memory.p);
    std::unique_ptr<PointwiseStage<T>> stage(new_pointwise<T>(layer));
    lay_out(arena, *stage, x, y);
    View<T>* const given[] = {&x.value[0], &y.cotangent[0], &x.tangent[0], &y.t_cotangent[0]};
    View<T>* const found[] = {&y.value[0], &x.cotangent[0], &y.tangent[0], &x.t_cotangent[0]};
    const std::size_t bytes = static_cast<std::size_t>(n) * sizeof(T);
    for (int i = 0; i < 4; ++i) std::memcpy(given[i]->p, in[i], bytes);
    stage->forward(0);
    stage->backward(0);
    stage->tangent(0);
    stage->tangent_backward(0);
    for (int i = 0; i < 4; ++i) std::memcpy(out[i], found[i]->p, bytes);
}
inline void activation(const Layer& layer, bool doubles, Index n, const void* const in[4], void* const out[4]) {
    doubles ? activation_of<double>(layer, n, in, out) : activation_of<float>(layer, n, in, out);
}

// One block of a product whose operands stay in registers and first-level cache, the fastest of many.
template <class T>
double peak_of() {
    constexpr Index TERMS = 2048;
    constexpr int B = MOST_B, A = most_a(B);
    Block memory;
    memory.fit(static_cast<Index>(sizeof(T)) * (A * B * LANES<T> + 64 * A + B * LANES<T>));
    std::memset(memory.p, 0, static_cast<std::size_t>(memory.bytes));
    T* c = reinterpret_cast<T*>(memory.p);
    T *p = c + A * B * LANES<T>, *q = p + 64 * A;
    double best = 0;
    for (int round = 0; round < 200; ++round) {
        const double start = seconds();
        Product<T> g;
        g.first = {{p, 1, 0, false}, {q, 0, LANES<T>}, TERMS};
        g.c = c;
        g.c_by_a = B * LANES<T>;
        product<T>(A, B, g);
        const double rate = 2.0 * A * B * LANES<T> * TERMS / (seconds() - start);
        best = larger(best, rate);
    }
    return best;
}
inline double peak(bool doubles) { return doubles ? peak_of<double>() : peak_of<float>(); }

}  // namespace maml_fast::MAML_FAST_ISA
