// A convolution, or a linear layer as one of 1x1 on images of one pixel. Fast weights are dense, and shared at step 0.
//
// x -> z = x * W_k + b_k, with d the cotangent of z; lam the adjoint, and V = -eta_k lam the direction of tangents:
//     t_z = t_x * W_k + x * V + V_b      t_dx = W_k^T t_d + V^T d      lam += t_d x^T + d t_x^T, of the bias the sum of t_d
#pragma once

#include "images/conv_products.h"
#include "images/layer_parameters.h"
#include "images/stage.h"
#include "images/winograd.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T>
class ImageConv final : public ImageStage<T> {
    using ImageStage<T>::in;
    using ImageStage<T>::out;

   public:
    // `first`: nothing below adapts, and its input has no tangent; `goes_on`: a cotangent is wanted of it.
    ImageConv(const Layer& layer, const Program& program, bool first, bool goes_on, Workspace<T>& workspace)
        : parameters(layer, program),
          conv(parameters.conv),
          first(first),
          goes_on_(goes_on),
          workspace_(workspace) {}

    ConvParameters<T> parameters;
    const ConvShape& conv;
    const bool first;

    Index border_in() const override { return conv.padding; }
    Index border_out() const override { return goes_on_ ? conv.border_out() : 0; }

    bool reads_bare() const override { return true; }
    bool works_in_place() const override { return true; }
    bool keeps_cotangent() const override { return goes_on_ && parameters.layer.weight_adapts; }
    // A batch norm behind it takes the bias away: its gradient is 0.
    bool bias_is_lost = false;

    void allocate(Arena& arena, Index) override {
        parameters.allocate(arena);
        if (goes_on_) {
            const Index numbers = conv.taps() * conv.filters * padded<T>(conv.channels);
            turned_ = arena.template take<T>(numbers);
            turned_direction_ = arena.template take<T>(numbers);
        }
        by_planes_ = Winograd<T>::pays(conv, larger<Index>(in->rows, 1), out->shape);
        if (by_planes_) Winograd<T>::ask_for(conv, workspace_);
    }
    void list(std::vector<Adapts<T>>& found) override {
        if (parameters.adapts()) found.push_back({&parameters});
    }
    void begin_call() override { parameters.turn_in(); }

    void forward(Index k) override {
        const ConvTerm<T> term{parameters.weight.value(k), in->value[k]};
        convolve_all(&term, 1, parameters.biases(k), out->value[k]);
    }
    void backward(Index k) override {
        const Image<T>& d = out->cotangent[k];
        const typename Winograd<T>::Pair pair{in->value[k], d};
        if (parameters.weight.adapts()) outer_all(&pair, 1, parameters.weight.gradient(k), false);
        if (parameters.bias.adapts()) add_pixels(d, parameters.bias.gradient(k), false);
        turn_back(k);
    }
    void replay_backward(Index k) override { turn_back(k); }
    void tangent(Index k) override {
        parameters.aim(k);
        ConvTerm<T> terms[2];
        Index count = 0;
        if (!first) terms[count++] = {parameters.weight.value(k), in->tangent[k]};
        if (parameters.weight.adapts()) terms[count++] = {parameters.weight.direction(), in->value[k]};
        convolve_all(terms, count, parameters.bias.direction(), out->tangent[k]);
    }
    void tangent_backward(Index k) override {
        const Image<T>&d = out->cotangent[k], &t_d = out->t_cotangent[k];
        if (parameters.bias.adapts()) add_pixels(t_d, parameters.bias.adjoint(), true);
        if (parameters.weight.adapts()) {
            typename Winograd<T>::Pair pairs[2] = {{in->value[k], t_d}, {}};
            if (!first) pairs[1] = {in->tangent[k], d};
            outer_all(pairs, first ? 1 : 2, parameters.weight.adjoint(), true);
        }
        if (!goes_on_) return;
        turn_weights(conv, parameters.weight.value(k), turned_);
        ConvTerm<T> terms[2] = {{turned_, t_d}, {}};
        if (parameters.weight.adapts()) {
            turn_weights(conv, parameters.weight.direction(), turned_direction_);
            terms[1] = {turned_direction_, d};
        }
        turned_all(terms, parameters.weight.adapts() ? 2 : 1, in->t_cotangent[k]);
    }

   private:
    // Whether cotangents of its input are wanted: of the data the query's, and the tangents of the steps'.
    const bool goes_on_;

    void turn_back(Index k) {
        if (!goes_on_ || (first && k + 1 < static_cast<Index>(in->value.size()))) return;
        turn_weights(conv, parameters.weight.value(k), turned_);
        const ConvTerm<T> term{turned_, out->cotangent[k]};
        turned_all(&term, 1, in->cotangent[k]);
    }
    // The three products, by planes or by plain sums.
    void convolve_all(const ConvTerm<T>* terms, Index count, const T* base, const Image<T>& z) {
        if (by_planes_)
            planes().convolve(terms, count, base, z);
        else
            convolve(conv, terms, count, base, z, segments_);
    }
    void turned_all(const ConvTerm<T>* terms, Index count, const Image<T>& dx) {
        if (by_planes_)
            planes().convolve_turned(terms, count, dx);
        else
            convolve_turned(conv, terms, count, dx, segments_);
    }
    void outer_all(const typename Winograd<T>::Pair* pairs, Index count, T* dw, bool add) {
        if (by_planes_) return planes().outer(pairs, count, dw, add);
        for (Index i = 0; i < count; ++i) convolve_outer(conv, pairs[i].x, pairs[i].d, dw, add || i, segments_);
    }
    Winograd<T> planes() { return {conv, workspace_, segments_}; }

    void add_pixels(const Image<T>& d, T* sums, bool add) const {
        if (bias_is_lost) {
            if (!add) std::memset(sums, 0, static_cast<std::size_t>(padded<T>(conv.filters)) * sizeof(T));
            return;
        }
        for (Index v = 0; v < d.vectors() * LANES<T>; v += LANES<T>) {
            Vec<T> total = add ? load(sums + v) : Vec<T>{};
            for (Index r = 0; r < d.rows; ++r)
                for (Index y = 0; y < d.shape.height; ++y) {
                    const T* p = d.at(r, y, 0) + v;
                    Vec<T> line{};
                    for (Index x = 0; x < d.shape.width; ++x) line += load(p + x * d.by_pixel);
                    total += line;
                }
            store(sums + v, total);
        }
    }

    Workspace<T>& workspace_;
    bool by_planes_ = false;
    SegmentList<T> segments_;
    T *turned_ = nullptr, *turned_direction_ = nullptr;
};

}  // namespace maml_fast::MAML_FAST_ISA
