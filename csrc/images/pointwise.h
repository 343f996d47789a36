// Pointwise activations of images, by the functions of ops/pointwise.h.
#pragma once

#include "images/stage.h"
#include "ops/pointwise.h"

namespace maml_fast::MAML_FAST_ISA {

// Calls visit(i, j) for each vector of two images of one shape, with its offsets in images like the first and the second.
template <class T, class Visit>
MAML_FAST_INLINE void each_vector(const Image<T>& a, const Image<T>& b, Visit visit) {
    const Index line = a.shape.width * a.by_pixel;  // the same in both
    for (Index r = 0; r < a.rows; ++r)
        for (Index y = 0; y < a.shape.height; ++y) {
            const Index i = r * a.by_row + y * a.by_line, j = r * b.by_row + y * b.by_line;
            for (Index n = 0; n < line; n += LANES<T>) visit(i + n, j + n);
        }
}

// What an activation gives is evaluated again in each rule, from its input or from its result.
template <class T, class F>
class ImagePointwise final : public ImageStage<T> {
    using ImageStage<T>::in;
    using ImageStage<T>::out;

   public:
    explicit ImagePointwise(const Layer& layer) : f_(layer.constants) {}

    bool keeps_result() const override { return F::from_output; }
    bool works_in_place() const override { return true; }
    bool keeps_cotangent() const override { return F::curved; }

    void forward(Index k) override {
        const Image<T>&x = in->value[k], &y = out->value[k];
        each_vector(x, y, [&](Index i, Index j) {
            const Vec<T> v = load(x.p + i);
            if constexpr (F::from_output) {
                store(y.p + j, f_.value(v));
            } else {
                Vec<T> value, slope, curve;
                f_.at(v, value, slope, curve);
                store(y.p + j, value);
            }
        });
    }
    void backward(Index k) override { slope_times(k, out->cotangent[k], in->cotangent[k], false); }
    void tangent(Index k) override { slope_times(k, in->tangent[k], out->tangent[k], true); }
    void tangent_backward(Index k) override {
        const Image<T>&t_dy = out->t_cotangent[k], &t_dx = in->t_cotangent[k];
        if constexpr (!F::curved) {
            slope_times(k, t_dy, t_dx, false);
        } else {
            const Image<T>&t_x = in->tangent[k], &dy = out->cotangent[k];
            each_vector(t_dx, t_dy, [&](Index i, Index j) {
                Vec<T> curve;
                const Vec<T> straight = slope(k, i, j, load(t_dy.p + j), curve);
                store(t_dx.p + i, straight + curve * load(t_x.p + i) * load(dy.p + j));
            });
        }
    }

   private:
    // f' v, and f''
    MAML_FAST_INLINE Vec<T> slope(Index k, Index i, Index j, Vec<T> v, Vec<T>& curve) const {
        if constexpr (F::from_output) {
            const Vec<T> y = load(out->value[k].p + j);
            curve = f_.curve(y);
            return f_.slope_times(y, v);
        } else {
            Vec<T> value, slope;
            f_.at(load(in->value[k].p + i), value, slope, curve);
            return slope * v;
        }
    }
    void slope_times(Index k, const Image<T>& v, const Image<T>& to, bool forward) const {
        const Image<T>&x = forward ? v : to, &y = forward ? to : v;
        each_vector(x, y, [&](Index i, Index j) {
            Vec<T> curve;
            const T* from = v.p + (forward ? i : j);
            store(to.p + (forward ? j : i), slope(k, i, j, load(from), curve));
        });
    }

    const F f_;
};

}  // namespace maml_fast::MAML_FAST_ISA
