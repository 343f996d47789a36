// Pointwise activations: y = f(x), dx = f' dy, t_y = f' t_x, t_dx = f' t_dy + f'' t_x dy.
//
// An activation is a struct: `curved` says whether f'' is anywhere but 0. One with `from_output` gives f' and f'' from y, and
// its result takes the place of x; the others give all three from x at once, and f', f'' are kept.
#pragma once

#include "program.h"
#include "stage.h"
#include "vector_math.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T>
struct Relu {
    static constexpr bool curved = false, from_output = true;
    Vec<T> value(Vec<T> x) const { return positive_part<T>(x); }
    Vec<T> slope_times(Vec<T> y, Vec<T> v) const { return where_positive<T>(y, v); }
    Vec<T> curve(Vec<T>) const { return Vec<T>{}; }
    explicit Relu(const double*) {}
};

template <class T>
struct Scale {
    static constexpr bool curved = false, from_output = true;
    T factor;
    Vec<T> value(Vec<T> x) const { return x * factor; }
    Vec<T> slope_times(Vec<T>, Vec<T> v) const { return v * factor; }
    Vec<T> curve(Vec<T>) const { return Vec<T>{}; }
    explicit Scale(const double* c) : factor(static_cast<T>(c[0])) {}
};

template <class T>
struct Tanh {
    static constexpr bool curved = true, from_output = true;
    Vec<T> value(Vec<T> x) const { return tanh<T>(x); }
    Vec<T> slope_times(Vec<T> y, Vec<T> v) const { return (T(1) - y * y) * v; }
    Vec<T> curve(Vec<T> y) const { return T(-2) * y * (T(1) - y * y); }
    explicit Tanh(const double*) {}
};

template <class T>
struct Sigmoid {
    static constexpr bool curved = true, from_output = true;
    Vec<T> value(Vec<T> x) const { return sigmoid<T>(x); }
    Vec<T> slope_times(Vec<T> y, Vec<T> v) const { return y * (T(1) - y) * v; }
    Vec<T> curve(Vec<T> y) const { return y * (T(1) - y) * (T(1) - T(2) * y); }
    explicit Sigmoid(const double*) {}
};

template <class T>
struct LeakyRelu {
    static constexpr bool curved = false, from_output = false;
    T negative;
    void at(Vec<T> x, Vec<T>& y, Vec<T>& slope, Vec<T>& curve) const {
        slope = x > Vec<T>{} ? all(T(1)) : all(negative);
        y = x * slope;
        curve = Vec<T>{};
    }
    explicit LeakyRelu(const double* c) : negative(static_cast<T>(c[0])) {}
};

// With s = sigmoid(x): f' = s (1 + x (1 - s)), f'' = s (1 - s) (2 + x (1 - 2 s))
template <class T>
struct Silu {
    static constexpr bool curved = true, from_output = false;
    void at(Vec<T> x, Vec<T>& y, Vec<T>& slope, Vec<T>& curve) const {
        const Vec<T> s = sigmoid<T>(x);
        y = x * s;
        slope = s * (T(1) + x * (T(1) - s));
        curve = s * (T(1) - s) * (T(2) + x * (T(1) - T(2) * s));
    }
    explicit Silu(const double*) {}
};

// f = x Phi(x), f' = Phi + x phi, f'' = (2 - x^2) phi, with phi, Phi of the normal distribution
template <class T>
struct Gelu {
    static constexpr bool curved = true, from_output = false;
    void at(Vec<T> x, Vec<T>& y, Vec<T>& slope, Vec<T>& curve) const {
        const Vec<T> below = T(0.5) * (T(1) + erf<T>(x * T(0.70710678118654752440)));
        const Vec<T> density = exp<T>(T(-0.5) * x * x) * T(0.39894228040143267794);
        y = x * below;
        slope = below + x * density;
        curve = (T(2) - x * x) * density;
    }
    explicit Gelu(const double*) {}
};

// f = x/2 (1 + t), t = tanh(u), u = a (x + b x^3)
template <class T>
struct GeluTanh {
    static constexpr bool curved = true, from_output = false;
    void at(Vec<T> x, Vec<T>& y, Vec<T>& slope, Vec<T>& curve) const {
        const T a = T(0.79788456080286535588), b = T(0.044715);
        // Beyond, t is 1 to the last bit; and x^3 stays finite.
        const Vec<T> z = clamp<T>(x, T(-30), T(30));
        const Vec<T> t = tanh<T>(a * z * (T(1) + b * z * z));
        const Vec<T> u1 = a * (T(1) + 3 * b * z * z), u2 = (6 * a * b) * z, sech = T(1) - t * t;
        y = T(0.5) * x * (T(1) + t);
        slope = T(0.5) * (T(1) + t) + T(0.5) * z * sech * u1;
        curve = sech * (u1 + T(0.5) * z * (u2 - T(2) * t * u1 * u1));
    }
    explicit GeluTanh(const double*) {}
};

// f = log(1 + e^{bx}) / b, f' = s = sigmoid(b x), f'' = b s (1 - s); f = x where b x > threshold
template <class T>
struct Softplus {
    static constexpr bool curved = true, from_output = false;
    T beta, threshold;
    void at(Vec<T> x, Vec<T>& y, Vec<T>& slope, Vec<T>& curve) const {
        const Vec<T> z = x * beta, s = sigmoid<T>(z);
        const auto straight = z > all(threshold);
        y = straight ? x : softplus<T>(z) / beta;
        slope = straight ? all(T(1)) : s;
        curve = straight ? Vec<T>{} : beta * s * (T(1) - s);
    }
    explicit Softplus(const double* c) : beta(static_cast<T>(c[0])), threshold(static_cast<T>(c[1])) {}
};

template <class T>
struct Sine {
    static constexpr bool curved = true, from_output = false;
    void at(Vec<T> x, Vec<T>& y, Vec<T>& slope, Vec<T>& curve) const {
        sin_cos<T>(x, y, slope);
        curve = -y;
    }
    explicit Sine(const double*) {}
};

// What a tile must know to lay out memory.
class PointwiseTraits {
   public:
    bool curved, from_output;
};

template <class T>
class PointwiseStage : public Stage<T> {
   public:
    virtual PointwiseTraits traits() const = 0;

    // Whether the layers before and behind do its work (Tile::fuse).
    bool forward_is_done = false, backward_is_done = false;
};

template <class T, class F>
class Pointwise final : public PointwiseStage<T> {
   public:
    explicit Pointwise(const Layer& layer) : f_(layer.constants) {}

    PointwiseTraits traits() const override { return {F::curved, F::from_output}; }

    void allocate(Arena& arena, Index kept) override {
        if (F::from_output) return;
        const Edge<T>& x = *this->in;
        const Index steps = static_cast<Index>(x.value.size()) - 1;
        slope_.resize(steps + 1);
        curve_.resize(steps + 1);
        for (Index k = 0; k <= steps; ++k) {
            const bool own = k < kept || k == steps;
            const Index columns = k == steps ? x.query_columns : x.columns;
            slope_[k] = own ? arena.template view<T>(x.features, columns) : slope_[0];
            if (F::curved) curve_[k] = own ? arena.template view<T>(x.features, columns) : curve_[0];
        }
    }

    void forward(Index k) override {
        if (this->forward_is_done) return;
        const View<T>&x = this->in->value[k], &y = this->out->value[k];
        each(y, [&](Index f, Index n) {
            const Vec<T> v = load(x.p + f * x.by_feature + n);
            T* to = y.p + f * y.by_feature + n;
            if constexpr (F::from_output) {
                store(to, f_.value(v));
            } else {
                Vec<T> value, slope, curve;
                f_.at(v, value, slope, curve);
                store(to, value);
                store(slope_[k].p + f * slope_[k].by_feature + n, slope);
                if constexpr (F::curved) store(curve_[k].p + f * curve_[k].by_feature + n, curve);
            }
        });
    }
    void backward(Index k) override {
        if (!this->backward_is_done) slope_times(k, this->out->cotangent[k], this->in->cotangent[k]);
    }
    void tangent(Index k) override {
        if (!this->forward_is_done) slope_times(k, this->in->tangent[k], this->out->tangent[k]);
    }
    void tangent_backward(Index k) override {
        if (this->backward_is_done) return;
        const View<T>&t_dy = this->out->t_cotangent[k], &t_dx = this->in->t_cotangent[k];
        if constexpr (F::curved) {
            const View<T>&t_x = this->in->tangent[k], &dy = this->out->cotangent[k];
            each(t_dx, [&](Index f, Index n) {
                const Vec<T> bent = curve(k, f, n) * load(t_x.p + f * t_x.by_feature + n);
                const Vec<T> v = slope(k, f, n, load(t_dy.p + f * t_dy.by_feature + n));
                store(t_dx.p + f * t_dx.by_feature + n, v + bent * load(dy.p + f * dy.by_feature + n));
            });
        } else {
            slope_times(k, t_dy, t_dx);
        }
    }

   private:
    template <class Visit>
    static MAML_FAST_INLINE void each(const View<T>& view, Visit visit) {
        for (Index f = 0; f < view.features; ++f)
            for (Index n = 0; n < view.numbers(); n += LANES<T>) visit(f, n);
    }
    MAML_FAST_INLINE Vec<T> slope(Index k, Index f, Index n, Vec<T> v) const {
        if constexpr (F::from_output) return f_.slope_times(load(y_at(k, f, n)), v);
        return load(slope_[k].p + f * slope_[k].by_feature + n) * v;
    }
    MAML_FAST_INLINE Vec<T> curve(Index k, Index f, Index n) const {
        if constexpr (F::from_output) return f_.curve(load(y_at(k, f, n)));
        return load(curve_[k].p + f * curve_[k].by_feature + n);
    }
    MAML_FAST_INLINE const T* y_at(Index k, Index f, Index n) const {
        const View<T>& y = this->out->value[k];
        return y.p + f * y.by_feature + n;
    }
    void slope_times(Index k, const View<T>& v, const View<T>& to) const {
        each(to, [&](Index f, Index n) {
            store(to.p + f * to.by_feature + n, slope(k, f, n, load(v.p + f * v.by_feature + n)));
        });
    }

    const F f_;
    std::vector<View<T>> slope_, curve_;  // [S + 1]
};

template <class F>
struct TypeOf {
    using type = F;
};

// The one list: calls use(TypeOf<the activation's struct>).
template <class T, class Use>
auto with_activation(Activation activation, Use use) {
    switch (activation) {
        case Activation::relu: break;
        case Activation::leaky_relu: return use(TypeOf<LeakyRelu<T>>());
        case Activation::tanh: return use(TypeOf<Tanh<T>>());
        case Activation::sigmoid: return use(TypeOf<Sigmoid<T>>());
        case Activation::silu: return use(TypeOf<Silu<T>>());
        case Activation::gelu: return use(TypeOf<Gelu<T>>());
        case Activation::gelu_tanh: return use(TypeOf<GeluTanh<T>>());
        case Activation::softplus: return use(TypeOf<Softplus<T>>());
        case Activation::sine: return use(TypeOf<Sine<T>>());
        case Activation::scale: return use(TypeOf<Scale<T>>());
    }
    return use(TypeOf<Relu<T>>());
}

template <class T>
PointwiseStage<T>* new_pointwise(const Layer& layer) {
    return with_activation<T>(layer.activation, [&](auto of) -> PointwiseStage<T>* {
        return new Pointwise<T, typename decltype(of)::type>(layer);
    });
}

}  // namespace maml_fast::MAML_FAST_ISA
