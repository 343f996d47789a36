// A program with what runs it: what a caller holds.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>

#include "pool.h"
#include "program.h"

namespace maml_fast {

class Prepared {
   public:
    // `instruction_set`: of engines(); "" for the highest. Throws std::invalid_argument naming those there are.
    Prepared(Program program, const std::string& instruction_set, bool doubles);

    const Engine& engine() const { return engine_; }
    Sizes sizes(std::int64_t tasks) const { return session_->sizes(tasks); }

    // `fill` puts this call's pointers and rates into the layers. Safe from several threads: one runs, others wait. In the child
    // of a fork it begins with new memory and threads. Returns whether all losses and gradients are finite.
    template <class Fill>
    bool run(const Fill& fill, const TaskData& data, int threads, Profile* profile = nullptr) {
        if (age_.load() != Pool::process_age()) start_anew();
        const std::lock_guard<std::mutex> lock(*running_);
        fill(program_->layers);
        return session_->run(data, Pool::of_process(), threads, profile);
    }
    std::int64_t parts() const { return session_->parts(); }
    StageProfile part(std::int64_t i) const { return session_->part(i); }

    std::size_t layers_with_parameters() const {
        std::size_t count = 0;
        for (const Layer& layer : description_.layers) count += layer.has_parameters();
        return count;
    }

   private:
    void start_anew();

    const Program description_;  // as it was given: no call writes to it
    std::unique_ptr<Program> program_;
    const Engine& engine_;
    bool doubles_;
    std::atomic<std::uint64_t> age_;
    std::unique_ptr<std::mutex> running_;
    std::unique_ptr<Session> session_;
};

const Engine& engine_named(const std::string& instruction_set);

}  // namespace maml_fast
