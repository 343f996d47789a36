// One operation at work inside a tile, between two edges of the chain; the four rules that it answers to.
//
// y = f(x), with d the cotangent and t the tangent of a value; k is the inner step whose weights are meant, S the query.
//     forward            x -> y
//     backward           dy -> dx
//     tangent            t_x -> t_y
//     tangent_backward   t_x, t_dy -> t_dx
#pragma once

#include <vector>

#include "lanes.h"

namespace maml_fast::MAML_FAST_ISA {

// The values between two stages, step by step: [S + 1] with the query's last, tangents [S]. Which of them share memory is
// the tile's business (tile.h).
template <class T>
struct Edge {
    Index features = 0;
    Index columns = 0, query_columns = 0;
    std::vector<View<T>> value, cotangent, tangent, t_cotangent;
};

template <class T>
class Stage {
   public:
    virtual ~Stage() = default;

    // Memory of its own, once the edges are known. `kept`: how many inner steps have some of their own; the query has.
    virtual void allocate(Arena&, Index) {}

    virtual void forward(Index k) = 0;
    virtual void backward(Index k) = 0;
    virtual void tangent(Index k) = 0;
    virtual void tangent_backward(Index k) = 0;

    Edge<T>*in = nullptr, *out = nullptr;
};

}  // namespace maml_fast::MAML_FAST_ISA
