// Runs work items on the OpenMP thread pool that torch already has: a second pool would fight with it for the cores.
//
// The pool is entered through libgomp's `GOMP_parallel`, which LLVM's libomp also exports; its address is handed in by
// the caller, so that this library links to no OpenMP runtime of its own. Without it everything runs on one thread.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vsl {

using ParallelFn = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Memory of one worker thread, kept between calls and only ever grown.
class Scratch {
   public:
    ~Scratch() { std::free(data_); }
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    void* reserve(size_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + 4095) / 4096 * 4096;
            data_ = std::aligned_alloc(4096, size_);
            if (data_ == nullptr) std::abort();  // as torch would fail: there is no memory left for a step
        }
        return data_;
    }

   private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

using Body = void (*)(void* data, int worker);

// Spins for the time of a small job, then lets others have the core between one look and the next.
class Wait {
   public:
    void moment() {
        if (++moments_ > 4000) sched_yield();
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

   private:
    int moments_ = 0;
};

// Threads that stay together for many jobs: `run` hands one to all of them without a system call. A thread that is late,
// because its core is busy with something else, misses the job instead of holding it up.
class Team {
   public:
    // On the leader. Returns when all who began the job are done with it.
    void run(Body body, void* data) {
        body_ = body, data_ = data;
        ticket_.fetch_add(1);  // odd: open
        body(data, 0);
        ticket_.fetch_add(1);
        for (Wait wait; active_.load() != 0;) wait.moment();
    }

    // On the leader, when no job will come any more.
    void finish() { ticket_.store(kFinished); }

    // On every other thread, until the leader finishes.
    void follow(int worker) {
        uint32_t done = 0;
        for (Wait wait;;) {
            const uint32_t ticket = ticket_.load(std::memory_order_acquire);
            if (ticket == kFinished) return;
            if (ticket % 2 == 0 || ticket == done) {
                wait.moment();
                continue;
            }
            // Either the leader sees this thread and waits for it, or this thread sees that the job is closed.
            active_.fetch_add(1);
            if (ticket_.load() == ticket) body_(data_, worker);
            active_.fetch_sub(1);
            done = ticket;
            wait = Wait();
        }
    }

   private:
    static constexpr uint32_t kFinished = ~1u;

    std::atomic<uint32_t> ticket_{0};
    std::atomic<int> active_{0};
    Body body_ = nullptr;
    void* data_ = nullptr;
};

struct Context {
    ParallelFn parallel = nullptr;
    int threads = 1;
    bool amx = false;
    bool fixed_order = false;  // a token's sums are the same however many tokens it comes with
    Team* team = nullptr;  // while one is together
    std::vector<Scratch> scratch, gates;  // one a worker
    Scratch shared, packed, activations, pairs;
};

// Calls body(data, worker) on all threads that there are; `worker` is below context.threads.
inline void fork(Context& context, Body body, void* data) {
    if (context.team != nullptr) return context.team->run(body, data);
    struct Job {
        Body body;
        void* data;
        std::atomic<int> next_worker{0};
    } job{body, data, {0}};
    const auto enter = [](void* data) {
        Job& job = *static_cast<Job*>(data);
        job.body(job.data, job.next_worker.fetch_add(1, std::memory_order_relaxed));
    };
    context.parallel(enter, &job, (unsigned)context.threads, 0);
}

// Runs program() with the threads together, so that going from one job to the next takes them no time.
template <class Program>
void run_together(Context& context, const Program& program) {
    if (context.threads == 1) return program();
    Team team;
    struct Job {
        Context& context;
        const Program& program;
        Team& team;
    } job{context, program, team};
    const Body body = [](void* data, int worker) {
        Job& job = *static_cast<Job*>(data);
        if (worker != 0) return job.team.follow(worker);
        job.context.team = &job.team;
        job.program();
        job.context.team = nullptr;
        job.team.finish();
    };
    fork(context, body, &job);
}

// Calls work(item, worker) for every item in [0, items), each once; workers take the next item as they get free, so a
// core that is busy with something else only delays the item it has.
template <class Work>
void run_items(Context& context, int items, const Work& work) {
    if (context.threads == 1 || items <= 1) {
        for (int item = 0; item < items; item++) work(item, 0);
        return;
    }
    struct Job {
        const Work& work;
        const int items;
        std::atomic<int> next_item{0};
    } job{work, items};
    const Body body = [](void* data, int worker) {
        Job& job = *static_cast<Job*>(data);
        for (;;) {
            const int item = job.next_item.fetch_add(1, std::memory_order_relaxed);
            if (item >= job.items) return;
            job.work(item, worker);
        }
    };
    fork(context, body, &job);
}

// As run_items, but from item `shared` on every worker goes through a stretch of items of its own from its first to its
// last, so that what it asks for ahead is what it reads next. Who is done takes the last item that another has left.
template <class Work>
void run_stretches(Context& context, int items, const Work& work, int shared = 0) {
    if (context.threads == 1 || items <= 1) {
        for (int item = 0; item < items; item++) work(item, 0);
        return;
    }
    struct alignas(64) Stretch {
        std::atomic<uint64_t> range{0};  // begin << 32 | end
        int take(bool front) {
            uint64_t now = range.load(std::memory_order_relaxed);
            for (;;) {
                const uint32_t begin = (uint32_t)(now >> 32), end = (uint32_t)now;
                if (begin >= end) return -1;
                const uint64_t next = front ? (uint64_t)(begin + 1) << 32 | end : (uint64_t)begin << 32 | (end - 1);
                if (range.compare_exchange_weak(now, next, std::memory_order_relaxed))
                    return (int)(front ? begin : end - 1);
            }
        }
    };
    struct Job {
        const Work& work;
        const int workers, shared;
        std::atomic<int> next_shared{0};
        std::vector<Stretch> stretches;
    } job{work, context.threads, shared, {0}, std::vector<Stretch>(context.threads)};
    for (int64_t w = 0, own = items - shared; w < context.threads; w++)
        job.stretches[w].range =
            (uint64_t)(shared + own * w / context.threads) << 32 | (shared + own * (w + 1) / context.threads);
    const Body body = [](void* data, int worker) {
        Job& job = *static_cast<Job*>(data);
        for (int item; (item = job.next_shared.fetch_add(1, std::memory_order_relaxed)) < job.shared;)
            job.work(item, worker);
        for (int i = 0; i < job.workers; i++)
            for (int item; (item = job.stretches[(worker + i) % job.workers].take(i == 0)) >= 0;)
                job.work(item, worker);
    };
    fork(context, body, &job);
}

// Splits [0, rows) into ranges of at least `least` rows and calls work(begin, end) for each.
template <class Work>
void run_ranges(Context& context, int64_t rows, int64_t least, const Work& work) {
    if (least < 1) least = 1;
    int64_t parts = rows / least;
    if (parts > 4 * context.threads) parts = 4 * context.threads;
    if (context.threads == 1 || parts < 2) {
        if (rows > 0) work((int64_t)0, rows);
        return;
    }
    run_items(context, (int)parts,
              [&](int item, int) { work(rows * item / parts, rows * (item + 1) / parts); });
}

}  // namespace vsl
