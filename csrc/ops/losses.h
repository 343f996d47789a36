// The losses of a task's rows: their mean, which may be weighted, its gradient by the predictions, and that gradient's tangent.
//
// z [C][columns] predictions, y targets of the same shape, or for cross entropy one row of class numbers. `weights` [columns]
// holds what every row counts, 1/N where all do alike, and 0 in lanes that no row fills, so that nothing comes from those.
// `state` [C][columns] is what the tangent needs of the pass.
#pragma once

#include <limits>

#include "program.h"
#include "stage.h"
#include "vector_math.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T>
struct LossPass {
    View<T> z, y, state, weights;
    View<T> d;  // dL/dz; no pointer: not wanted
};

// The row whose data stand for a row: its own, or of one that does not count, which may hold anything, the first that does.
template <class T>
Index counting_row(const RowData& weights, Index task, Index row, Index rows) {
    const auto counts = [&](Index r) {
        return static_cast<const T*>(weights.p)[task * weights.by_task + r * weights.by_row] != T(0);
    };
    if (!weights.p || counts(row)) return row;
    Index first = 0;
    while (first + 1 < rows && !counts(first)) ++first;
    return first;
}

// What each row of a task counts in its loss: alike, or by given weights. They add up to 1.
template <class T>
class RowShares {
   public:
    RowShares(const RowData& weights, Index task, Index rows) : by_row_(weights.by_row), alike_(T(1) / static_cast<T>(rows)) {
        if (!weights.p) return;
        own_ = static_cast<const T*>(weights.p) + task * weights.by_task;
        for (Index r = 0; r < rows; ++r) total_ += static_cast<double>(own_[r * by_row_]);
    }
    T operator()(Index row) const {
        return own_ ? static_cast<T>(static_cast<double>(own_[row * by_row_]) / total_) : alike_;
    }

   private:
    const T* own_ = nullptr;
    Index by_row_;
    T alike_;
    double total_ = 0;
};

// A loss of single numbers, meaned over C too. `at` gives the loss, its derivative and the second one.
template <class T>
struct Mse {
    static void at(Vec<T> z, Vec<T> y, Vec<T>& loss, Vec<T>& slope, Vec<T>& curve) {
        const Vec<T> d = z - y;
        loss = d * d;
        slope = d * T(2);
        curve = all(T(2));
    }
};

template <class T>
struct Bce {
    static void at(Vec<T> z, Vec<T> y, Vec<T>& loss, Vec<T>& slope, Vec<T>& curve) {
        const Vec<T> s = sigmoid<T>(z);
        // log(1 + e^z) - y z, in the form that neither overflows nor loses small digits
        loss = positive_part<T>(z) - z * y + log1p<T>(exp<T>(-magnitude<T>(z)));
        slope = s - y;
        curve = s * (T(1) - s);
    }
};

template <class T>
struct Huber {  // d^2/2 where |d| <= 1, |d| - 1/2 elsewhere
    static void at(Vec<T> z, Vec<T> y, Vec<T>& loss, Vec<T>& slope, Vec<T>& curve) {
        const Vec<T> d = z - y;
        slope = clamp<T>(d, T(-1), T(1));
        loss = slope * (d - T(0.5) * slope);
        curve = magnitude<T>(d) > all(T(1)) ? Vec<T>{} : all(T(1));
    }
};

template <class T>
class Loss {
   public:
    virtual ~Loss() = default;
    // The weighted sum of each lane's losses; writes state and d.
    virtual Vec<T> value(const LossPass<T>& pass) const = 0;
    // The tangent of d, from that of z.
    virtual void tangent(const LossPass<T>& pass, const View<T>& t_z, const View<T>& t_d) const = 0;
};

template <class T, class F>
class LossByNumber final : public Loss<T> {
   public:
    Vec<T> value(const LossPass<T>& pass) const override {
        const T share = T(1) / T(pass.z.features);
        Vec<T> sum{};
        for (Index c = 0; c < pass.z.features; ++c)
            for (Index n = 0; n < pass.z.numbers(); n += LANES<T>) {
                Vec<T> loss, slope, curve;
                F::at(load(pass.z.p + c * pass.z.by_feature + n), load(pass.y.p + c * pass.y.by_feature + n), loss, slope,
                      curve);
                const Vec<T> weight = load(pass.weights.p + n) * share;
                sum += weight * loss;
                store(pass.state.p + c * pass.state.by_feature + n, weight * curve);
                if (pass.d.p) store(pass.d.p + c * pass.d.by_feature + n, weight * slope);
            }
        return sum;
    }
    void tangent(const LossPass<T>& pass, const View<T>& t_z, const View<T>& t_d) const override {
        for (Index c = 0; c < t_z.features; ++c)
            for (Index n = 0; n < t_z.numbers(); n += LANES<T>)
                store(t_d.p + c * t_d.by_feature + n, load(pass.state.p + c * pass.state.by_feature + n) *
                                                          load(t_z.p + c * t_z.by_feature + n));
    }
};

// -log p_y with p = softmax(z); d = p - onehot(y), t_d = p (t_z - <p, t_z>). The loss of a class that there is not is NaN.
template <class T>
class CrossEntropy final : public Loss<T> {
   public:
    Vec<T> value(const LossPass<T>& pass) const override {
        const Index classes = pass.z.features;
        Vec<T> total{};
        for (Index n = 0; n < pass.z.numbers(); n += LANES<T>) {
            const T* z = pass.z.p + n;
            T* p = pass.state.p + n;
            const Vec<T> y = load(pass.y.p + n), weight = load(pass.weights.p + n);
            Vec<T> top = load(z);
            for (Index c = 1; c < classes; ++c) {
                const Vec<T> v = load(z + c * pass.z.by_feature);
                top = v > top ? v : top;
            }
            Vec<T> sum{}, chosen = all(std::numeric_limits<T>::quiet_NaN());  // what a class out of range leaves
            for (Index c = 0; c < classes; ++c) {
                const Vec<T> v = load(z + c * pass.z.by_feature) - top;
                const Vec<T> e = exp<T>(v);
                sum += e;
                chosen = y == all(static_cast<T>(c)) ? v : chosen;
                store(p + c * pass.state.by_feature, e);
            }
            total += weight * (log<T>(sum) - chosen);
            const Vec<T> scale = T(1) / sum;
            for (Index c = 0; c < classes; ++c) {
                const Vec<T> share = load(p + c * pass.state.by_feature) * scale;
                store(p + c * pass.state.by_feature, share);
                const Vec<T> hit = y == all(static_cast<T>(c)) ? all(T(1)) : Vec<T>{};
                if (pass.d.p) store(pass.d.p + c * pass.d.by_feature + n, weight * (share - hit));
            }
        }
        return total;
    }
    void tangent(const LossPass<T>& pass, const View<T>& t_z, const View<T>& t_d) const override {
        for (Index n = 0; n < t_z.numbers(); n += LANES<T>) {
            const T* p = pass.state.p + n;
            const Vec<T> weight = load(pass.weights.p + n);
            Vec<T> mean{};
            for (Index c = 0; c < t_z.features; ++c)
                mean += load(p + c * pass.state.by_feature) * load(t_z.p + c * t_z.by_feature + n);
            for (Index c = 0; c < t_z.features; ++c) {
                const Vec<T> centred = load(t_z.p + c * t_z.by_feature + n) - mean;
                store(t_d.p + c * t_d.by_feature + n, weight * load(p + c * pass.state.by_feature) * centred);
            }
        }
    }
};

// The one list.
template <class T>
Loss<T>* new_loss(LossKind kind) {
    switch (kind) {
        case LossKind::mse: return new LossByNumber<T, Mse<T>>();
        case LossKind::cross_entropy: return new CrossEntropy<T>();
        case LossKind::bce_with_logits: return new LossByNumber<T, Bce<T>>();
        case LossKind::huber: return new LossByNumber<T, Huber<T>>();
    }
    return nullptr;
}

}  // namespace maml_fast::MAML_FAST_ISA
