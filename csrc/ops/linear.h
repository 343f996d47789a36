// Linear layers, z = W x + b on every column, in the form of weights that all tasks share; and the products that the other
// forms (fast_weights.h) are made of.
#pragma once

#include "gated.h"
#include "learning.h"
#include "program.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T>
Columns<T> columns_of(const View<T>& x) {
    return {x.p, x.by_feature, LANES<T>};
}
template <class T>
Base<T> onto(const View<T>& z) {
    return {Base<T>::vector, z.p, z.by_feature, LANES<T>};
}
// Length of a row of features in whole vectors.
template <class T>
constexpr Index padded_features(Index features) {
    return spread<T>(ceil_div(features, LANES<T>));
}

// A product whose result is z; its sums are still to be given.
template <class T>
Product<T> into(const View<T>& z, Base<T> base = {}, Gate<T> gate = {}) {
    Product<T> p;
    p.base = base;
    p.gate = gate;
    p.c = z.p;
    p.c_by_a = z.by_feature;
    return p;
}

// left x, the sum of one product: `left` [rows][x.features].
template <class T>
Sum<T> times(Operand<T> left, const View<T>& x) {
    return {left, columns_of(x), x.features};
}

// g[m][n] = alpha * sum_i h[i][m] x[i][n]: m runs over the rows of h, each a unit.
template <class T, class Lanes>
void gram(const View<T>& h, const View<T>& x, const View<T>& g, T alpha) {
    Product<T> p = into(g);
    p.first = times<T>({h.p, Lanes::unit, h.by_feature, Lanes::tasks}, x);
    p.alpha = alpha;
    product<T>(Lanes::units(h.columns), x.columns, p);
}
// l g, where column m of l is a row of g.
template <class T, class Lanes>
Sum<T> applied(const View<T>& l, const View<T>& g) {
    return {{l.p, l.by_feature, Lanes::unit, Lanes::tasks}, columns_of(g), Lanes::units(l.columns)};
}

// A task's rows l, r of other passes, standing for weights: alpha * l r^T.
template <class T>
struct Run {
    View<T> l, r;
    T alpha = 1;
    Run transposed() const { return {r, l, alpha}; }
};
// z = gate(z + run x)
template <class T, class Lanes>
void add_run(const Run<T>& run, const View<T>& x, const View<T>& z, const Workspace<T>& workspace, Gate<T> gate,
             Base<T> base) {
    const View<T> g = workspace.view(Lanes::units(run.r.columns), x.columns);
    gram<T, Lanes>(run.r, x, g, run.alpha);
    Product<T> p = into(z, base, gate);
    p.first = applied<T, Lanes>(run.l, g);
    product<T>(z.features, z.columns, p);
}

// ---- sums over columns and lanes: numbers c[a][b] = alpha * sum of l[a] r[b] (+ c)

// Long rows of r are turned into rows of features first, which leaves no sum across lanes to do.
template <class T>
constexpr bool turns_rows(Index features) {
    return features >= 4 * LANES<T>;
}
template <class T>
constexpr Index sum_workspace(Index features, Index columns) {
    return turns_rows<T>(features) ? columns * LANES<T> * padded_features<T>(features) : 0;
}
template <class T>
void turned_sums(const View<T>& l, const View<T>& r, T* c, Index by_row, T alpha, bool add, const Workspace<T>& workspace) {
    const Index length = padded_features<T>(r.features);
    T* rows = workspace.numbers();
    rows_of<T>(r.p, r.by_feature, r.features, r.columns, rows, length);
    Product<T> p;
    p.first = {{l.p, l.by_feature, 1, false}, {rows, length, LANES<T>}, r.numbers()};
    p.alpha = alpha;
    if (add) p.base = {Base<T>::vector, c, by_row, LANES<T>};
    p.c = c;
    p.c_by_a = by_row;
    product<T>(l.features, ceil_div(r.features, LANES<T>), p);
}
template <class T>
typename Dots<T>::Pair pair(const Run<T>& run) {
    return {run.l.p, run.r.p, run.l.by_feature, run.r.by_feature, run.l.columns};
}

// The sum over a tile of the weights that runs of one alpha stand for. Its numbers are laid out as they come: see sum_place.
template <class T>
constexpr Index sum_length(Index rows, Index features) {
    return turns_rows<T>(features) ? rows * padded_features<T>(features) : dot_length(rows, features);
}
template <class T>
constexpr Index sum_place(Index o, Index i, Index features) {
    return turns_rows<T>(features) ? o * padded_features<T>(features) + i : dot_place(o, i, features);
}
// The pieces that a gradient [O, features] is put together from.
template <class T>
constexpr Index sum_pieces(Index rows, Index features) {
    return turns_rows<T>(features) ? rows : rows * ceil_div(features, DOT_B);
}
template <class T>
constexpr Piece sum_piece(Index p, Index features) {
    if (turns_rows<T>(features)) return {sum_place<T>(p, 0, features), features, p * features};
    const Index by_row = ceil_div(features, DOT_B), o = p / by_row, i = p % by_row * DOT_B;
    return {sum_place<T>(o, i, features), smaller<Index>(features - i, DOT_B), o * features + i};
}
template <class T>
void add_runs_up(const Run<T>& first, const Run<T>& second, T* c, const Workspace<T>& workspace) {
    const Index features = first.r.features;
    if (!turns_rows<T>(features)) {
        Dots<T> d;
        d.first = pair(first);
        d.second = pair(second);
        d.c = c;
        d.alpha = first.alpha;
        d.add = true;
        return dots<T>(first.l.features, features, d);
    }
    for (const Run<T>* run : {&first, &second})
        if (run->l.columns) turned_sums<T>(run->l, run->r, c, padded_features<T>(features), run->alpha, true, workspace);
}

// ---- one task's own weights: c[o][i] = alpha * sum over its rows of d[o] a[i] + base, a unit each

template <class T, class Lanes>
constexpr Index outer_workspace(Index features, Index columns) {
    return Lanes::tasks ? 0 : sum_workspace<T>(features, columns);
}
// d a^T as the sum of one product, where tasks are lanes.
template <class T>
Sum<T> outer(const View<T>& d, const View<T>& a) {
    return {{d.p, d.by_feature, LANES<T>, true}, {a.p, LANES<T>, a.by_feature}, d.columns};
}
// The same where rows are lanes.
template <class T>
void outer_by_rows(const View<T>& d, const View<T>& a, T* c, Index by_row, T alpha, bool add, const Workspace<T>& workspace) {
    if (turns_rows<T>(a.features)) return turned_sums<T>(d, a, c, by_row, alpha, add, workspace);
    Dots<T> dot;
    dot.first = {d.p, a.p, d.by_feature, a.by_feature, d.columns};
    dot.c = c;
    dot.c_by_a = by_row;
    dot.alpha = alpha;
    dot.add = add;
    dots<T>(d.features, a.features, dot);
}
// alpha * l r^T for one o, added to row [I] of units.
template <class T, class Lanes>
void add_outer_row(const Run<T>& run, Index o, T* row) {
    for (Index i = 0; i < run.r.features; ++i) {
        Vec<T> sum{};
        for (Index n = 0; n < run.r.numbers(); n += LANES<T>)
            sum += load(run.l.p + o * run.l.by_feature + n) * load(run.r.p + i * run.r.by_feature + n);
        if constexpr (Lanes::tasks)
            store(row + i * LANES<T>, load(row + i * LANES<T>) + sum * run.alpha);
        else
            row[i] += run.alpha * lane_sum<T>(sum);
    }
}

// The sum of d[o] over columns.
template <class T>
MAML_FAST_INLINE Vec<T> column_sum(const View<T>& d, Index o) {
    const T* p = d.p + o * d.by_feature;
    Vec<T> even{}, odd{};
    Index n = 0;
    for (; n + 2 <= d.columns; n += 2) {
        even += load(p + n * LANES<T>);
        odd += load(p + (n + 1) * LANES<T>);
    }
    if (n < d.columns) even += load(p + n * LANES<T>);
    return even + odd;
}
// What all forms of a linear layer have: the weights that the tasks share. The ReLUs beside it are done by its products.
template <class T, class Lanes>
class LinearStage : public GatedStage<T> {
   public:
    explicit LinearStage(const Layer& layer) : layer(layer), O(layer.out_features), I(layer.in_features) {}

    const Layer& layer;
    const Index O, I;

   protected:
    Base<T> shared_bias_base() const {
        if (!layer.has_bias) return {};
        return {Base<T>::number, static_cast<const T*>(layer.bias), 1, 0};
    }
    Operand<T> shared_weight() const { return {static_cast<const T*>(layer.weight), I, 1, false}; }
    Operand<T> shared_transposed() const { return {static_cast<const T*>(layer.weight), 1, I, false}; }

    // z = gate(alpha left x + base)
    static void multiply(Operand<T> left, const View<T>& x, const View<T>& z, Base<T> base, Gate<T> gate, T alpha = 1) {
        Product<T> p = into(z, base, gate);
        p.alpha = alpha;
        p.first = times<T>(left, x);
        product<T>(z.features, x.columns, p);
    }
};

// A layer that does not adapt: every task has the meta-parameters, at every step.
template <class T, class Lanes>
class SharedLinear : public LinearStage<T, Lanes> {
   public:
    using LinearStage<T, Lanes>::LinearStage;

    void forward(Index k) override {
        this->multiply(this->shared_weight(), this->in->value[k], this->out->value[k], this->shared_bias_base(),
                       this->value_gate());
    }
    void backward(Index k) override {
        this->multiply(this->shared_transposed(), this->out->cotangent[k], this->in->cotangent[k], {},
                       this->cotangent_gate(k));
    }
    void tangent(Index k) override {
        this->multiply(this->shared_weight(), this->in->tangent[k], this->out->tangent[k], {}, this->tangent_gate(k));
    }
    void tangent_backward(Index k) override {
        this->multiply(this->shared_transposed(), this->out->t_cotangent[k], this->in->t_cotangent[k], {},
                       this->cotangent_gate(k));
    }
};

}  // namespace maml_fast::MAML_FAST_ISA
