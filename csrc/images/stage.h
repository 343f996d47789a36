// One operation at work inside a tile of images, between two edges of the chain; the four rules of stage.h, on images.
//
// A layer that adapts also leaves, in `backward`, the gradient of its parameters at step k, of the query's loss at k = S; and
// adds, in `tangent_backward`, H_k lam to its adjoint lam. Its tangent is taken in direction -eta_k lam (fast_parameter.h).
#pragma once

#include <vector>

#include "images/layer_parameters.h"

namespace maml_fast::MAML_FAST_ISA {

// The values between two stages, step by step: [S + 1] with the query's last, tangents [S]. Below all that adapts, the
// values are two, support and query. Which share memory is the chain's business (images/chain.h).
template <class T>
struct ImageEdge {
    ImageShape shape;
    Index rows = 0, query_rows = 0;
    Index border = 0;
    std::vector<Image<T>> value, cotangent, tangent, t_cotangent;
};

template <class T>
class ImageStage {
   public:
    virtual ~ImageStage() = default;

    // What it wants around its input, and around the cotangents of its result.
    virtual Index border_in() const { return 0; }
    virtual Index border_out() const { return 0; }
    // Whether it reads its input number by number, so that data may lie without filled-up lanes, and no tangent of them.
    virtual bool reads_bare() const { return false; }
    // Whether `backward` reads the result of `forward`: else the query's cotangent of that may take its place.
    virtual bool keeps_result() const { return false; }
    // Whether `backward` reads its input at each pixel only before it writes the cotangent there, and `tangent_backward` the
    // tangent: then the one may take the place of the other.
    virtual bool works_in_place() const { return false; }
    // Whether `tangent_backward` reads the cotangent of its result.
    virtual bool keeps_cotangent() const { return true; }
    // Whether `tangent_backward` writes the cotangent of its input anew if that was not kept, for the stage below to read.
    virtual bool restores_cotangent() const { return false; }
    // Memory of its own, once the edges have shapes; `kept` inner steps have memory of their own, others share it.
    virtual void allocate(Arena& arena, Index kept) {
        (void)arena;
        (void)kept;
    }
    // Appends what adapts of it.
    virtual void list(std::vector<Adapts<T>>& found) {
        (void)found;
    }
    // Before the tasks of a call: the parameters that all tasks share may have changed.
    virtual void begin_call() {}
    // Before a task's passes: the data are there.
    virtual void begin_task() {}

    virtual void forward(Index k) = 0;
    virtual void backward(Index k) = 0;
    // `backward` once more, at a step whose gradients of parameters are known.
    virtual void replay_backward(Index k) { backward(k); }
    virtual void tangent(Index k) = 0;
    virtual void tangent_backward(Index k) = 0;

    ImageEdge<T>*in = nullptr, *out = nullptr;
};

}  // namespace maml_fast::MAML_FAST_ISA
