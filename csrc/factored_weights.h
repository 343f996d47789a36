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
    using Base_::plain;
    using Base_::program;
    using Base_::S;

   public:
    using Base_::Base_;

    void allocate(Arena& arena, Index kept) override {
        Base_::allocate(arena, kept);
        if (!plain) coefficients.allocate(arena, S);
        const Index history = S * in->columns + in->query_columns;
        this->workspace.needs(Lanes::units(history) * spread<T>(larger(in->columns, in->query_columns)));
        this->workspace.needs(sum_workspace<T>(I, history));
    }
    void begin_tile() override {
        since = S;
        if (!plain) coefficients.fill(program.rule, Base_::layer.weight_rates);
    }
    void begin_adjoint() override {
        Base_::begin_adjoint();
        since = S;
    }
    void pull_back(Index k) override {
        Base_::pull_back(k);
        since = k;
    }
    void add_weight_gradient(T* weight) override {
        if (program.rule.weight_decay == 0)
            return add_runs_up<T>(adjoint_recent(1), adjoint_earlier(1), weight, this->workspace);
        for (Index s = since; s <= S; ++s) {
            const T kept = static_cast<T>(coefficients.kept(s));
            add_runs_up<T>(gained(s, kept), gained_earlier(s, kept), weight, this->workspace);
        }
    }
    void adapted_row(Index o, T* row) override {
        this->shared_row(o, row);
        for (Index i = 0; i < I * Base_::U; ++i) row[i] *= kept(S);
        for (Index k = 0; k < S; ++k)
            add_outer_row<T, Lanes>({out->cotangent[k], in->value[k], moved_by(S, k)}, o, row);
    }

   protected:
    void times(Index k, const View<T>& x, const View<T>& z, Base<T> base, Gate<T> gate) override {
        begin_terms();
        add_moved(k, x, false);
        finish(k, this->shared_weight(), x, z, base, gate);
    }
    void times_transposed(Index k, const View<T>& d, const View<T>& dx, Gate<T> gate) override {
        begin_terms();
        add_moved(k, d, true);
        finish(k, this->shared_transposed(), d, dx, {}, gate);
    }
    void times_both(Index k, const View<T>* t, const View<T>& x, T alpha, const View<T>& z, Base<T> base,
                    Gate<T> gate) override {
        begin_terms();
        if (t) add_moved(k, *t, false);
        add_adjoint(k, x, alpha, false);
        if (t) return finish(k, this->shared_weight(), *t, z, base, gate);
        for (std::size_t i = 0; i < terms.size(); ++i)
            add_term(i, z, i ? MAML_FAST_ISA::onto(z) : base, gate);
    }
    void times_both_transposed(Index k, const View<T>& t, const View<T>& d, T alpha, const View<T>& dx,
                               Gate<T> gate) override {
        begin_terms();
        add_moved(k, t, true);
        add_adjoint(k, d, alpha, true);
        finish(k, this->shared_transposed(), t, dx, {}, gate);
    }

   private:
    // A run, and what it is multiplied with.
    struct Term {
        Run<T> run;
        View<T> x;
    };

    void begin_terms() { terms.clear(); }
    // W_k = kept W + sum_j moved_by(k, j) D_j A_j^T
    T kept(Index k) const { return plain ? T(1) : static_cast<T>(coefficients.kept(k)); }
    T moved_by(Index k, Index j) const { return plain ? -this->weight_rate(j) : static_cast<T>(-coefficients.moved(k, j)); }
    // W_k - kept W, a term for each run of steps that count alike.
    void add_moved(Index k, const View<T>& x, bool transposed) {
        for (Index j = 0; j < k;) {
            Index end = j + 1;
            while (end < k && moved_by(k, end) == moved_by(k, j)) ++end;
            const Run<T> run{joined(out->cotangent, j, end), joined(in->value, j, end), moved_by(k, j)};
            terms.push_back({transposed ? run.transposed() : run, x});
            j = end;
        }
    }
    void add_adjoint(Index k, const View<T>& x, T alpha, bool transposed) {
        const auto add = [&](const Run<T>& run) {
            if (run.l.columns) terms.push_back({transposed ? run.transposed() : run, x});
        };
        if (plain) {
            add(adjoint_recent(alpha));
            add(adjoint_earlier(alpha));
            return;
        }
        for (Index s = since; s <= S; ++s) {
            add(gained(s, moved_by(s, k)));
            add(gained_earlier(s, moved_by(s, k)));
        }
    }
    // What Lam gained of step s: (t_D, A), or the query's D and A; and (D, t_A).
    Run<T> gained(Index s, T alpha) const {
        return {s < S ? out->t_cotangent[s] : out->cotangent[S], in->value[s], alpha};
    }
    Run<T> gained_earlier(Index s, T alpha) const {
        if (s == S) return {};
        return {out->cotangent[s], in->tangent[s], alpha};
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

    // z = gate(kept shared x + base + all terms)
    void finish(Index k, Operand<T> shared, const View<T>& x, const View<T>& z, Base<T> base, Gate<T> gate) const {
        this->multiply(shared, x, z, base, terms.empty() ? gate : Gate<T>{}, kept(k));
        for (std::size_t i = 0; i < terms.size(); ++i) add_term(i, z, MAML_FAST_ISA::onto(z), gate);
    }
    void add_term(std::size_t i, const View<T>& z, Base<T> base, Gate<T> gate) const {
        add_run<T, Lanes>(terms[i].run, terms[i].x, z, this->workspace, i + 1 == terms.size() ? gate : Gate<T>{}, base);
    }

    std::vector<Term> terms;
    Index since = 0;  // the first step whose tangents are part of the adjoint
    RuleCoefficients coefficients;  // of the inner rule, where it is not plain
};

}  // namespace maml_fast::MAML_FAST_ISA
