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

// Where a layer's sums lie, in numbers from the start.
struct Place {
    const Learning* layer;
    Index weight, bias;
};

// Appends the place of one more layer behind the first `numbers`; returns how many there are now.
template <class T>
Index put_sums(const Learning* layer, Index numbers, std::vector<Place>& places) {
    constexpr Index L = LANES<T>;
    Place place{layer, numbers, 0};
    place.bias = place.weight + ceil_div(layer->sum_length(), L) * L;
    places.push_back(place);
    return place.bias + ceil_div(layer->bias_length(), L) * L;
}

// A chunk's sums over its tasks. The places are the same for every chunk of a program.
template <class T>
struct Partial {
    T* numbers;     // of each layer that has a gradient: weight, bias
    double* rates;  // of each layer that adapts: [2, S]
};

}  // namespace maml_fast::MAML_FAST_ISA
