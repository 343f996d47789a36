// The parameters of a layer of images: a weight and a bias, either of which may be missing, or not adapt. Those of a norm are
// gamma and beta.
#pragma once

#include "learning.h"
#include "images/conv_shape.h"
#include "images/fast_parameter.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T>
class LayerParameters : public Learning {
   public:
    LayerParameters(const Layer& layer, const Program& program) : layer(layer), program_(program) {}

    const Layer& layer;
    FastParameter<T> weight, bias;

    bool adapts() const { return layer.weight_adapts || layer.bias_adapts; }

    void allocate(Arena& arena) {
        weight.allocate(arena, weight_numbers(), layer.has_weight, layer.weight_adapts, layer.learns_rates,
                        layer.weight_by_number, layer.weight_by_step, layer.learns, program_);
        bias.allocate(arena, bias_numbers(), layer.has_bias, layer.bias_adapts, layer.learns_rates, layer.bias_by_number,
                      layer.bias_by_step, layer.learns, program_);
    }
    // The parameters that all tasks share, rates by number and steps' own values, in the layer's own order.
    void turn_in() {
        for (Index k = 1; k <= program_.steps; ++k) {
            if (weight.by_step())
                for (Index i = 0; i < pieces(); ++i)
                    turn_in(static_cast<const T*>(layer.weight) + k * weight_length(), piece(i), weight.of_step(k));
            if (bias.by_step())
                for (Index i = 0; i < bias_pieces(); ++i)
                    turn_in(static_cast<const T*>(layer.bias) + k * layer.out_features, bias_piece(i), bias.of_step(k));
        }
        for (Index k = 0; k < program_.steps; ++k) {
            if (weight.by_number())
                for (Index i = 0; i < pieces(); ++i)
                    turn_in(static_cast<const T*>(layer.weight_rate_numbers) + k * weight_length(), piece(i), weight.rates(k));
            if (bias.by_number())
                for (Index i = 0; i < bias_pieces(); ++i)
                    turn_in(static_cast<const T*>(layer.bias_rate_numbers) + k * layer.out_features, bias_piece(i), bias.rates(k));
        }
        if (layer.has_weight)
            for (Index i = 0; i < pieces(); ++i) turn_in(static_cast<const T*>(layer.weight), piece(i), weight.shared());
        if (layer.has_bias)
            for (Index i = 0; i < bias_pieces(); ++i) turn_in(static_cast<const T*>(layer.bias), bias_piece(i), bias.shared());
    }
    // Direction -eta_k lam of the tangents at step k, of a plain rule.
    void aim(Index k) {
        weight.aim(rate(layer.weight_rates, k));
        bias.aim(rate(layer.bias_rates, k));
    }
    // The same where the rule is not plain, before step k is gone back through (inner_rule.h).
    void turn(Index k) {
        weight.turn(k, rate(layer.weight_rates, k));
        bias.turn(k, rate(layer.bias_rates, k));
    }
    void descend(Index k) {
        weight.descend(k, rate(layer.weight_rates, k));
        bias.descend(k, rate(layer.bias_rates, k));
    }
    void add_rate_gradients(Index k, const RateSums<T>& sums) const {
        if (weight.by_number())
            weight.add_rates_by_number(k, sums.weight);
        else
            *sums.by_weight += weight.rate_gradient(k);
        if (!bias.by_number()) {
            *sums.by_bias += bias.rate_gradient(k);
            return;
        }
        for (Index i = 0; i < bias_pieces(); ++i) {
            const Piece piece = bias_piece(i);
            const T *u = bias.gradient(k), *lam = bias.adjoint();
            for (Index j = 0; j < piece.count; ++j)
                sums.bias[piece.to + j * piece.by] -= u[piece.from + j] * lam[piece.from + j];
        }
    }
    // Adds the task's adjoint to the sums.
    void add_gradient(T* weight_sums, T* bias_sums) const {
        if (!weight.by_step()) weight.add_adjoint_to(weight_sums);
        if (bias.adapts() && !bias.by_step()) add_bias(bias_sums);
    }
    // Of a layer below what adapts, whose gradient is that of support and query.
    void join_passes() const {
        weight.join_passes();
        bias.join_passes();
    }
    // Behind step k's tangents, or at k = S the query: what has come together of that step's own values.
    void take_step(Index k, T* weight_sums, T* bias_sums) const {
        if (weight.by_step()) weight.take_adjoint(weight_sums + k * sum_length());
        if (!bias.by_step()) return;
        add_bias(bias_sums + k * layer.out_features);
        std::memset(bias.adjoint(), 0, static_cast<std::size_t>(bias.numbers()) * sizeof(T));
    }
    // The adapted parameters of a task, as torch has them.
    void export_adapted(Index task) const {
        const Index S = program_.steps;
        if (T* to = static_cast<T*>(layer.adapted_weight))
            for (Index i = 0; i < pieces(); ++i) turn_out(weight.value(S), piece(i), to + task * weight_length());
        if (T* to = static_cast<T*>(layer.adapted_bias))
            for (Index i = 0; i < bias_pieces(); ++i) turn_out(bias.value(S), bias_piece(i), to + task * layer.out_features);
    }

    const Layer& description() const override { return layer; }
    Index sum_length() const override { return weight.adapts() ? weight.numbers() : 0; }
    Index bias_length() const override { return bias.adapts() ? layer.out_features : 0; }
    // The bias in its own order, as `piece` has the weight.
    virtual Index bias_pieces() const { return 1; }
    virtual Piece bias_piece(Index) const { return {0, layer.out_features, 0, 1}; }

   protected:
    virtual Index weight_numbers() const = 0, bias_numbers() const = 0;  // in the layer's own order, whole vectors
    virtual Index weight_length() const = 0;                            // as torch has it

   private:
    void add_bias(T* sums) const {
        for (Index i = 0; i < bias_pieces(); ++i) {
            const Piece piece = bias_piece(i);
            for (Index j = 0; j < piece.count; ++j) sums[piece.to + j * piece.by] += bias.adjoint()[piece.from + j];
        }
    }
    static void turn_in(const T* from, Piece p, T* to) {
        for (Index j = 0; j < p.count; ++j) to[p.from + j] = from[p.to + j * p.by];
    }
    static void turn_out(const T* from, Piece p, T* to) {
        for (Index j = 0; j < p.count; ++j) to[p.to + j * p.by] = from[p.from + j];
    }
    static T rate(const std::vector<double>& rates, Index k) { return rates.empty() ? T(0) : static_cast<T>(rates[k]); }

    const Program& program_;
};

// (A plain pointer as element of a std::vector would be a type that all instruction sets share.)
template <class T>
struct Adapts {
    LayerParameters<T>* layer;
    Index stage = 0;  // its place in the prelude or among the stages
};

// Weights [tap][C][K] of a convolution, K filling vectors.
template <class T>
class ConvParameters final : public LayerParameters<T> {
   public:
    ConvParameters(const Layer& layer, const Program& program)
        : LayerParameters<T>(layer, program),
          conv{layer.in_features, layer.out_features, layer.kernel, layer.stride, layer.padding} {}

    const ConvShape conv;
    const T* biases(Index k) const { return this->layer.has_bias ? this->bias.value(k) : nullptr; }

    // Row (tap, c): its K numbers are C * taps apart in [K][C][taps].
    Index pieces() const override { return conv.terms(); }
    Piece piece(Index i) const override {
        const Index tap = i / conv.channels, c = i % conv.channels;
        return {i * padded<T>(conv.filters), conv.filters, c * conv.taps() + tap, conv.terms()};
    }

   protected:
    Index weight_numbers() const override { return conv.terms() * padded<T>(conv.filters); }
    Index bias_numbers() const override { return padded<T>(conv.filters); }
    Index weight_length() const override { return conv.terms() * conv.filters; }
};

// gamma and beta of each channel; 1 and 0, with tangents of 0, where a norm has none.
template <class T>
class ChannelParameters final : public LayerParameters<T> {
   public:
    // `bare`: has none, whatever the layer has.
    ChannelParameters(const Layer& layer, const Program& program, Index channels, bool bare)
        : LayerParameters<T>(layer, program), channels_(channels), bare_(bare) {}

    bool adapts() const { return !bare_ && LayerParameters<T>::adapts(); }
    void allocate(Arena& arena) {
        if (!bare_) LayerParameters<T>::allocate(arena);
        ones_ = arena.template take<T>(bias_numbers());
        zeros_ = arena.template take<T>(bias_numbers());
    }
    void turn_in() {
        if (!bare_) LayerParameters<T>::turn_in();
        for (Index c = 0; c < channels_; ++c) ones_[c] = 1;
    }
    const T* gamma(Index k) const { return this->layer.has_weight && !bare_ ? this->weight.value(k) : ones_; }
    const T* beta(Index k) const { return this->layer.has_bias && !bare_ ? this->bias.value(k) : zeros_; }
    const T* t_gamma() const { return this->weight.adapts() ? this->weight.direction() : zeros_; }
    const T* t_beta() const { return this->bias.adapts() ? this->bias.direction() : zeros_; }

    Index pieces() const override { return this->layer.has_weight ? 1 : 0; }
    Piece piece(Index) const override { return {0, channels_, 0, 1}; }

   protected:
    Index weight_numbers() const override { return padded<T>(channels_); }
    Index bias_numbers() const override { return padded<T>(channels_); }
    Index weight_length() const override { return channels_; }

   private:
    const Index channels_;
    const bool bare_;
    T *ones_ = nullptr, *zeros_ = nullptr;
};

}  // namespace maml_fast::MAML_FAST_ISA
