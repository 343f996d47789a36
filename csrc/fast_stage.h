// A layer that adapts, as a tile takes it through the meta-step; and what such layers have in common.
//
// Lam is the adjoint, eta_k the inner rate of step k, g_k the gradient of the support loss by the layer's parameters, H_k
// that loss's Hessian.
#pragma once

#include <vector>

#include "learning.h"
#include "inner_rule.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T>
class FastStage : public LearningStage<T> {
   public:
    using LearningStage<T>::LearningStage;
    using LearningStage<T>::layer;

    virtual void begin_tile() {}
    // Inner step k: theta_{k+1} = theta_k - eta_k g_k, or what the program's rule has for it.
    virtual void descend(Index k) = 0;
    // Lam = the gradient of the query loss at the adapted parameters.
    virtual void begin_adjoint() = 0;
    // Before step k's tangents, where the rule is not plain: their direction -v, and Lam = Lam - decay v (inner_rule.h).
    virtual void turn(Index k) = 0;
    // Lam = Lam - H_k v, from the tangents of step k: they are taken in direction -v, of a plain rule -eta_k Lam, and only
    // added.
    virtual void pull_back(Index k) = 0;
    // Before `turn`: adds dloss/deta_k = -<g_k, Lam>, or -<u_k, Lam>, of weight and bias, to by_weight[k] and by_bias[k].
    virtual void add_rate_gradients(Index k, double* by_weight, double* by_bias) = 0;

    // Row o of the adapted weights: [I] units; and number o of the adapted bias, of the task in lane `unit`.
    virtual void adapted_row(Index o, T* row) = 0;
    virtual T adapted_bias(Index o, Index unit) const = 0;

   protected:
    T weight_rate(Index k) const { return layer.weight_rates.empty() ? T(0) : static_cast<T>(layer.weight_rates[k]); }
    T bias_rate(Index k) const { return layer.bias_rates.empty() ? T(0) : static_cast<T>(layer.bias_rates[k]); }
};

// A parameter that is a vector, each task's own from step 1 on: [O] units at every step, and its adjoint. Its gradients,
// which are sums over a task's rows, come as functions o -> unit.
template <class T, class Lanes>
class FastVector {
   public:
    using Unit = typename Lanes::Unit;
    static constexpr Index U = Lanes::unit;

    // `keeps`: whether each step's u_k is asked for again.
    void allocate(Arena& arena, Index length, const Program& program, bool keeps) {
        O = length;
        S = program.steps;
        own_.resize(S + 1);
        plain_ = program.rule.plain();
        if (!plain_) {
            rule_.allocate(arena, O * U, program.rule, program.gradient);
            taken_.resize(S);
            for (Index k = 0; k < S; ++k) taken_[k] = k && !keeps ? taken_[0] : Numbers<T>{arena.template take<T>(O * U)};
        }
        for (Index k = 1; k <= S; ++k) own_[k] = {arena.template take<T>(O * U)};
        adjoint_ = arena.template take<T>(O * U);
    }

    // Step k's number o; `shared` [O] is where step 0 has it.
    MAML_FAST_INLINE Unit at(Index k, Index o, const T* shared) const {
        return k ? Lanes::read(own_[k].p + o * U) : Lanes::same(shared[o]);
    }
    MAML_FAST_INLINE Unit adjoint(Index o) const { return Lanes::read(adjoint_ + o * U); }
    const T* own(Index k) const { return own_[k].p; }
    // Times `scale(rate)`, the direction of a step's tangents; of a plain rule it is Lam.
    const T* along() const { return plain_ ? adjoint_ : rule_.direction(); }
    T scale(T rate) const { return plain_ ? -rate : T(1); }

    template <class Sum>
    void descend(Index k, T rate, const T* shared, Sum gradient) {
        if (plain_) {
            for (Index o = 0; o < O; ++o) Lanes::write(own_[k + 1].p + o * U, at(k, o, shared) - gradient(o) * rate);
            return;
        }
        for (Index o = 0; o < O; ++o) {
            Lanes::write(own_[k + 1].p + o * U, at(k, o, shared));
            Lanes::write(taken_[k].p + o * U, gradient(o));
        }
        rule_.descend(k, rate, taken_[k].p, own_[k + 1].p);
    }
    void turn(Index k, T rate) { rule_.turn(k == S - 1, rate, adjoint_); }
    template <class Sum>
    void begin_adjoint(Sum gradient) {
        for (Index o = 0; o < O; ++o) Lanes::write(adjoint_ + o * U, gradient(o));
    }
    template <class Sum>
    void pull_back(Sum more) {
        for (Index o = 0; o < O; ++o) Lanes::write(adjoint_ + o * U, adjoint(o) + more(o));
    }
    // <gradient, Lam>, or <u_k, Lam>
    template <class Sum>
    double times_adjoint(Index k, Sum gradient) const {
        double total = 0;
        for (Index o = 0; o < O; ++o)
            total += dot_in_double(plain_ ? gradient(o) : Lanes::read(taken_[k].p + o * U), adjoint(o));
        return total;
    }
    void add_gradient(T* sums) const {
        for (Index o = 0; o < O; ++o) sums[o] += Lanes::over_tasks(adjoint(o));
    }
    T adapted(Index o, Index unit, const T* shared) const { return S ? own_[S].p[o * U + unit] : shared[o]; }

   private:
    static double dot_in_double(T x, T y) { return static_cast<double>(x) * y; }
    static double dot_in_double(Vec<T> x, Vec<T> y) {
        double sum = 0;
        for (int j = 0; j < LANES<T>; ++j) sum += static_cast<double>(x[j]) * y[j];
        return sum;
    }

    Index O = 0, S = 0;
    std::vector<Numbers<T>> own_;  // [S + 1]; the first is the shared one, and not kept here
    T* adjoint_ = nullptr;
    bool plain_ = true;
    RuleState<T> rule_;              // where it is not plain:
    std::vector<Numbers<T>> taken_;  // [S], u_k
};

}  // namespace maml_fast::MAML_FAST_ISA
