// A program with what runs it: what a caller holds.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "program.h"

namespace maml_fast {

class Prepared {
   public:
    // `instruction_set`: of engines(); "" for the highest. Throws std::invalid_argument naming those there are.
    Prepared(Program program, const std::string& instruction_set, bool doubles);

    const Engine& engine() const { return engine_; }
    Sizes sizes(std::int64_t tasks) const { return session_->sizes(tasks); }

    // The pointers and rates of `layers` are taken over for this call. Safe from several threads: one runs, others wait. In the
    // child of a fork it begins with new memory and threads.
    void run(const std::vector<Layer>& layers, const TaskData& data, int threads);

    const std::vector<Layer>& layers() const { return program_->layers; }

   private:
    void start_anew();

    std::unique_ptr<Program> program_;
    const Engine& engine_;
    bool doubles_;
    std::uint64_t age_;
    std::unique_ptr<std::mutex> running_;
    std::unique_ptr<Session> session_;
};

const Engine& engine_named(const std::string& instruction_set);

}  // namespace maml_fast
