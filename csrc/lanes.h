// The two layouts of activations, and the way of data into them and out.
//
// An activation is [features][columns] of vectors. TasksInLanes: a vector holds one row each of L tasks, a column is a row.
// RowsInLanes: all of one task; a vector holds L of its rows. Products with weights that all lanes share are the same in
// both. What differs is what belongs to a single task: its weights, and the rows of earlier steps in factored form. They
// are vectors in the first layout and plain numbers in the second: a `Unit`, of `unit` numbers.
#pragma once

#include <new>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "simd.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T>
struct TasksInLanes {
    static constexpr bool tasks = true;
    static constexpr Index unit = LANES<T>;
    using Unit = Vec<T>;
    static MAML_FAST_INLINE Unit read(const T* p) { return load(p); }
    static MAML_FAST_INLINE void write(T* p, Unit u) { store(p, u); }
    static MAML_FAST_INLINE Unit same(T x) { return all(x); }             // for all tasks
    static MAML_FAST_INLINE Unit over_rows(Vec<T> v) { return v; }        // each task's sum over its rows in v
    static MAML_FAST_INLINE Vec<T> in_lanes(Unit u) { return u; }         // for each lane, its task's
    static MAML_FAST_INLINE T over_tasks(Unit u) { return lane_sum<T>(u); }
    static constexpr Index columns(Index rows) { return rows; }
    // Rows of a history of so many columns, each a unit.
    static constexpr Index units(Index columns) { return columns; }
};

template <class T>
struct RowsInLanes {
    static constexpr bool tasks = false;
    static constexpr Index unit = 1;
    using Unit = T;
    static MAML_FAST_INLINE Unit read(const T* p) { return *p; }
    static MAML_FAST_INLINE void write(T* p, Unit u) { *p = u; }
    static MAML_FAST_INLINE Unit same(T x) { return x; }
    static MAML_FAST_INLINE Unit over_rows(Vec<T> v) { return lane_sum<T>(v); }
    static MAML_FAST_INLINE Vec<T> in_lanes(Unit u) { return all(u); }
    static MAML_FAST_INLINE T over_tasks(Unit u) { return u; }
    static constexpr Index columns(Index rows) { return ceil_div(rows, LANES<T>); }
    static constexpr Index units(Index columns) { return columns * LANES<T>; }
};

// [features][columns] of vectors; `by_feature` counts elements.
template <class T>
struct View {
    T* p = nullptr;
    Index by_feature = 0;
    Index features = 0;
    Index columns = 0;

    View columns_from(Index start, Index count) const { return {p + start * LANES<T>, by_feature, features, count}; }
    Index numbers() const { return columns * LANES<T>; }
};

template <class T>
void clear(const View<T>& view) {
    for (Index f = 0; f < view.features; ++f)
        std::memset(view.p + f * view.by_feature, 0, static_cast<std::size_t>(view.numbers()) * sizeof(T));
}
// to += from
template <class T>
void add_to(const View<T>& to, const View<T>& from) {
    for (Index f = 0; f < to.features; ++f)
        for (Index n = 0; n < to.numbers(); n += LANES<T>) {
            T* at = to.p + f * to.by_feature + n;
            store(at, load(at) + load(from.p + f * from.by_feature + n));
        }
}

// Numbers without a shape. (A plain pointer as element of a std::vector would be a type that all instruction sets share.)
template <class T>
struct Numbers {
    T* p = nullptr;
};

// A stride of at least `vectors` vectors that does not bring the same few cache sets round again.
template <class T>
constexpr Index spread(Index vectors) {
    constexpr Index a_line = larger(64 / VECTOR_BYTES, 1);
    if (vectors < 4 * a_line) return vectors * LANES<T>;
    const Index lines = ceil_div(vectors, a_line);
    return (lines | 1) * a_line * LANES<T>;
}

// Memory that is handed out in order, in whole vectors. Without a base it only counts, and the pointers are not to be used.
// The address sanitizer finds gaps between the pieces, in which nothing has any business.
class Arena {
   public:
    explicit Arena(char* base = nullptr) : base_(base) {}

    template <class T>
    T* take(Index count) {
        const Index at = used_;
        used_ += ceil_div(count * static_cast<Index>(sizeof(T)), 64) * 64;
#if defined(__SANITIZE_ADDRESS__)
        constexpr Index GAP = 256;
        if (base_) ASAN_POISON_MEMORY_REGION(base_ + used_, GAP);
        used_ += GAP;
#endif
        if (account_) *account_ += used_ - at;
        return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
    }
    template <class T>
    View<T> view(Index features, Index columns) {
        const Index by_feature = spread<T>(columns);
        return {take<T>(features * by_feature), by_feature, features, columns};
    }
    Index used() const { return used_; }
    // What is taken from here on is added up there too.
    void charge(Index& account) { account_ = &account; }

   private:
    char* base_;
    Index* account_ = nullptr;
    Index used_ = 0;
};

// What an arena lies in: memory aligned to a cache line, kept until more is wanted.
struct Block {
    char* p = nullptr;
    Index bytes = 0;
    Block() = default;
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    ~Block() { release(); }
    void fit(Index wanted) {
        if (bytes >= wanted) return;
        release();
        p = static_cast<char*>(::operator new(static_cast<std::size_t>(wanted), std::align_val_t(64)));
        bytes = wanted;
    }
    void release() {
#if defined(__SANITIZE_ADDRESS__)
        if (p) ASAN_UNPOISON_MEMORY_REGION(p, bytes);
#endif
        if (p) ::operator delete(p, std::align_val_t(64));
        p = nullptr;
        bytes = 0;
    }
};

// Memory for the inside of one operation, as large as the largest of a tile needs.
template <class T>
class Workspace {
   public:
    void needs(Index numbers) { size_ = larger(size_, numbers); }
    void allocate(Arena& arena) { p_ = arena.template take<T>(size_); }
    View<T> view(Index features, Index columns) const { return {p_, spread<T>(columns), features, columns}; }
    T* numbers() const { return p_; }

   private:
    T* p_ = nullptr;
    Index size_ = 0;
};

// One column: lane j gets the row at rows[j], [features].
template <class T>
void load_column(const T* const* rows, const View<T>& to, Index column) {
    constexpr Index L = LANES<T>;
    T* out = to.p + column * L;
    Index f = 0;
    for (; f + L <= to.features; f += L) {
        Vec<T> v[L];
        for (Index j = 0; j < L; ++j) v[j] = load(rows[j] + f);
        transpose<T>(v);
        for (Index j = 0; j < L; ++j) store(out + (f + j) * to.by_feature, v[j]);
    }
    for (; f < to.features; ++f)
        for (Index j = 0; j < L; ++j) out[f * to.by_feature + j] = rows[j][f];
}

// The way back; rows that are null are left out.
template <class T>
void store_column(const View<T>& from, Index column, T* const* rows) {
    constexpr Index L = LANES<T>;
    const T* in = from.p + column * L;
    Index f = 0;
    for (; f + L <= from.features; f += L) {
        Vec<T> v[L];
        for (Index j = 0; j < L; ++j) v[j] = load(in + (f + j) * from.by_feature);
        transpose<T>(v);
        for (Index j = 0; j < L; ++j)
            if (rows[j]) store(rows[j] + f, v[j]);
    }
    for (; f < from.features; ++f)
        for (Index j = 0; j < L; ++j)
            if (rows[j]) rows[j][f] = in[f * from.by_feature + j];
}

}  // namespace maml_fast::MAML_FAST_ISA
