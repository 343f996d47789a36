// Factored fast weights: rows of the inner steps instead of weights, see fast_weights.h.
#pragma once

#include "fast_weights.h"

namespace maml_fast::MAML_FAST_ISA {

// Rows instead of weights. The tile lays the edges out so that each kind of row is one run over the steps:
//     values A_0 .. A_{S-1}, A_q   tangents t_A   cotangents D_0 .. D_{S-1}   t_cotangents t_D, and D_q behind them
template <class T, class Lanes>
class FactoredLinear final : public FastLinear<T, Lanes> {
    using Base_ = FastLinear<T, Lanes>;
    using Base_::I;
    using Base_::in;
    using Base_::O;
    using Base_::out;
    using Base_::S;

   public:
    using Base_::Base_;

    void allocate(Arena& arena, Index kept) override {
        Base_::allocate(arena, kept);
        const Index history = S * in->columns + in->query_columns;
        this->workspace.needs(Lanes::units(history) * spread<T>(larger(in->columns, in->query_columns)));
        this->workspace.needs(sum_workspace<T>(I, history));
    }
    void begin_tile() override { since = S; }
    void begin_adjoint() override {
        Base_::begin_adjoint();
        since = S;
    }
    void pull_back(Index k) override {
        Base_::pull_back(k);
        since = k;
    }
    void add_weight_gradient(T* weight) override {
        add_runs_up<T>(adjoint_recent(1), adjoint_earlier(1), weight, this->workspace);
    }
    void adapted_row(Index o, T* row) override {
        this->shared_row(o, row);
        for (Index k = 0; k < S; ++k)
            add_outer_row<T, Lanes>({out->cotangent[k], in->value[k], -this->weight_rate(k)}, o, row);
    }

   protected:
    void times(Index k, const View<T>& x, const View<T>& z, Base<T> base, Gate<T> gate) override {
        begin_terms();
        add_moved(k, x, false);
        finish(this->shared_weight(), x, z, base, gate);
    }
    void times_transposed(Index k, const View<T>& d, const View<T>& dx, Gate<T> gate) override {
        begin_terms();
        add_moved(k, d, true);
        finish(this->shared_transposed(), d, dx, {}, gate);
    }
    void times_both(Index k, const View<T>* t, const View<T>& x, T alpha, const View<T>& z, Base<T> base,
                    Gate<T> gate) override {
        begin_terms();
        if (t) add_moved(k, *t, false);
        add_adjoint(x, alpha, false);
        if (t) return finish(this->shared_weight(), *t, z, base, gate);
        for (std::size_t i = 0; i < terms.size(); ++i)
            add_term(i, z, i ? MAML_FAST_ISA::onto(z) : base, gate);
    }
    void times_both_transposed(Index k, const View<T>& t, const View<T>& d, T alpha, const View<T>& dx,
                               Gate<T> gate) override {
        begin_terms();
        add_moved(k, t, true);
        add_adjoint(d, alpha, true);
        finish(this->shared_transposed(), t, dx, {}, gate);
    }

   private:
    // A run, and what it is multiplied with.
    struct Term {
        Run<T> run;
        View<T> x;
    };

    void begin_terms() { terms.clear(); }
    // W_k - W, a term for each run of steps that have one rate.
    void add_moved(Index k, const View<T>& x, bool transposed) {
        for (Index j = 0; j < k;) {
            Index end = j + 1;
            while (end < k && this->weight_rate(end) == this->weight_rate(j)) ++end;
            const Run<T> run{joined(out->cotangent, j, end), joined(in->value, j, end), -this->weight_rate(j)};
            terms.push_back({transposed ? run.transposed() : run, x});
            j = end;
        }
    }
    void add_adjoint(const View<T>& x, T alpha, bool transposed) {
        for (const Run<T>& run : {adjoint_recent(alpha), adjoint_earlier(alpha)})
            if (run.l.columns) terms.push_back({transposed ? run.transposed() : run, x});
    }
    // Lam is the sum of two runs: (t_D, A) of the steps gone back through and, behind them, the query's D and A;
    Run<T> adjoint_recent(T alpha) const {
        const Index columns = (S - since) * in->columns + in->query_columns;
        View<T> l = since < S ? out->t_cotangent[since] : out->cotangent[S], r = in->value[since];
        l.columns = r.columns = columns;
        return {l, r, alpha};
    }
    // and (D, t_A) of those steps.
    Run<T> adjoint_earlier(T alpha) const {
        if (since == S) return {};
        return {joined(out->cotangent, since, S), joined(in->tangent, since, S), alpha};
    }
    static View<T> joined(const std::vector<View<T>>& steps, Index begin, Index end) {
        View<T> view = steps[begin];
        view.columns *= end - begin;
        return view;
    }

    // z = gate(shared x + base + all terms)
    void finish(Operand<T> shared, const View<T>& x, const View<T>& z, Base<T> base, Gate<T> gate) const {
        this->multiply(shared, x, z, base, terms.empty() ? gate : Gate<T>{});
        for (std::size_t i = 0; i < terms.size(); ++i) add_term(i, z, MAML_FAST_ISA::onto(z), gate);
    }
    void add_term(std::size_t i, const View<T>& z, Base<T> base, Gate<T> gate) const {
        add_run<T, Lanes>(terms[i].run, terms[i].x, z, this->workspace, i + 1 == terms.size() ? gate : Gate<T>{}, base);
    }

    std::vector<Term> terms;
    Index since = 0;  // the first step whose tangents are part of the adjoint
};

// The first layer that adapts, factored: its input is the data at every step. So W X and the Gram blocks of the data are
// made once, all steps' updates add up beside the one X, and so do all steps' t_D:
//     W_k = W + moved_k X^T, moved_k = -sum eta_j D_j         Lam = D_q X_q^T + (sum t_D) X^T
template <class T, class Lanes>
class FactoredInput final : public FastLinear<T, Lanes> {
    using Base_ = FastLinear<T, Lanes>;
    using Base_::I;
    using Base_::in;
    using Base_::O;
    using Base_::out;
    using Base_::S;
    using Base_::U;

   public:
    using Base_::Base_;

    void allocate(Arena& arena, Index kept) override {
        Base_::allocate(arena, kept);
        const Index columns = in->columns, query_columns = in->query_columns;
        moved = arena.template view<T>(O, columns);
        t_sum = arena.template view<T>(O, columns);
        if (S > 1) base = arena.template view<T>(O, columns);
        support_support = arena.template view<T>(Lanes::units(columns), columns);
        support_query = arena.template view<T>(Lanes::units(columns), query_columns);
        query_support = arena.template view<T>(Lanes::units(query_columns), columns);
        this->workspace.needs(sum_workspace<T>(I, larger(columns, query_columns)));
    }
    void begin_tile() override {
        t_sum.columns = 0;
        if (!S) return;
        const View<T>&x = in->value[0], &q = in->value[S];
        gram<T, Lanes>(x, x, support_support, 1);
        gram<T, Lanes>(x, q, support_query, 1);
        gram<T, Lanes>(q, x, query_support, 1);
        if (S > 1) this->multiply(this->shared_weight(), x, base, {}, {});
    }
    void descend(Index k) override {
        Base_::descend(k);
        add_scaled(out->cotangent[k], moved, -this->weight_rate(k), k > 0);
    }
    void pull_back(Index k) override {
        Base_::pull_back(k);
        add_scaled(out->t_cotangent[k], t_sum, 1, t_sum.columns > 0);
        t_sum.columns = in->columns;
    }
    void add_weight_gradient(T* weight) override {
        Run<T> summed;
        if (t_sum.columns) summed = {t_sum, in->value[0], 1};
        add_runs_up<T>({out->cotangent[S], in->value[S], 1}, summed, weight, this->workspace);
    }
    void adapted_row(Index o, T* row) override {
        this->shared_row(o, row);
        if (S) add_outer_row<T, Lanes>({moved, in->value[0], 1}, o, row);
    }

   protected:
    void times(Index k, const View<T>& x, const View<T>& z, Base<T> bias, Gate<T> gate) override {
        const Gate<T> first_gate = k ? Gate<T>{} : gate;
        if (k < S && S > 1)
            add_to_rows(base, bias, z, first_gate);
        else
            this->multiply(this->shared_weight(), x, z, bias, first_gate);
        if (k) add_applied(moved, k < S ? support_support : support_query, 1, z, MAML_FAST_ISA::onto(z), gate);
    }
    void times_both(Index, const View<T>*, const View<T>&, T alpha, const View<T>& z, Base<T> bias, Gate<T> gate) override {
        const bool more = t_sum.columns > 0;
        add_applied(out->cotangent[S], query_support, alpha, z, bias, more ? Gate<T>{} : gate);
        if (more) add_applied(t_sum, support_support, alpha, z, MAML_FAST_ISA::onto(z), gate);
    }
    // Nothing adapts below.
    void times_transposed(Index, const View<T>&, const View<T>&, Gate<T>) override {}
    void times_both_transposed(Index, const View<T>&, const View<T>&, T, const View<T>&, Gate<T>) override {}

   private:
    static void add_applied(const View<T>& l, const View<T>& g, T alpha, const View<T>& z, Base<T> base, Gate<T> gate) {
        Product<T> p = into(z, base, gate);
        p.first = applied<T, Lanes>(l, g);
        p.alpha = alpha;
        product<T>(z.features, z.columns, p);
    }
    static void add_scaled(const View<T>& from, const View<T>& to, T scale, bool add) {
        for (Index o = 0; o < from.features; ++o)
            for (Index n = 0; n < from.numbers(); n += LANES<T>) {
                T* at = to.p + o * to.by_feature + n;
                const Vec<T> v = load(from.p + o * from.by_feature + n) * scale;
                store(at, add ? load(at) + v : v);
            }
    }
    static void add_to_rows(const View<T>& x, const Base<T>& bias, const View<T>& z, Gate<T> gate) {
        for (Index o = 0; o < z.features; ++o) {
            const T* p = bias.p + o * bias.by_a;
            const Vec<T> b = bias.kind == Base<T>::nothing ? Vec<T>{} : bias.kind == Base<T>::vector ? load(p) : all(*p);
            for (Index n = 0; n < z.columns; ++n) {
                const Index at = n * LANES<T>;
                store(z.p + o * z.by_feature + at, gate(load(x.p + o * x.by_feature + at) + b, o, n));
            }
        }
    }

    View<T> moved, t_sum, base;
    View<T> support_support, support_query, query_support;  // Gram blocks [rows of the first][rows of the second]
};

}  // namespace maml_fast::MAML_FAST_ISA
