// What a measured call tells, as Python has it; a part of binding.cpp.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "meta_step.h"
#include "prepared.h"

namespace maml_fast {

// Calls run(profile), and returns its result with where its time went, in seconds: `cells` [parts][PHASES] of all threads. A
// tick is as long as the clock says of this call.
template <class Run>
nanobind::tuple measured(const Prepared& prepared, Run run) {
    std::vector<std::uint64_t> cells(static_cast<std::size_t>(prepared.parts()) * PHASES);
    Profile profile;
    profile.cells = cells.data();
    const double began = seconds();
    const std::uint64_t first = ticks();
    const bool finite = run(&profile);
    const std::uint64_t passed = ticks() - first;
    const double call = seconds() - began;
    const auto as_seconds = [&](std::uint64_t count) {
        return passed ? call * static_cast<double>(count) / static_cast<double>(passed) : 0.0;
    };
    nanobind::list by_part;
    for (std::size_t i = 0; i < cells.size(); i += PHASES) {
        nanobind::list by_phase;
        for (std::size_t phase = 0; phase < PHASES; ++phase) by_phase.append(as_seconds(cells[i + phase]));
        by_part.append(by_phase);
    }
    nanobind::dict found;
    found["cells"] = by_part;
    found["threads"] = profile.threads;
    found["tiles"] = as_seconds(profile.tiles);
    found["sums"] = as_seconds(profile.sums);
    found["call"] = call;
    return nanobind::make_tuple(finite, found);
}

// The parts of `measured`: data, loss, start and workspace, then the stages of the chain.
inline nanobind::list parts(const Prepared& prepared) {
    nanobind::list found;
    for (std::int64_t i = 0; i < prepared.parts(); ++i) {
        const StageProfile part = prepared.part(i);
        nanobind::dict named;
        named["first"] = part.first;
        named["layers"] = part.layers;
        named["own"] = part.own;
        named["values"] = part.values;
        named["elsewhere"] = part.elsewhere;
        found.append(named);
    }
    return found;
}

}  // namespace maml_fast
