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

    // Once a call: rates may have changed, and steps' own values.
    virtual void begin_call() {}
    virtual void begin_tile() {}
    // Inner step k: theta_{k+1} = theta_k - eta_k g_k, or what the program's rule has for it.
    virtual void descend(Index k) = 0;
    // Lam = the gradient of the query loss at the adapted parameters.
    virtual void begin_adjoint() = 0;
    // Before step k's tangents, where `Program::turns`: their direction -v, and Lam = Lam - decay v (inner_rule.h).
    virtual void turn(Index k) = 0;
    // Lam = Lam - H_k v, from the tangents of step k: they are taken in direction -v, of a plain rule -eta_k Lam, and only
    // added.
    virtual void pull_back(Index k) = 0;
    // Before `turn`: adds dloss/deta_k = -<g_k, Lam>, or -<u_k, Lam>, of weight and bias; by number -u_k Lam.
    virtual void add_rate_gradients(Index k, const RateSums<T>& sums) = 0;

    // Row o of the adapted weights: [I] units; and number o of the adapted bias, of the task in lane `unit`.
    virtual void adapted_row(Index o, T* row) = 0;
    virtual T adapted_bias(Index o, Index unit) const = 0;

   protected:
    T weight_rate(Index k) const { return layer.weight_rates.empty() ? T(0) : static_cast<T>(layer.weight_rates[k]); }
    T bias_rate(Index k) const { return layer.bias_rates.empty() ? T(0) : static_cast<T>(layer.bias_rates[k]); }
};

// Rates of a parameter's single numbers, in the layer's own order: [rows][stride] units for the parameter's [rows][length].
template <class T, class Lanes>
class RatesByNumber {
   public:
    static constexpr Index U = Lanes::unit;

    void allocate(Arena& arena, Index steps, Index rows, Index length, Index stride) {
        steps_ = steps;
        rows_ = rows;
        length_ = length;
        stride_ = U > 1 ? length : stride;
        if (U == 1) own_ = arena.template take<T>(steps * rows * stride);
    }
    void begin_call(const void* from) {
        shared_ = static_cast<const T*>(from);
        if (U > 1) return;  // a number serves a whole vector, where it lies
        for (Index row = 0; row < steps_ * rows_; ++row)
            for (Index i = 0; i < stride_; ++i) own_[row * stride_ + i] = i < length_ ? shared_[row * length_ + i] : T(0);
    }
    Rate<T> operator()(Index k) const { return {0, (U > 1 ? shared_ : own_) + k * rows_ * stride_, U}; }

   private:
    Index steps_ = 0, rows_ = 0, length_ = 0, stride_ = 0;
    const T* shared_ = nullptr;
    T* own_ = nullptr;
};

// What a vector is beside plain: whether each number has rates of its own, or each step a value.
struct VectorKind {
    bool by_number = false, by_step = false;
};

// A parameter that is a vector, each task's own from step 1 on: [O] units at every step, and its adjoint. Its gradients,
// which are sums over a task's rows, come as functions o -> unit. One with values for each step does not move, and has an
// adjoint for each.
template <class T, class Lanes>
class FastVector {
   public:
    using Unit = typename Lanes::Unit;
    static constexpr Index U = Lanes::unit;

    // `keeps`: whether each step's u_k is asked for again.
    void allocate(Arena& arena, Index length, const Program& program, bool keeps, VectorKind kind) {
        O = length;
        S = program.steps;
        own_.resize(S + 1);
        kind_ = kind;
        if (kind.by_number) rates_.allocate(arena, S, 1, O, ceil_div(O, LANES<T>) * LANES<T>);
        plain_ = kind.by_step || (program.rule.plain() && !kind.by_number);
        if (!plain_) {
            rule_.allocate(arena, O * U, program.rule, program.gradient);
            taken_.resize(S);
            for (Index k = 0; k < S; ++k) taken_[k] = k && !keeps ? taken_[0] : Numbers<T>{arena.template take<T>(O * U)};
        }
        for (Index k = 1; k <= S; ++k) own_[k] = {arena.template take<T>(O * U)};
        adjoint_ = arena.template take<T>(O * U);
        if (kind.by_step) of_steps_ = arena.template take<T>(S * O * U);
    }

    // `values`: the parameter, as the program has it.
    void begin_call(const void* rates, const void* values) {
        if (kind_.by_number) rates_.begin_call(rates);
        if (!kind_.by_step) return;
        for (Index k = 1; k <= S; ++k)
            for (Index o = 0; o < O; ++o) Lanes::write(own_[k].p + o * U, Lanes::same(static_cast<const T*>(values)[k * O + o]));
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
        if (kind_.by_step) return;
        if (plain_) {
            for (Index o = 0; o < O; ++o) Lanes::write(own_[k + 1].p + o * U, at(k, o, shared) - gradient(o) * rate);
            return;
        }
        for (Index o = 0; o < O; ++o) {
            Lanes::write(own_[k + 1].p + o * U, at(k, o, shared));
            Lanes::write(taken_[k].p + o * U, gradient(o));
        }
        rule_.descend(k, rate_of(k, rate), taken_[k].p, own_[k + 1].p);
    }
    void turn(Index k, T rate) {
        if (!plain_) rule_.turn(k == S - 1, rate_of(k, rate), adjoint_);
    }
    template <class Sum>
    void begin_adjoint(Sum gradient) {
        for (Index o = 0; o < O; ++o) Lanes::write(adjoint_ + o * U, gradient(o));
        if (kind_.by_step) std::memset(of_steps_, 0, static_cast<std::size_t>(S * O * U) * sizeof(T));
    }
    template <class Sum>
    void pull_back(Index k, Sum more) {
        if (kind_.by_step)
            for (Index o = 0; o < O; ++o) Lanes::write(of_steps_ + (k * O + o) * U, more(o));
        else
            for (Index o = 0; o < O; ++o) Lanes::write(adjoint_ + o * U, adjoint(o) + more(o));
    }
    // Adds -<gradient, Lam>, or -<u_k, Lam>, to `sum`; of rates by number -u_k Lam to `sums` [O].
    template <class Sum>
    void add_rate_gradients(Index k, Sum gradient, double* sum, T* sums) const {
        if (kind_.by_number)
            for (Index o = 0; o < O; ++o) sums[o] -= Lanes::over_tasks(Lanes::read(taken_[k].p + o * U) * adjoint(o));
        else
            *sum -= times_adjoint(k, gradient);
    }
    template <class Sum>
    double times_adjoint(Index k, Sum gradient) const {
        double total = 0;
        for (Index o = 0; o < O; ++o)
            total += static_cast<double>(Lanes::over_tasks((plain_ ? gradient(o) : Lanes::read(taken_[k].p + o * U)) * adjoint(o)));
        return total;
    }
    void add_gradient(T* sums) const {
        if (kind_.by_step) {
            for (Index i = 0; i < S * O; ++i) sums[i] += Lanes::over_tasks(Lanes::read(of_steps_ + i * U));
            sums += S * O;
        }
        for (Index o = 0; o < O; ++o) sums[o] += Lanes::over_tasks(adjoint(o));
    }
    T adapted(Index o, Index unit, const T* shared) const { return S ? own_[S].p[o * U + unit] : shared[o]; }

   private:
    Rate<T> rate_of(Index k, T rate) const { return kind_.by_number ? rates_(k) : Rate<T>{rate}; }
    Index O = 0, S = 0;
    std::vector<Numbers<T>> own_;  // [S + 1]; the first is the shared one, and not kept here
    T* adjoint_ = nullptr;
    T* of_steps_ = nullptr;  // [S] adjoints, where each step has its own value; the query's is adjoint_
    bool plain_ = true;
    VectorKind kind_;
    RatesByNumber<T, Lanes> rates_;
    RuleState<T> rule_;              // where it is not plain:
    std::vector<Numbers<T>> taken_;  // [S], u_k
};

}  // namespace maml_fast::MAML_FAST_ISA
