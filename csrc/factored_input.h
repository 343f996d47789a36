// Factored fast weights of the first layer that adapts, see fast_weights.h.
#pragma once

#include "fast_weights.h"

namespace maml_fast::MAML_FAST_ISA {

// The first layer that adapts, factored: its input is the data at every step. So W X and the Gram blocks of the data are
// made once, all steps' updates add up beside the one X, and so do all steps' t_D:
//     W_k = W + moved_k X^T, moved_k = -sum eta_j D_j         Lam = D_q X_q^T + (sum t_D) X^T
// A step's moved_k is kept where gradients by the data are wanted, for W_k^T t_D. A rule that is not plain treats the numbers
// beside X and X_q as it would those of the weights, and takes from W by its coefficients.
template <class T, class Lanes>
class FactoredInput final : public FastLinear<T, Lanes> {
    using Base_ = FastLinear<T, Lanes>;
    using Base_::goes_below;
    using Base_::I;
    using Base_::in;
    using Base_::O;
    using Base_::out;
    using Base_::plain;
    using Base_::program;
    using Base_::S;
    using Base_::U;

   public:
    using Base_::Base_;

    void allocate(Arena& arena, Index kept) override {
        Base_::allocate(arena, kept);
        const Index columns = in->columns, query_columns = in->query_columns;
        moved.resize(S + 1);
        for (Index k = 1; k <= S; ++k) moved[k] = k == 1 || goes_below ? arena.template view<T>(O, columns) : moved[1];
        t_sum = arena.template view<T>(O, columns);
        if (!plain) allocate_rule(arena);
        if (S > 1) base = arena.template view<T>(O, columns);
        support_support = arena.template view<T>(Lanes::units(columns), columns);
        support_query = arena.template view<T>(Lanes::units(columns), query_columns);
        query_support = arena.template view<T>(Lanes::units(query_columns), columns);
        this->workspace.needs(sum_workspace<T>(I, larger(columns, query_columns)));
        const Index most = larger(columns, query_columns);
        if (goes_below) this->workspace.needs(Lanes::units(most) * spread<T>(most));
    }
    void begin_tile() override {
        t_sum.columns = 0;
        if (!plain) coefficients.fill(program.rule, Base_::layer.weight_rates);
        if (!S) return;
        const View<T>&x = in->value[0], &q = in->value[S];
        gram<T, Lanes>(x, x, support_support, 1);
        gram<T, Lanes>(x, q, support_query, 1);
        gram<T, Lanes>(q, x, query_support, 1);
        if (S > 1) this->multiply(this->shared_weight(), x, base, {}, {});
    }
    void descend(Index k) override {
        Base_::descend(k);
        if (!plain) {
            if (k == 0) clear(moved[1]);
            if (k && goes_below) add_scaled(moved[k], moved[k + 1], 1, false);
            add_scaled(out->cotangent[k], taken, 1, false);
            return support_rule.descend(k, Rate<T>{this->weight_rate(k)}, taken.p, moved[k + 1].p);
        }
        if (k && goes_below) add_scaled(moved[k], moved[k + 1], 1, false);
        add_scaled(out->cotangent[k], moved[k + 1], -this->weight_rate(k), k > 0);
    }
    void begin_adjoint() override {
        Base_::begin_adjoint();
        if (plain) return;
        add_scaled(out->cotangent[S], lam_query, 1, false);
        if (!S) return;
        t_sum.columns = in->columns;
        clear(t_sum);
    }
    void turn(Index k) override {
        Base_::turn(k);
        if (plain) return;
        const Rate<T> rate{this->weight_rate(k)};
        support_rule.turn(k == S - 1, rate, t_sum.p);
        query_rule.turn(k == S - 1, rate, lam_query.p);
    }
    void pull_back(Index k) override {
        Base_::pull_back(k);
        add_scaled(out->t_cotangent[k], t_sum, 1, t_sum.columns > 0);
        t_sum.columns = in->columns;
    }
    void add_weight_gradient(T* weight) override {
        Run<T> summed;
        if (t_sum.columns) summed = {t_sum, in->value[0], 1};
        add_runs_up<T>({plain ? out->cotangent[S] : lam_query, in->value[S], 1}, summed, weight, this->workspace);
    }
    void adapted_row(Index o, T* row) override {
        this->shared_row(o, row);
        for (Index i = 0; i < I * U; ++i) row[i] *= kept(S);
        if (S) add_outer_row<T, Lanes>({moved[S], in->value[0], 1}, o, row);
    }

   protected:
    void times(Index k, const View<T>& x, const View<T>& z, Base<T> bias, Gate<T> gate) override {
        const Gate<T> first_gate = k ? Gate<T>{} : gate;
        if (k < S && S > 1)
            add_to_rows(base, kept(k), bias, z, first_gate);
        else
            this->multiply(this->shared_weight(), x, z, bias, first_gate, kept(k));
        if (k) add_applied(moved[k], k < S ? support_support : support_query, 1, z, MAML_FAST_ISA::onto(z), gate);
    }
    void times_both(Index, const View<T>*, const View<T>&, T alpha, const View<T>& z, Base<T> bias, Gate<T> gate) override {
        const bool more = t_sum.columns > 0;
        add_applied(along_query(), query_support, alpha, z, bias, more ? Gate<T>{} : gate);
        if (more) add_applied(along_support(), support_support, alpha, z, MAML_FAST_ISA::onto(z), gate);
    }
    void times_transposed(Index k, const View<T>& d, const View<T>& dx, Gate<T>) override {
        this->multiply(this->shared_transposed(), d, dx, {}, {}, kept(k));
        if (k) add_to_inputs(in->value[0], moved[k], d, 1, dx);
    }
    void times_both_transposed(Index k, const View<T>& t, const View<T>& d, T alpha, const View<T>& dx, Gate<T>) override {
        times_transposed(k, t, dx, {});
        add_to_inputs(in->value[S], along_query(), d, alpha, dx);
        if (t_sum.columns) add_to_inputs(in->value[0], along_support(), d, alpha, dx);
    }

   private:
    void allocate_rule(Arena& arena) {
        coefficients.allocate(arena, S);
        taken = arena.template view<T>(O, in->columns);
        lam_query = arena.template view<T>(O, in->query_columns);
        support_rule.allocate(arena, O * taken.by_feature, program.rule, program.gradient);
        query_rule.allocate(arena, O * lam_query.by_feature, program.rule, program.gradient);
    }
    T kept(Index k) const { return plain ? T(1) : static_cast<T>(coefficients.kept(k)); }
    // The direction of tangents, of the parts of Lam beside X_q and X; of a plain rule these are scaled.
    View<T> along_query() const { return plain ? out->cotangent[S] : turned(query_rule, lam_query); }
    View<T> along_support() const { return plain ? t_sum : turned(support_rule, t_sum); }
    static View<T> turned(const RuleState<T>& rule, View<T> view) {
        view.p = const_cast<T*>(rule.direction());
        return view;
    }
    // dx += alpha x (l^T d)
    void add_to_inputs(const View<T>& x, const View<T>& l, const View<T>& d, T alpha, const View<T>& dx) const {
        add_run<T, Lanes>({x, l, alpha}, d, dx, this->workspace, {}, MAML_FAST_ISA::onto(dx));
    }
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
    static void add_to_rows(const View<T>& x, T scale, const Base<T>& bias, const View<T>& z, Gate<T> gate) {
        for (Index o = 0; o < z.features; ++o) {
            const T* p = bias.p + o * bias.by_a;
            const Vec<T> b = bias.kind == Base<T>::nothing ? Vec<T>{} : bias.kind == Base<T>::vector ? load(p) : all(*p);
            for (Index n = 0; n < z.columns; ++n) {
                const Index at = n * LANES<T>;
                store(z.p + o * z.by_feature + at, gate(load(x.p + o * x.by_feature + at) * scale + b, o, n));
            }
        }
    }

    std::vector<View<T>> moved;  // [S + 1], from step 1 on
    View<T> t_sum, base;
    View<T> taken, lam_query;  // where the rule is not plain: u_k beside X, Lam beside X_q
    RuleState<T> support_rule, query_rule;
    RuleCoefficients coefficients;
    View<T> support_support, support_query, query_support;  // Gram blocks [rows of the first][rows of the second]
};

}  // namespace maml_fast::MAML_FAST_ISA
