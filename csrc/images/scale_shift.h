// gamma and beta of a layer norm over positions: y = gamma xhat + beta, with numbers of their own for the last axes of a row.
//
// A parameter is kept as lines of one image: each pixel's channels, if the channels are among the axes, or else one number in
// the first lane for all of them.
//     dx = gamma dy    t_y = gamma t_x + t_gamma x + t_beta    t_dx = gamma t_dy + t_gamma dy
//     grad gamma = sum dy x,  grad beta = sum dy               lam_gamma += sum(t_dy x + dy t_x),  lam_beta += sum t_dy
#pragma once

#include "images/layer_parameters.h"
#include "images/stage.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T>
class PositionParameters final : public LayerParameters<T> {
   public:
    PositionParameters(const Layer& layer, const Program& program, ImageShape shape)
        : LayerParameters<T>(layer, program),
          by_channel(layer.out_features == shape.numbers()),
          lines(by_channel || layer.out_features == shape.positions() ? shape.height : 1),
          shape(shape),
          Cp(padded<T>(shape.channels)) {}

    const bool by_channel;
    const Index lines;
    const ImageShape shape;
    const Index Cp;

    Index numbers() const { return lines * shape.width * Cp; }
    Index pieces() const override { return this->layer.has_weight ? bias_pieces() : 0; }
    Piece piece(Index i) const override { return bias_piece(i); }
    Index bias_pieces() const override { return lines * shape.width; }
    Piece bias_piece(Index i) const override {
        return {i * Cp, by_channel ? shape.channels : 1, i, by_channel ? bias_pieces() : 1};
    }

   protected:
    Index weight_numbers() const override { return numbers(); }
    Index bias_numbers() const override { return numbers(); }
    Index weight_length() const override { return this->layer.out_features; }
};

template <class T>
class ImageScaleShift final : public ImageStage<T> {
    using ImageStage<T>::in;
    using ImageStage<T>::out;

   public:
    // `first`: its input is the data, which no tangent and no cotangent concerns.
    ImageScaleShift(const Layer& layer, const Program& program, ImageShape shape, bool first)
        : parameters(layer, program, shape), first_(first), Cp(parameters.Cp), W(shape.width) {}

    PositionParameters<T> parameters;

    void allocate(Arena& arena, Index) override {
        parameters.allocate(arena);
        counts_ = arena.template take<T>(Cp);
        ones_ = arena.template take<T>(parameters.numbers());
        zeros_ = arena.template take<T>(parameters.numbers());
    }
    void list(std::vector<Adapts<T>>& found) override {
        if (parameters.adapts()) found.push_back({&parameters});
    }
    void begin_call() override {
        parameters.turn_in();
        for (Index c = 0; c < parameters.shape.channels; ++c) counts_[c] = 1;
        for (Index i = 0; i < parameters.numbers(); ++i) ones_[i] = 1;
    }

    void forward(Index k) override {
        const Image<T>&x = in->value[k], &y = out->value[k];
        const T *g = gamma(k), *b = parameters.layer.has_bias ? bias().value(k) : zeros_;
        each(x, y, [&](Index i, Index j, Index at, Index c) {
            store(y.p + j, number(g, at, c) * load(x.p + i) + number(b, at, c));
        });
    }
    void backward(Index k) override {
        const Image<T>&x = in->value[k], &dy = out->cotangent[k];
        for (FastParameter<T>* p : {&parameters.weight, &parameters.bias})
            if (p->adapts()) std::memset(p->gradient(k), 0, static_cast<std::size_t>(parameters.numbers()) * sizeof(T));
        add_sums(x, dy, weight().gradient(k), bias().gradient(k));
        if (first_) return;
        const Image<T>& dx = in->cotangent[k];
        const T* g = gamma(k);
        each(dx, dy, [&](Index i, Index j, Index at, Index c) { store(dx.p + i, number(g, at, c) * load(dy.p + j)); });
    }
    void tangent(Index k) override {
        parameters.aim(k);
        const Image<T>&x = in->value[k], &t_x = in->tangent[k], &t_y = out->tangent[k];
        const T *g = gamma(k), *t_g = direction(weight()), *t_b = direction(bias());
        each(x, t_y, [&](Index i, Index j, Index at, Index c) {
            const Vec<T> moved = number(t_g, at, c) * load(x.p + i) + number(t_b, at, c);
            store(t_y.p + j, number(g, at, c) * load(t_x.p + i) + moved);
        });
    }
    void tangent_backward(Index k) override {
        const Image<T>&dy = out->cotangent[k], &t_dy = out->t_cotangent[k];
        add_sums(in->value[k], t_dy, weight().adjoint(), bias().adjoint());
        add_sums(in->tangent[k], dy, weight().adjoint(), nullptr);
        if (first_) return;
        const Image<T>& t_dx = in->t_cotangent[k];
        const T *g = gamma(k), *t_g = direction(weight());
        const Index apart = dy.p - t_dy.p;  // of one layout
        each(t_dx, t_dy, [&](Index i, Index j, Index at, Index c) {
            store(t_dx.p + i, number(g, at, c) * load(t_dy.p + j) + number(t_g, at, c) * load(t_dy.p + apart + j));
        });
    }

   private:
    const T* gamma(Index k) const { return parameters.layer.has_weight ? weight().value(k) : ones_; }
    const T* direction(const FastParameter<T>& p) const { return p.adapts() ? p.direction() : zeros_; }
    const FastParameter<T>& weight() const { return parameters.weight; }
    const FastParameter<T>& bias() const { return parameters.bias; }
    // A parameter's numbers for channels c, c + 1, .. of the pixel at `at`.
    MAML_FAST_INLINE Vec<T> number(const T* p, Index at, Index c) const {
        return (parameters.by_channel ? load(p + at + c) : all(p[at])) * load(counts_ + c);
    }
    // Calls visit(offset in a, offset in b, a pixel's offset in a parameter, channel) for each vector.
    template <class Visit>
    MAML_FAST_INLINE void each(const Image<T>& a, const Image<T>& b, Visit visit) const {
        for (Index r = 0; r < a.rows; ++r)
            for (Index y = 0; y < a.shape.height; ++y)
                for (Index x = 0; x < W; ++x)
                    for (Index c = 0; c < Cp; c += LANES<T>)
                        visit(r * a.by_row + y * a.by_line + x * Cp + c, r * b.by_row + y * b.by_line + x * Cp + c,
                              (y % parameters.lines * W + x) * Cp, c);
    }
    // Adds sums of d x to by_weight, and of d to by_bias, where they are.
    void add_sums(const Image<T>& x, const Image<T>& d, T* by_weight, T* by_bias) const {
        const auto add = [&](T* to, Index c, Vec<T> v) {
            if (!to) return;
            if (parameters.by_channel)
                store(to + c, load(to + c) + v);
            else
                *to += lane_sum<T>(v);
        };
        each(x, d, [&](Index i, Index j, Index at, Index c) {
            const Vec<T> v = load(d.p + j) * load(counts_ + c);
            add(by_weight ? by_weight + at : nullptr, c, v * load(x.p + i));
            add(by_bias ? by_bias + at : nullptr, c, v);
        });
    }

    const bool first_;
    const Index Cp, W;
    T *counts_ = nullptr, *ones_ = nullptr, *zeros_ = nullptr;  // 1 for each channel; parameters of a norm that lacks them
};

}  // namespace maml_fast::MAML_FAST_ISA
