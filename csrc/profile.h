// What a measured call tells: plain data, the same for every instruction set.
#pragma once

#include <cstdint>

namespace maml_fast {

// The processor's own counter, which reads in a few cycles and runs evenly. How long a tick is, a caller finds by a clock.
std::uint64_t ticks();

// The parts of a meta-step that times are told by; `OUTSIDE` has what is of none of the passes.
enum Phase { INNER, QUERY, ADJOINT, OUTSIDE, PHASES };

// Parts of a tile beside its stages, which come behind them in the order of the chain:
//     DATA       rows in and out
//     LOSS       value, cotangent and tangents
//     START      of a thread's share of a call: memory, parameters in the order that stages want
//     WORKSPACE  memory that stages share
enum Beside { DATA, LOSS, START, WORKSPACE, BESIDE };

// A stage of the chain: the layers of the program that it stands for, and its bytes of a thread's arena.
struct StageProfile {
    std::int64_t first = 0, layers = 0;
    std::int64_t own = 0;     // that the stage keeps: fast weights, their adjoint, statistics
    std::int64_t values = 0;  // of its result, steps' values and cotangents and tangents
    bool elsewhere = false;   // the layers beside it do some of its work
};

// Where one call's ticks went.
struct Profile {
    std::uint64_t* cells = nullptr;  // [parts][PHASES], of all threads
    std::int64_t threads = 0;        // that took part
    std::uint64_t tiles = 0;         // from the beginning until all tiles were done,
    std::uint64_t sums = 0;          // and from there to the end: sums over tasks
};

}  // namespace maml_fast
