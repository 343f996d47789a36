#include "prepared.h"

#include <stdexcept>

namespace maml_fast {

const Engine& engine_named(const std::string& instruction_set) {
    const auto& known = engines();
    if (instruction_set.empty()) return *known.back();
    std::string names;
    for (const Engine* engine : known) {
        if (instruction_set == engine->name) return *engine;
        names += (names.empty() ? "" : ", ") + std::string(engine->name);
    }
    throw std::invalid_argument("instruction set \"" + instruction_set + "\" is not one of those built and found here: " + names);
}

Prepared::Prepared(Program program, const std::string& instruction_set, bool doubles)
    : description_(std::move(program)),
      program_(new Program(description_)),
      engine_(engine_named(instruction_set)),
      doubles_(doubles),
      age_(Pool::process_age()),
      running_(new std::mutex()),
      session_(engine_.open(*program_, doubles)) {}

// Whoever held the lock or was changing program and memory may not exist in this process: all are left where they are. The
// first of several threads to come does it.
void Prepared::start_anew() {
    static std::mutex renewing;
    const std::lock_guard<std::mutex> lock(renewing);
    if (age_.load() == Pool::process_age()) return;
    (void)running_.release();
    (void)session_.release();
    (void)program_.release();
    program_.reset(new Program(description_));
    running_.reset(new std::mutex());
    session_.reset(engine_.open(*program_, doubles_));
    age_.store(Pool::process_age());
}

}  // namespace maml_fast
