// The driver: tiles of tasks over threads, and the sum over tasks in an order of its own.
//
// Tasks are cut into tiles, tiles into chunks. Threads take chunks as they come; each chunk has a partial sum, and these are
// added up in order. All cuts follow from sizes alone, so the same bits come from any number of threads.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <new>

#include "learning.h"
#include "meter.h"
#include "pool.h"

namespace maml_fast::MAML_FAST_ISA {

// Partial sums should stay in cache, and chunks should be enough for many threads.
constexpr Index PARTIALS_BYTES = Index{8} << 20, LEAST_CHUNKS = 8, MOST_CHUNKS = 64;
// Memory that a program keeps for its next call, for each thread.
constexpr Index KEPT_BYTES = Index{64} << 20;
// From so many numbers on, threads share the sum over chunks.
constexpr Index SHARED_SUM = 200000;

// `TileOf`: a Tile (tile.h) or what has the same public functions.
template <class T, class TileOf>
class ProgramSession final : public Session {

    // A thread's tile, and the memory it works in.
    struct Worker {
        Block memory;
        std::unique_ptr<TileOf> tile;
        Meter meter;
    };

    // Pieces of gradients among those of all layers: the weight's and what lies behind, and two more, the bias and what does.
    struct Pieces {
        Index begin;
    };

    // What is shared by the threads of one call.
    struct Job {
        ProgramSession* self;
        const TaskData* data;
        Profile* profile;
        Index chunks, tiles;
        std::atomic<Index> next{0}, next_piece{0};
        std::atomic<bool> failed{false}, finite{true};
        std::vector<Pieces> pieces;  // of each layer that adapts, and where they end
    };

   public:
    explicit ProgramSession(const Program& program) : program_(program), blueprint_(new TileOf(program, counted_)) {
        partial_bytes_ = rate_bytes() + ceil_div(blueprint_->sum_numbers() * static_cast<Index>(sizeof(T)), 64) * 64;
    }

    Sizes sizes(Index tasks) const override {
        Sizes found;
        found.tile_tasks = TileOf::most_tasks;
        found.arena_bytes = counted_.used();
        found.replays = blueprint_->replays();
        found.partial_bytes = partial_bytes();
        const Index tiles = ceil_div(tasks, TileOf::most_tasks);
        const Index fitting = PARTIALS_BYTES / larger<Index>(found.partial_bytes, 1);
        found.chunks = smaller(tiles, smaller(MOST_CHUNKS, larger(LEAST_CHUNKS, fitting)));
        return found;
    }

    std::int64_t parts() const override { return blueprint_->parts().count(); }
    StageProfile part(std::int64_t i) const override { return blueprint_->parts().at(i); }

    bool run(const TaskData& data, Pool& pool, int threads, Profile* profile) override {
        const std::uint64_t begin = profile ? ticks() : 0;
        Job job;
        job.self = this;
        job.data = &data;
        job.profile = profile;
        job.tiles = ceil_div(data.tasks, TileOf::most_tasks);
        job.chunks = sizes(data.tasks).chunks;
        if (program_.gradient) partials_.fit(job.chunks * partial_bytes());
        // All threads or one: OpenMP ends those that are left out, and torch would have to start them again.
        pool.run(job.chunks > 1 ? threads : 1, [](void* context) { take_chunks(*static_cast<Job*>(context)); }, &job);
        const std::uint64_t done = profile ? ticks() : 0;
        if (!job.failed && program_.gradient) add_up(job, pool, threads);
        tidy();
        if (job.failed) throw std::bad_alloc();
        const bool all_finite = job.finite && finite_results(data);
        if (profile) {
            profile->tiles = done - begin;
            profile->sums = ticks() - done;
        }
        return all_finite;
    }

   private:
    static void take_chunks(Job& job) {
        ProgramSession& self = *job.self;
        Index chunk = job.next.fetch_add(1);
        const std::uint64_t begin = job.profile ? ticks() : 0;
        if (job.profile) self.count_thread(*job.profile);
        if (chunk >= job.chunks) return;
        try {
            std::unique_ptr<Worker> worker = self.borrow();
            Meter* const meter = job.profile ? &worker->meter : nullptr;
            worker->tile->measure(meter);
            if (meter) meter->begin(worker->tile->parts().count(), begin);
            worker->tile->begin_call();
            for (; chunk < job.chunks; chunk = job.next.fetch_add(1)) self.run_chunk(job, chunk, *worker->tile, meter);
            if (meter) self.collect(*meter, *job.profile);
            self.give_back(std::move(worker));
        } catch (const std::bad_alloc&) {
            job.failed = true;
        }
    }

    void run_chunk(const Job& job, Index chunk, TileOf& tile, Meter* meter) {
        Partial<T> sums{nullptr, nullptr};
        if (program_.gradient) {
            // Of gradients by the data alone there are no sums, and no memory for them.
            if (partials_.p) std::memset(partials_.p + chunk * partial_bytes(), 0, static_cast<std::size_t>(partial_bytes()));
            sums = partial(chunk);
        }
        if (meter) meter->lap(START, OUTSIDE);
        const Index end = (chunk + 1) * job.tiles / job.chunks;
        for (Index i = chunk * job.tiles / job.chunks; i < end; ++i) {
            const Index first = i * TileOf::most_tasks;
            tile.run(*job.data, first, smaller(TileOf::most_tasks, job.data->tasks - first), sums);
        }
    }

    void count_thread(Profile& profile) {
        const std::lock_guard<std::mutex> lock(keeping_);
        ++profile.threads;
    }
    void collect(Meter& meter, Profile& profile) {
        const std::lock_guard<std::mutex> lock(keeping_);
        meter.add_to(profile.cells);
    }

    // ---- partial sums: doubles of the rates first, then numbers

    Index rate_bytes() const { return ceil_div(blueprint_->rate_numbers() * 8, 64) * 64; }
    Index partial_bytes() const { return partial_bytes_; }
    Partial<T> partial(Index chunk) const {
        char* p = partials_.p + chunk * partial_bytes();
        return {reinterpret_cast<T*>(p + rate_bytes()), reinterpret_cast<double*>(p)};
    }

    void add_up(Job& job, Pool& pool, int threads) {
        Index pieces = 0;
        for (const Place& place : blueprint_->places()) {
            job.pieces.push_back({pieces});
            pieces += place.layer->pieces() * (1 + place.more_of_weight) + 2;
        }
        job.pieces.push_back({pieces});
        const bool alone = blueprint_->sum_numbers() * job.chunks < SHARED_SUM;
        pool.run(alone ? 1 : threads, [](void* context) { add_up_pieces(*static_cast<Job*>(context)); }, &job);
        add_up_rates(job);
    }

    // Pieces of gradients, as they come; each is summed by one thread, over the chunks in order.
    static void add_up_pieces(Job& job) {
        constexpr Index AT_ONCE = 16;
        const auto& places = job.self->blueprint_->places();
        const Index pieces = job.pieces.back().begin;
        for (Index first = job.next_piece.fetch_add(AT_ONCE); first < pieces; first = job.next_piece.fetch_add(AT_ONCE)) {
            const Index end = smaller(first + AT_ONCE, pieces);
            std::size_t which = 0;
            for (Index i = first; i < end; ++i) {
                while (i >= job.pieces[which + 1].begin) ++which;
                if (!job.self->add_up_piece(job, places[which], i - job.pieces[which].begin)) job.finite = false;
            }
        }
    }
    bool add_up_piece(const Job& job, const Place& place, Index i) const {
        const Layer& layer = place.layer->description();
        const Index pieces = place.layer->pieces(), of_weight = pieces * (1 + place.more_of_weight);
        const Index length = place.layer->bias_length();
        if (i == of_weight) return sum(job, {place.bias, length, 0}, static_cast<T*>(layer.bias_gradient));
        if (i > of_weight) {
            T* to = static_cast<T*>(layer.bias_by_step ? layer.bias_gradient : layer.bias_rate_gradients);
            return sum(job, {place.bias + length, length * place.more_of_bias, layer.bias_by_step ? length : 0}, to);
        }
        const Index block = i / pieces;
        Piece piece = place.layer->piece(i % pieces);
        piece.from += place.weight + block * place.layer->sum_length();
        if (block == 0 || layer.weight_by_step) {
            piece.to += block * layer.weight_numbers();
            return sum(job, piece, static_cast<T*>(layer.weight_gradient));
        }
        piece.to += (block - 1) * layer.weight_numbers();
        return sum(job, piece, static_cast<T*>(layer.weight_rate_gradients));
    }
    // Whether the sums are finite.
    bool sum(const Job& job, Piece piece, T* gradient) const {
        if (!gradient) return true;
        T* to = gradient + piece.to;
        if (piece.by == 1) {
            sum(job, piece.from, piece.count, to);
            return finite(to, piece.count);
        }
        constexpr Index AT_ONCE = 256;
        T sums[AT_ONCE];
        bool all_finite = true;
        for (Index i = 0; i < piece.count; i += AT_ONCE) {
            const Index count = smaller(AT_ONCE, piece.count - i);
            sum(job, piece.from + i, count, sums);
            all_finite &= finite(sums, count);
            for (Index j = 0; j < count; ++j) to[(i + j) * piece.by] = sums[j];
        }
        return all_finite;
    }
    void sum(const Job& job, Index at, Index count, T* to) const {
        const T* from = partial(0).numbers + at;
        const Index stride = partial_bytes_ / static_cast<Index>(sizeof(T));
        Index i = 0;
        for (; i + LANES<T> <= count; i += LANES<T>) {
            Vec<T> total = load(from + i);
            for (Index chunk = 1; chunk < job.chunks; ++chunk) total += load(from + chunk * stride + i);
            store(to + i, total);
        }
        for (; i < count; ++i) {
            T total = from[i];
            for (Index chunk = 1; chunk < job.chunks; ++chunk) total += from[chunk * stride + i];
            to[i] = total;
        }
    }
    // x - x is 0 unless x is infinite or NaN.
    static bool finite(const T* p, Index count) {
        T sum = 0;
        for (Index i = 0; i < count; ++i) sum += p[i] - p[i];
        return sum == 0;
    }
    bool finite_results(const TaskData& data) const {
        return finite(static_cast<const T*>(data.support_losses), data.tasks * program_.steps) &&
               (!data.query_y.p || finite(static_cast<const T*>(data.task_losses), data.tasks)) &&
               finite_rows(data.by_support_x, data.tasks * program_.rows) &&
               finite_rows(data.by_query_x, data.tasks * program_.query_rows);
    }
    bool finite_rows(const void* by_x, Index rows) const {
        return !by_x || finite(static_cast<const T*>(by_x), rows * program_.in_features);
    }
    void add_up_rates(Job& job) const {
        Index at = 0;
        for (const Place& place : blueprint_->places()) {
            if (double* to = place.layer->description().rate_gradients)
                for (Index i = 0; i < 2 * program_.steps; ++i) {
                    double total = 0;
                    for (Index chunk = 0; chunk < job.chunks; ++chunk) total += partial(chunk).rates[at + i];
                    to[i] = total;
                    if (total - total != 0) job.finite = false;
                }
            at += 2 * program_.steps;
        }
    }

    // ---- memory of the threads

    std::unique_ptr<Worker> borrow() {
        {
            const std::lock_guard<std::mutex> lock(keeping_);
            if (!idle_.empty()) {
                std::unique_ptr<Worker> worker = std::move(idle_.back());
                idle_.pop_back();
                return worker;
            }
        }
        std::unique_ptr<Worker> worker(new Worker());
        worker->memory.fit(counted_.used());
#if defined(__SANITIZE_ADDRESS__)
        std::memset(worker->memory.p, -1, static_cast<std::size_t>(counted_.used()));  // NaN
#endif
        if (TileOf::begins_with_zeros) std::memset(worker->memory.p, 0, static_cast<std::size_t>(counted_.used()));
        Arena arena(worker->memory.p);
        worker->tile.reset(new TileOf(program_, arena));
        return worker;
    }
    void give_back(std::unique_ptr<Worker> worker) {
        const std::lock_guard<std::mutex> lock(keeping_);
        idle_.push_back(std::move(worker));
    }
    void tidy() {
        if (counted_.used() > KEPT_BYTES) idle_.clear();
        if (partials_.bytes > KEPT_BYTES) partials_.release();
    }

    const Program& program_;
    Arena counted_;
    std::unique_ptr<TileOf> blueprint_;  // for its sizes; it has no memory
    std::mutex keeping_;
    std::vector<std::unique_ptr<Worker>> idle_;
    Block partials_;
    Index partial_bytes_;
};

}  // namespace maml_fast::MAML_FAST_ISA
