// Pooling of images. An average is a linear map; a maximum is one too, once the first pass has found where it lies.
#pragma once

#include <limits>

#include "images/norm_units.h"
#include "images/stage.h"

namespace maml_fast::MAML_FAST_ISA {

// Windows of 2x2 side by side. Of equal numbers the first counts, and NaN is the largest, as in torch.
template <class T>
class ImageMaxPool final : public ImageStage<T> {
    using ImageStage<T>::in;
    using ImageStage<T>::out;

   public:
    bool works_in_place() const override { return true; }
    bool keeps_cotangent() const override { return false; }

    void allocate(Arena& arena, Index kept) override {
        const Index passes = static_cast<Index>(in->value.size());
        codes_.resize(passes);
        for (Index k = 0; k < passes; ++k)
            codes_[k] = k < kept || k == passes - 1
                            ? Numbers<Code>{arena.template take<Code>(Units<T, true>::code_numbers(out->value[k]))}
                            : codes_[0];
    }
    void forward(Index k) override {
        const Image<T>&x = in->value[k], &y = out->value[k];
        const Units<T, true> units{x, y};
        each(units, [&](const Unit& u) {
            Vec<T> best = load(x.p + u.in);
            IntVec<T> code{};
            MAML_FAST_UNROLL
            for (int j = 1; j < 4; ++j) {
                const Vec<T> v = load(x.p + u.in + units.pixel(j));
                const auto takes = (v > best) | (v != v);
                best = takes ? v : best;
                code = takes ? IntVec<T>{} + j : code;
            }
            store(y.p + u.out, best);
            store_codes<T>(codes_[k].p + u.code, code);
        });
    }
    void backward(Index k) override { spread(k, out->cotangent[k], in->cotangent[k]); }
    void tangent(Index k) override {
        const Image<T>&t_x = in->tangent[k], &t_y = out->tangent[k];
        const Units<T, true> units{t_x, t_y};
        each(units, [&](const Unit& u) {
            store(t_y.p + u.out, units.chosen(t_x.p, u, load_codes<T>(codes_[k].p + u.code)));
        });
    }
    void tangent_backward(Index k) override { spread(k, out->t_cotangent[k], in->t_cotangent[k]); }

   private:
    void spread(Index k, const Image<T>& dy, const Image<T>& dx) const {
        const Units<T, true> units{dx, dy};
        each(units, [&](const Unit& u) {
            const IntVec<T> codes = load_codes<T>(codes_[k].p + u.code);
            const Vec<T> d = load(dy.p + u.out);
            MAML_FAST_UNROLL
            for (int j = 0; j < 4; ++j) store(dx.p + u.in + units.pixel(j), codes == j ? d : Vec<T>{});
        });
        for (Index r = 0; r < dx.rows; ++r)
            for (Index v = 0; v < dx.by_pixel; v += LANES<T>) units.each_left(r, v, [&](Index i) { store(dx.p + i, Vec<T>{}); });
    }
    template <class Visit>
    static void each(const Units<T, true>& units, Visit visit) {
        const Span span{0, units.in.rows, 0, units.in.shape.height};
        for (Index r = 0; r < units.in.rows; ++r)
            for (Index v = 0; v < units.in.by_pixel; v += LANES<T>) units.each(r, span, v, visit);
    }

    std::vector<Numbers<Code>> codes_;  // [passes]
};

// The mean of windows, so many pixels apart both ways; what no window has is left out. Over a whole image: the global mean.
template <class T>
class ImageAveragePool final : public ImageStage<T> {
    using ImageStage<T>::in;
    using ImageStage<T>::out;

   public:
    explicit ImageAveragePool(const Layer& layer) : layer_(layer) {}

    bool keeps_cotangent() const override { return false; }


    void forward(Index k) override { average(in->value[k], out->value[k]); }
    void backward(Index k) override { spread(out->cotangent[k], in->cotangent[k]); }
    void tangent(Index k) override { average(in->tangent[k], out->tangent[k]); }
    void tangent_backward(Index k) override { spread(out->t_cotangent[k], in->t_cotangent[k]); }

   private:
    T share() const { return T(1) / static_cast<T>(layer_.window[0] * layer_.window[1]); }
    // Calls visit(offset of a window's first pixel, offset of its mean) for each vector.
    template <class Visit>
    MAML_FAST_INLINE void each(const Image<T>& x, const Image<T>& y, Visit visit) const {
        for (Index r = 0; r < y.rows; ++r)
            for (Index i = 0; i < y.shape.height; ++i)
                for (Index j = 0; j < y.shape.width; ++j)
                    for (Index v = 0; v < y.by_pixel; v += LANES<T>)
                        visit(r * x.by_row + i * layer_.step[0] * x.by_line + j * layer_.step[1] * x.by_pixel + v,
                              r * y.by_row + i * y.by_line + j * y.by_pixel + v);
    }
    void average(const Image<T>& x, const Image<T>& y) const {
        each(x, y, [&](Index from, Index to) {
            Vec<T> sum{};
            for (Index i = 0; i < layer_.window[0]; ++i) {
                Vec<T> line{};
                for (Index j = 0; j < layer_.window[1]; ++j) line += load(x.p + from + i * x.by_line + j * x.by_pixel);
                sum += line;
            }
            store(y.p + to, sum * share());
        });
    }
    void spread(const Image<T>& dy, const Image<T>& dx) const {
        for (Index r = 0; r < dx.rows; ++r)
            for (Index y = 0; y < dx.shape.height; ++y)
                std::memset(dx.at(r, y, 0), 0, static_cast<std::size_t>(dx.shape.width * dx.by_pixel) * sizeof(T));
        each(dx, dy, [&](Index to, Index from) {
            const Vec<T> d = load(dy.p + from) * share();
            for (Index i = 0; i < layer_.window[0]; ++i)
                for (Index j = 0; j < layer_.window[1]; ++j) {
                    T* p = dx.p + to + i * dx.by_line + j * dx.by_pixel;
                    store(p, load(p) + d);
                }
        });
    }

    const Layer& layer_;
};

}  // namespace maml_fast::MAML_FAST_ISA
