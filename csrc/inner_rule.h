// Inner rules that are not plain: what momentum, Nesterov's variant and weight decay make of an inner step, number by number, and of the adjoint on the way
// back. With g the gradient, eta the rate and m = 0 at first:
//     h = g + decay theta     m = mu m + h     u = m, or h + mu m (Nesterov)      theta = theta - eta u
// and back through the same step, with lam the adjoint of theta and n, 0 behind the last step, that of m:
//     n = n + eta lam, or n + mu eta lam (Nesterov)     v = n, or n + eta lam     n = mu n     lam = lam - decay v
// where v is the direction of the step's tangents; -v is kept, for these are only added.
#pragma once

#include "lanes.h"
#include "program.h"

namespace maml_fast::MAML_FAST_ISA {

// A step's rate: one number, or one for each `unit` numbers.
template <class T>
struct Rate {
    T number = 0;
    const T* each = nullptr;
    Index unit = 1;

    MAML_FAST_INLINE Vec<T> operator()(Index i) const {
        if (!each) return all(number);
        return unit == 1 ? load(each + i) : all(each[i / unit]);
    }
};

template <class T>
class RuleState {
   public:
    void allocate(Arena& arena, Index numbers, const InnerRule& rule, bool gradient) {
        numbers_ = numbers;
        mu_ = static_cast<T>(rule.momentum);
        decay_ = static_cast<T>(rule.weight_decay);
        nesterov_ = rule.nesterov;
        if (rule.momentum != 0) momentum_ = arena.template take<T>(numbers);
        if (!gradient) return;
        if (rule.momentum != 0) adjoint_ = arena.template take<T>(numbers);
        direction_ = arena.template take<T>(numbers);
    }
    // Step k: `along` holds g and gets u, `theta` is moved. (Vectors at the end reach into what an arena rounds up.)
    void descend(Index k, const Rate<T>& rate, T* along, T* theta) {
        for (Index i = 0; i < numbers_; i += LANES<T>) {
            const Vec<T> now = load(theta + i), h = load(along + i) + now * decay_;
            Vec<T> u = h;
            if (mu_ != 0) {
                const Vec<T> m = k ? load(momentum_ + i) * mu_ + h : h;
                store(momentum_ + i, m);
                u = nesterov_ ? h + m * mu_ : m;
            }
            store(along + i, u);
            store(theta + i, now - u * rate(i));
        }
    }
    // `last`: of the inner steps, and so the first on the way back.
    void turn(bool last, const Rate<T>& rate, T* lam) {
        for (Index i = 0; i < numbers_; i += LANES<T>) {
            const Vec<T> moved = load(lam + i) * rate(i);
            Vec<T> v = moved;
            if (mu_ != 0) {
                const Vec<T> gained = nesterov_ ? moved * mu_ : moved;
                const Vec<T> n = last ? gained : load(adjoint_ + i) + gained;
                store(adjoint_ + i, n * mu_);
                v = nesterov_ ? n + moved : n;
            }
            store(lam + i, load(lam + i) - v * decay_);
            store(direction_ + i, -v);
        }
    }
    const T* direction() const { return direction_; }

   private:
    Index numbers_ = 0;
    T mu_ = 0, decay_ = 0;
    bool nesterov_ = false;
    T *momentum_ = nullptr, *adjoint_ = nullptr, *direction_ = nullptr;
};

// The same rule spelled out: theta_k = kept(k) theta_0 - sum_{j<k} moved(k, j) g_j.
class RuleCoefficients {
   public:
    void allocate(Arena& arena, Index steps) {
        S = steps;
        table_ = arena.template take<double>((S + 1) * (S + 1));
    }
    void fill(const InnerRule& rule, const std::vector<double>& rates) {
        for (Index source = 0; source <= S; ++source) {  // theta_0, then the gradients
            double theta = source == 0, m = 0;
            for (Index k = 0; k <= S; ++k) {
                table_[k * (S + 1) + source] = theta;
                if (k == S) break;
                const double h = rule.weight_decay * theta + (k + 1 == source);
                m = rule.momentum * m + h;
                theta -= (rates.empty() ? 0 : rates[k]) * (rule.nesterov ? h + rule.momentum * m : m);
            }
        }
    }
    double kept(Index k) const { return table_[k * (S + 1)]; }
    double moved(Index k, Index j) const { return -table_[k * (S + 1) + j + 1]; }

   private:
    Index S = 0;
    double* table_ = nullptr;  // [S + 1][S + 1]
};

}  // namespace maml_fast::MAML_FAST_ISA
