// A layer that gets a gradient, as the driver sees it: what it leaves in a chunk's sums over tasks, and where that goes.
#pragma once

#include <vector>

#include "lanes.h"
#include "program.h"

namespace maml_fast::MAML_FAST_ISA {

// Numbers that lie one after another in the sums, and `by` apart in a gradient.
struct Piece {
    Index from = 0, count = 0;  // in the sums of the weight
    Index to = 0, by = 1;       // in the weight's gradient
};

class Learning {
   public:
    virtual ~Learning() = default;
    virtual const Layer& description() const = 0;
    // The weight's sums: how many numbers, in the layer's own order, and the pieces that its gradient is put together from.
    virtual Index sum_length() const = 0;
    virtual Index pieces() const = 0;
    virtual Piece piece(Index i) const = 0;
    // The bias's sums, in the order of its gradient.
    virtual Index bias_length() const = 0;
};

// One of a tile. A layer has a "weight" [O, I] and a "bias" [O]; of a norm these are gamma [F, 1] and beta [F].
template <class T>
class LearningStage : public Learning {
   public:
    LearningStage(const Layer& layer, Index O, Index I) : layer(layer), O(O), I(I) {}

    // Adds the layer's gradient, summed over the tile's tasks, to `weight` (see `piece`) and `bias` [O].
    virtual void add_gradient(T* weight, T* bias) = 0;
    const Layer& description() const override { return layer; }
    Index bias_length() const override { return O; }

    const Layer& layer;
    const Index O, I;
};

// What a layer adds the gradients of a step's rates to: numbers of weight and bias, or, of rates by number, as many as the
// parameter has.
template <class T>
struct RateSums {
    double *by_weight, *by_bias;
    T *weight, *bias;
};

// A chunk's sums over its tasks. The places are the same for every chunk of a program.
template <class T>
struct Partial {
    T* numbers;     // of each layer that has a gradient: weight, bias
    double* rates;  // of each layer that has a gradient: [2, S]
};

// Where a layer's sums lie, in numbers from the start. Behind those of the weight, and of the bias, there may be as many again:
// for each step's rates, if each number's are learned; or for the values that steps have of their own.
struct Place {
    const Learning* layer;
    Index weight, bias;
    Index more_of_weight, more_of_bias;  // how often

    template <class T>
    RateSums<T> rates(const Partial<T>& sums, double* rates, Index k, Index steps) const {
        return {rates + k, rates + steps + k, sums.numbers + weight + (k + 1) * layer->sum_length(),
                sums.numbers + bias + (k + 1) * layer->bias_length()};
    }
};

// Appends the place of one more layer behind the first `numbers`; returns how many there are now.
template <class T>
Index put_sums(const Learning* learning, Index steps, Index numbers, std::vector<Place>& places) {
    constexpr Index L = LANES<T>;
    const Layer& layer = learning->description();
    const auto more = [&](bool by_number, bool by_step) { return by_step || (by_number && layer.learns_rates) ? steps : 0; };
    Place place{learning, numbers, 0, more(layer.weight_by_number, layer.weight_by_step),
                more(layer.bias_by_number, layer.bias_by_step)};
    place.bias = place.weight + ceil_div(learning->sum_length() * (1 + place.more_of_weight), L) * L;
    places.push_back(place);
    return place.bias + ceil_div(learning->bias_length() * (1 + place.more_of_bias), L) * L;
}

}  // namespace maml_fast::MAML_FAST_ISA
