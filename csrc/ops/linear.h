// Linear layers, z = W x + b on every column, in the form of weights that all tasks share; and the products that the other
// forms (fast_weights.h) are made of.
#pragma once

#include "product.h"
#include "program.h"
#include "stage.h"

namespace maml_fast::MAML_FAST_ISA {

// Memory for the inside of one operation, as large as the largest of a tile needs.
template <class T>
class Workspace {
   public:
    void needs(Index numbers) { size_ = larger(size_, numbers); }
    void allocate(Arena& arena) { p_ = arena.template take<T>(size_); }
    View<T> view(Index features, Index columns) const { return {p_, spread<T>(columns), features, columns}; }
    T* numbers() const { return p_; }

   private:
    T* p_ = nullptr;
    Index size_ = 0;
};

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

// g[m][n] = alpha * sum_i h[i][m] x[i][n]: m runs over the rows of h, each a unit.
template <class T, class Lanes>
void gram(const View<T>& h, const View<T>& x, const View<T>& g, T alpha) {
    product<T>(Lanes::units(h.columns), x.columns, x.features, {h.p, Lanes::unit, h.by_feature, Lanes::tasks}, columns_of(x),
               g.p, g.by_feature, alpha);
}
// z = alpha * l g + base, where column m of l is a row of g.
template <class T, class Lanes>
void apply(const View<T>& l, const View<T>& g, const View<T>& z, T alpha, Base<T> base) {
    product<T>(l.features, g.columns, Lanes::units(l.columns), {l.p, l.by_feature, Lanes::unit, Lanes::tasks}, columns_of(g),
               z.p, z.by_feature, alpha, base);
}
// z = alpha * l (h^T x) + base; by default onto z itself.
template <class T, class Lanes>
void through(const View<T>& l, const View<T>& h, const View<T>& x, const View<T>& z, T alpha, const Workspace<T>& workspace,
             Base<T> base) {
    const View<T> g = workspace.view(Lanes::units(h.columns), x.columns);
    gram<T, Lanes>(h, x, g, alpha);
    apply<T, Lanes>(l, g, z, 1, base);
}
template <class T, class Lanes>
void through(const View<T>& l, const View<T>& h, const View<T>& x, const View<T>& z, T alpha, const Workspace<T>& workspace) {
    through<T, Lanes>(l, h, x, z, alpha, workspace, onto(z));
}

// Numbers c[a][b] += sum over columns and lanes of l[a] r[b]. Long rows of r are turned into rows of features first, which
// leaves no sum across lanes to do.
template <class T>
constexpr bool turns_rows(Index features) {
    return features >= 4 * LANES<T>;
}
template <class T>
constexpr Index sum_workspace(Index features, Index columns) {
    return turns_rows<T>(features) ? columns * LANES<T> * padded_features<T>(features) : 0;
}
template <class T>
void sums(const View<T>& l, const View<T>& r, T* c, Index by_row, T alpha, bool add, const Workspace<T>& workspace) {
    if (!turns_rows<T>(r.features))
        return dots<T>(l.features, r.features, {l.p, r.p, l.by_feature, r.by_feature, l.columns, c, by_row, alpha, add});
    const Index length = padded_features<T>(r.features);
    T* rows = workspace.numbers();
    rows_of<T>(r.p, r.by_feature, r.features, r.columns, rows, length);
    const Base<T> base = add ? Base<T>{Base<T>::vector, c, by_row, LANES<T>} : Base<T>{};
    product<T>(l.features, ceil_div(r.features, LANES<T>), r.numbers(), {l.p, l.by_feature, 1, false},
               {rows, length, LANES<T>}, c, by_row, alpha, base);
}
template <class T>
void add_sums(const View<T>& l, const View<T>& r, T* c, Index by_row, const Workspace<T>& workspace) {
    sums<T>(l, r, c, by_row, 1, true, workspace);
}

// Each task's own c[o][i] = alpha * sum over its rows of d[o] a[i] + base; `by_row` counts units.
template <class T, class Lanes>
constexpr Index outer_workspace(Index features, Index columns) {
    return Lanes::tasks ? 0 : sum_workspace<T>(features, columns);
}
template <class T, class Lanes>
void outer(const View<T>& d, const View<T>& a, T* c, Index by_row, T alpha, Base<T> base, const Workspace<T>& workspace) {
    if constexpr (Lanes::tasks)
        product<T>(d.features, a.features, d.columns, {d.p, d.by_feature, LANES<T>, true}, {a.p, LANES<T>, a.by_feature}, c,
                   by_row * LANES<T>, alpha, base);
    else
        sums<T>(d, a, c, by_row, alpha, base.kind != Base<T>::nothing, workspace);  // there the base is c itself
}
// The same for one o, added to row [I] of units.
template <class T, class Lanes>
void add_outer_row(const View<T>& d, Index o, const View<T>& a, T* row, T alpha) {
    for (Index i = 0; i < a.features; ++i) {
        Vec<T> sum{};
        for (Index n = 0; n < a.numbers(); n += LANES<T>)
            sum += load(d.p + o * d.by_feature + n) * load(a.p + i * a.by_feature + n);
        if constexpr (Lanes::tasks)
            store(row + i * LANES<T>, load(row + i * LANES<T>) + sum * alpha);
        else
            row[i] += alpha * lane_sum<T>(sum);
    }
}

// sums[o], a unit each: the sum of a task's rows of d[o].
template <class T, class Lanes>
void column_sums(const View<T>& d, T* sums, bool add) {
    for (Index o = 0; o < d.features; ++o) {
        Vec<T> sum{};
        for (Index n = 0; n < d.numbers(); n += LANES<T>) sum += load(d.p + o * d.by_feature + n);
        if constexpr (Lanes::tasks) {
            T* at = sums + o * LANES<T>;
            store(at, add ? load(at) + sum : sum);
        } else {
            sums[o] = (add ? sums[o] : T(0)) + lane_sum<T>(sum);
        }
    }
}

// What all forms of a linear layer have: the weights that the tasks share.
template <class T, class Lanes>
class LinearStage : public Stage<T> {
   public:
    explicit LinearStage(const Layer& layer) : layer(layer), O(layer.out_features), I(layer.in_features) {}

    const Layer& layer;
    const Index O, I;

   protected:
    Base<T> shared_bias() const {
        if (!layer.has_bias) return {};
        return {Base<T>::number, static_cast<const T*>(layer.bias), 1, 0};
    }
    void times_shared(const View<T>& x, const View<T>& z, Base<T> base) const {
        product<T>(O, x.columns, I, {static_cast<const T*>(layer.weight), I, 1, false}, columns_of(x), z.p, z.by_feature, 1,
                   base);
    }
    void times_shared_transposed(const View<T>& d, const View<T>& dx) const {
        product<T>(I, d.columns, O, {static_cast<const T*>(layer.weight), 1, I, false}, columns_of(d), dx.p, dx.by_feature);
    }
};

// A layer that does not adapt: every task has the meta-parameters, at every step.
template <class T, class Lanes>
class SharedLinear final : public LinearStage<T, Lanes> {
   public:
    using LinearStage<T, Lanes>::LinearStage;

    void forward(Index k) override { this->times_shared(this->in->value[k], this->out->value[k], this->shared_bias()); }
    void backward(Index k) override { this->times_shared_transposed(this->out->cotangent[k], this->in->cotangent[k]); }
    void tangent(Index k) override { this->times_shared(this->in->tangent[k], this->out->tangent[k], {}); }
    void tangent_backward(Index k) override {
        this->times_shared_transposed(this->out->t_cotangent[k], this->in->t_cotangent[k]);
    }
};

}  // namespace maml_fast::MAML_FAST_ISA
