// Dense fast weights: each task has its own, see fast_weights.h.
#pragma once

#include "fast_weights.h"

namespace maml_fast::MAML_FAST_ISA {

// Weights [O][I] of units, formed at every step but the first, where all tasks share them.
template <class T, class Lanes>
class DenseLinear final : public FastLinear<T, Lanes> {
    using Base_ = FastLinear<T, Lanes>;
    using Base_::I;
    using Base_::in;
    using Base_::layer;
    using Base_::O;
    using Base_::out;
    using Base_::plain;
    using Base_::S;
    using Base_::U;

   public:
    DenseLinear(const Layer& layer, const Program& program, bool first, Workspace<T>& workspace)
        : Base_(layer, program, first, workspace), keeps_steps(program.gradient) {}

    void allocate(Arena& arena, Index kept) override {
        Base_::allocate(arena, kept);
        weights.resize(S + 1);
        for (Index k = 1; k <= S; ++k) {
            if (k == 1 || keeps_steps)
                weights[k] = {arena.template take<T>(O * stride() * U)};
            else
                weights[k] = weights[1];
        }
        if (layer.weight_by_number) rates_.allocate(arena, S, O, I, stride());
        if (!plain) {
            rule_.allocate(arena, O * stride() * U, this->program.rule, keeps_steps);
            taken_.resize(S);
            for (Index k = 0; k < S; ++k)
                taken_[k] = k && !layer.learns_rates ? taken_[0] : Numbers<T>{arena.template take<T>(O * stride() * U)};
        }
        if (keeps_steps) adjoint = arena.template take<T>(O * stride() * U);
        this->workspace.needs(outer_workspace<T, Lanes>(I, larger(in->columns, in->query_columns)));
    }

    void begin_call() override {
        Base_::begin_call();
        if (layer.weight_by_number) rates_.begin_call(layer.weight_rate_numbers);
    }
    void descend(Index k) override {
        Base_::descend(k);
        T* next = weights[k + 1].p;
        const T *shared = static_cast<const T*>(layer.weight), *from = k ? weights[k].p : shared;
        const T rate = this->weight_rate(k);
        if (!plain) return descend_by_rule(k, from, next);
        if constexpr (Lanes::tasks) {
            const Base<T> base = k ? onto(from) : Base<T>{Base<T>::number, from, I, 1};
            own(outer<T>(out->cotangent[k], in->value[k]), {}, next, -rate, base);
        } else {
            for (Index o = 0; o < O; ++o)
                if (const T* row = from + o * (k ? stride() : I); row != next + o * stride())
                    std::memcpy(next + o * stride(), row, I * sizeof(T));
            outer_by_rows<T>(out->cotangent[k], in->value[k], next, stride(), -rate, true, this->workspace);
        }
    }
    void turn(Index k) override {
        Base_::turn(k);
        if (!plain) rule_.turn(k == S - 1, rate(k), adjoint);
    }
    void begin_adjoint() override {
        Base_::begin_adjoint();
        const View<T>&d = out->cotangent[S], &a = in->value[S];
        if constexpr (Lanes::tasks)
            own(outer<T>(d, a), {}, adjoint, 1, {});
        else
            outer_by_rows<T>(d, a, adjoint, stride(), 1, false, this->workspace);
    }
    void pull_back(Index k) override {
        Base_::pull_back(k);
        const View<T>&t_d = out->t_cotangent[k], &a = in->value[k], &d = out->cotangent[k];
        if constexpr (Lanes::tasks) {
            own(outer<T>(t_d, a), this->first ? Sum<T>{} : outer<T>(d, in->tangent[k]), adjoint, 1, onto(adjoint));
        } else {
            outer_by_rows<T>(t_d, a, adjoint, stride(), 1, true, this->workspace);
            if (!this->first) outer_by_rows<T>(d, in->tangent[k], adjoint, stride(), 1, true, this->workspace);
        }
    }
    void add_weight_gradient(T* weight) override {
        add_up(weight, [this](Index i) { return Lanes::read(adjoint + i); });
    }
    Index sum_length() const override { return O * I; }
    Index pieces() const override { return O; }
    Piece piece(Index o) const override { return {o * I, I, o * I}; }
    void adapted_row(Index o, T* row) override {
        if (S)
            std::memcpy(row, weights[S].p + o * stride() * U, I * U * sizeof(T));
        else
            this->shared_row(o, row);
    }

   protected:
    void times(Index k, const View<T>& x, const View<T>& z, Base<T> base, Gate<T> gate) override {
        this->multiply(weight(k), x, z, base, gate);
    }
    void times_transposed(Index k, const View<T>& d, const View<T>& dx, Gate<T> gate) override {
        this->multiply(transposed(weight(k)), d, dx, {}, gate);
    }
    void times_both(Index k, const View<T>* t, const View<T>& x, T alpha, const View<T>& z, Base<T> base,
                    Gate<T> gate) override {
        both(t ? MAML_FAST_ISA::times<T>(weight(k), *t) : Sum<T>{}, MAML_FAST_ISA::times<T>(own_operand(along()), x), alpha, z,
             base, gate);
    }
    void times_both_transposed(Index k, const View<T>& t, const View<T>& d, T alpha, const View<T>& dx,
                               Gate<T> gate) override {
        both(MAML_FAST_ISA::times<T>(transposed(weight(k)), t), MAML_FAST_ISA::times<T>(transposed(own_operand(along())), d),
             alpha, dx, {}, gate);
    }

    void add_rates_by_number(Index k, T* sums) override {
        const T* taken = taken_[k].p;
        add_up(sums, [this, taken](Index i) { return -Lanes::read(taken + i) * Lanes::read(adjoint + i); });
    }
    // <u_k, Lam>
    double times_adjoint(Index k) override {
        if (plain) return Base_::times_adjoint(k);
        double total = 0;
        for (Index o = 0; o < O; ++o)
            for (Index i = o * stride() * U; i < (o * stride() + I) * U; ++i)
                total += static_cast<double>(taken_[k].p[i]) * static_cast<double>(adjoint[i]);
        return total;
    }

   private:
    // From the weights `from` to `next`, which may be the same.
    void descend_by_rule(Index k, const T* from, T* next) {
        T* const taken = taken_[k].p;
        if constexpr (Lanes::tasks)
            own(outer<T>(out->cotangent[k], in->value[k]), {}, taken, 1, {});
        else
            outer_by_rows<T>(out->cotangent[k], in->value[k], taken, stride(), 1, false, this->workspace);
        if (from != next)
            for (Index o = 0; o < O; ++o)
                for (Index i = 0; i < I * U; ++i)
                    next[o * stride() * U + i] = k ? from[o * stride() * U + i] : from[o * I + i / U];
        rule_.descend(k, rate(k), taken, next);
    }
    Rate<T> rate(Index k) const { return layer.weight_by_number ? rates_(k) : Rate<T>{this->weight_rate(k)}; }
    // sums [O][I] += over tasks, of each unit of the weights, unit(its first number)
    template <class Unit>
    void add_up(T* sums, Unit unit) const {
        if constexpr (Lanes::tasks) {
            constexpr Index L = LANES<T>;
            const Index count = O * I;
            Index i = 0;
            for (; i + L <= count; i += L) {
                Vec<T> v[L];
                MAML_FAST_UNROLL
                for (Index j = 0; j < L; ++j) v[j] = unit((i + j) * L);
                store(sums + i, load(sums + i) + lane_sums<T>(v));
            }
            for (; i < count; ++i) sums[i] += lane_sum<T>(unit(i * L));
        } else {
            for (Index o = 0; o < O; ++o)
                for (Index i = 0; i < I; ++i) sums[o * I + i] += unit(o * stride() + i);
        }
    }
    const T* along() const { return plain ? adjoint : rule_.direction(); }
    // Units from one row of weights to the next.
    Index stride() const { return Lanes::tasks ? I : padded_features<T>(I); }
    Base<T> onto(const T* weights) const { return {Base<T>::vector, weights, stride() * U, LANES<T>}; }
    Operand<T> own_operand(const T* weights) const { return {weights, stride() * U, U, Lanes::tasks}; }
    Operand<T> weight(Index k) const { return k ? own_operand(weights[k].p) : this->shared_weight(); }
    static Operand<T> transposed(Operand<T> w) { return {w.p, w.by_k, w.by_a, w.vectors}; }

    // z = gate(weight + alpha adjoint + base), in one product if both are of one kind.
    static void both(Sum<T> weight, Sum<T> adjoint, T alpha, const View<T>& z, Base<T> base, Gate<T> gate) {
        Product<T> p = into(z, base, gate);
        p.first = adjoint;
        p.alpha = alpha;
        if (weight.terms && weight.left.vectors != adjoint.left.vectors) {
            Product<T> q = into(z, base);
            q.first = weight;
            product<T>(z.features, z.columns, q);
            p.base = MAML_FAST_ISA::onto(z);
        } else {
            p.second = weight;
        }
        product<T>(z.features, z.columns, p);
    }
    // Weights of each task's own: c = alpha * first + second + base.
    void own(Sum<T> first, Sum<T> second, T* c, T alpha, Base<T> base) const {
        Product<T> p;
        p.first = first;
        p.alpha = alpha;
        p.second = second;
        p.base = base;
        p.c = c;
        p.c_by_a = stride() * U;
        product<T>(O, I, p);
    }

    const bool keeps_steps;
    std::vector<Numbers<T>> weights;  // [S + 1]; the first is the shared one, and not kept here
    T* adjoint = nullptr;
    RatesByNumber<T, Lanes> rates_;
    RuleState<T> rule_;              // where it is not plain:
    std::vector<Numbers<T>> taken_;  // [S], u_k
};

}  // namespace maml_fast::MAML_FAST_ISA
