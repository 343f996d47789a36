// Where a tile's time and memory go, stage by stage.
//
// A meter is in the memory of its thread. Each lap ends where the next begins, so that no time is lost between two; a tile
// without a meter asks one pointer at the end of a stage's rule.
#pragma once

#include <vector>

#include "lanes.h"
#include "profile.h"

namespace maml_fast::MAML_FAST_ISA {

class Meter {
    struct Laps {
        std::uint64_t by_phase[PHASES] = {};
    };

   public:
    // `now`: when what is measured began.
    void begin(Index parts, std::uint64_t now) {
        laps_.resize(static_cast<std::size_t>(parts));
        last_ = now;
    }
    void lap(Index part, Phase phase) {
        const std::uint64_t now = ticks();
        laps_[static_cast<std::size_t>(part)].by_phase[phase] += now - last_;
        last_ = now;
    }
    // Adds what was measured to [parts][PHASES], and begins anew.
    void add_to(std::uint64_t* cells) {
        for (Laps& laps : laps_)
            for (std::uint64_t& sum : laps.by_phase) {
                *cells++ += sum;
                sum = 0;
            }
    }

   private:
    std::vector<Laps> laps_;
    std::uint64_t last_ = 0;
};

// The parts of a tile: what is beside its stages, the stages that run once, and the others.
class Parts {
    struct Part {
        StageProfile of;
    };

   public:
    Parts() : beside_(BESIDE) {}

    // The next stage of the two lists, with the layers that it stands for.
    void add(bool prelude, Index first, Index layers) {
        Part part;
        part.of.first = first;
        part.of.layers = layers;
        (prelude ? prelude_ : stages_).push_back(part);
    }
    Index count() const { return stage(static_cast<Index>(stages_.size())); }
    Index prelude(Index i) const { return BESIDE + i; }
    Index stage(Index i) const { return BESIDE + static_cast<Index>(prelude_.size()) + i; }

    const StageProfile& at(Index part) const { return const_cast<Parts*>(this)->list_at(part).of; }
    StageProfile& at(Index part) { return list_at(part).of; }
    // The part whose result lies behind so many stages of a list: behind none, the data.
    StageProfile& behind(bool prelude, Index stages) {
        if (!prelude && stages == 0) return behind(true, static_cast<Index>(prelude_.size()));
        if (stages == 0) return at(DATA);
        return at(prelude ? this->prelude(stages - 1) : stage(stages - 1));
    }
    void forget_bytes() {
        for (Index i = 0; i < count(); ++i) at(i).own = at(i).values = 0;
    }

   private:
    Part& list_at(Index part) {
        if (part < BESIDE) return beside_[static_cast<std::size_t>(part)];
        part -= BESIDE;
        const Index once = static_cast<Index>(prelude_.size());
        return part < once ? prelude_[static_cast<std::size_t>(part)] : stages_[static_cast<std::size_t>(part - once)];
    }
    std::vector<Part> beside_, prelude_, stages_;
};

}  // namespace maml_fast::MAML_FAST_ISA
