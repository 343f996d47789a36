// One parameter of a layer and what becomes of it in a task: fast values, gradients, adjoint. The numbers are in the layer's
// own order, whole vectors, 0 where no number of the parameter is.
//
//     theta_{k+1} = theta_k - eta_k g_k       lam = g_q, then lam = lam + H_k (-eta_k lam)      dloss/deta_k = -<g_k, lam>
// of the plain rule; of others see inner_rule.h.
#pragma once

#include <vector>

#include "inner_rule.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T>
class FastParameter {
   public:
    // `wanted`: there is such a parameter. `adapts`: it has rates; then memory for S steps. `by_number`: and one for each number.
    // `by_step`: it does not move, and has values for each step; its adjoint is taken away step by step. `still`: it lies below
    // what adapts, has two passes, support and query, and a gradient of each.
    void allocate(Arena& arena, Index numbers, bool wanted, bool adapts, bool learns_rates, bool by_number, bool by_step,
                  bool still, const Program& program) {
        const bool gradient = program.gradient, second_order = gradient && !program.first_order;
        numbers_ = numbers;
        adapts_ = wanted && adapts;
        S = program.steps;
        by_number_ = adapts_ && by_number;
        by_step_ = adapts_ && by_step;
        plain_ = by_step_ || (program.rule.plain() && !by_number_);
        shared_ = arena.template take<T>(numbers);
        values_.assign(S + 1, {shared_});
        gradients_.assign(S + 1, {nullptr});
        if (!adapts_) return;
        if (still) {
            values_.assign(2, {shared_});
            gradients_.clear();
            for (Index pass = 0; pass < 2; ++pass) gradients_.push_back({arena.template take<T>(numbers)});
            return;
        }
        if (by_number_) rates_ = arena.template take<T>(S * numbers);
        const bool keeps_values = by_step_ || (gradient && second_order);
        for (Index k = 1; k <= S; ++k) {
            const bool own = k == 1 || keeps_values;
            values_[k] = own ? Numbers<T>{arena.template take<T>(numbers)} : values_[1];
        }
        for (Index k = 0; k < S; ++k) {
            const bool own = k == 0 || learns_rates;
            gradients_[k] = own ? Numbers<T>{arena.template take<T>(numbers)} : gradients_[0];
        }
        if (gradient) gradients_[S] = {arena.template take<T>(numbers)};
        if (!plain_) rule_.allocate(arena, numbers, program.rule, gradient);
        if (plain_ && second_order && S) direction_ = arena.template take<T>(numbers);
    }

    bool adapts() const { return adapts_; }
    bool by_number() const { return by_number_; }
    bool by_step() const { return by_step_; }
    Index numbers() const { return numbers_; }
    T* rates(Index k) const { return rates_ + k * numbers_; }  // where each number has its own
    T* shared() const { return shared_; }
    T* of_step(Index k) const { return values_[k].p; }  // to be written where each step has its own
    const T* value(Index k) const { return adapts_ ? values_[k].p : shared_; }
    // Of the support loss at step k, to be written by the layer's `backward`, and u_k since `descend`; at k = S the adjoint.
    T* gradient(Index k) const { return gradients_[k].p; }
    T* adjoint() const { return gradients_.back().p; }
    // -eta_k lam, since `aim`, or -v, since `turn`; null: 0
    const T* direction() const { return plain_ ? direction_ : rule_.direction(); }

    void descend(Index k, T rate) {
        if (!adapts_ || by_step_) return;
        const T *from = values_[k].p, *g = gradients_[k].p;
        T* to = values_[k + 1].p;
        if (!plain_) {
            if (to != from) std::memcpy(to, from, static_cast<std::size_t>(numbers_) * sizeof(T));
            return rule_.descend(k, rate_of(k, rate), gradients_[k].p, to);
        }
        for (Index i = 0; i < numbers_; i += LANES<T>) store(to + i, load(from + i) - load(g + i) * rate);
    }
    // Where that is not plain, before the tangents of a step.
    void turn(Index k, T rate) {
        if (adapts_ && !plain_) rule_.turn(k == S - 1, rate_of(k, rate), adjoint());
    }
    void aim(T rate) {
        if (!adapts_ || !plain_) return;
        for (Index i = 0; i < numbers_; i += LANES<T>) store(direction_ + i, load(adjoint() + i) * -rate);
    }
    double rate_gradient(Index k) const {
        if (!adapts_) return 0;
        double total = 0;
        for (Index i = 0; i < numbers_; i += 16 * LANES<T>) {  // a few numbers at a time, then in double
            Vec<T> sum{};
            for (Index j = i; j < smaller(i + 16 * LANES<T>, numbers_); j += LANES<T>)
                sum += load(gradients_[k].p + j) * load(adjoint() + j);
            for (int lane = 0; lane < LANES<T>; ++lane) total += sum[lane];
        }
        return -total;
    }
    // Of rates by number, -u_k lam.
    void add_rates_by_number(Index k, T* sums) const {
        const T* u = gradients_[k].p;
        for (Index i = 0; i < numbers_; i += LANES<T>) store(sums + i, load(sums + i) - load(u + i) * load(adjoint() + i));
    }
    // Where it is still: the support's gradient to the query's.
    void join_passes() const {
        if (!adapts_) return;
        const T* g = gradients_[0].p;
        for (Index i = 0; i < numbers_; i += LANES<T>) store(adjoint() + i, load(adjoint() + i) + load(g + i));
    }
    // Where each step has its own value: adds the adjoint by that to the sums, and begins anew.
    void take_adjoint(T* sums) const {
        add_adjoint_to(sums);
        std::memset(adjoint(), 0, static_cast<std::size_t>(numbers_) * sizeof(T));
    }
    void add_adjoint_to(T* sums) const {
        if (!adapts_) return;
        for (Index i = 0; i < numbers_; i += LANES<T>) store(sums + i, load(sums + i) + load(adjoint() + i));
    }

   private:
    Rate<T> rate_of(Index k, T rate) const { return by_number_ ? Rate<T>{0, rates(k)} : Rate<T>{rate}; }

    Index numbers_ = 0, S = 0;
    bool adapts_ = false, plain_ = true, by_number_ = false, by_step_ = false;
    RuleState<T> rule_;
    T *shared_ = nullptr, *direction_ = nullptr, *rates_ = nullptr;
    std::vector<Numbers<T>> values_, gradients_;  // [S + 1]
};

}  // namespace maml_fast::MAML_FAST_ISA
