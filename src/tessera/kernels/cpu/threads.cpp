#include "threads.hpp"

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace tessera {

static Threads* pool = nullptr;
static Threads::Parallel parallel = nullptr;
static Threads::Number number = nullptr;

void Threads::use(Parallel p, Number n) {
    parallel = p;
    number = n;
}

namespace {

struct Shared {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    int workers;
    const std::function<void(int64_t, int)>* work;
};

void share(void* data) {
    auto& shared = *static_cast<Shared*>(data);
    const int who = number();
    if (who >= shared.workers) return;
    for (int64_t i; (i = shared.next.fetch_add(1)) < shared.tasks;) (*shared.work)(i, who);
}

}  // namespace

Threads& Threads::get() {
    static std::once_flag once;
    std::call_once(once, [] {
        pool = new Threads;
#if !defined(_WIN32)
        // A forked child has none of the threads, so it starts with a new pool.
        pthread_atfork(nullptr, nullptr, [] { pool = new Threads; });
#endif
    });
    return *pool;
}

void Threads::run(int64_t tasks, int workers, const std::function<void(int64_t, int)>& work) {
    if (workers > tasks) workers = int(tasks);
    if (workers <= 1) {
        for (int64_t i = 0; i < tasks; ++i) work(i, 0);
        return;
    }
    if (parallel) {
        Shared shared;
        shared.tasks = tasks, shared.workers = workers, shared.work = &work;
        parallel(share, &shared, unsigned(workers), 0);
        return;
    }
    std::lock_guard<std::mutex> guard(caller_);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        while (int(threads_.size()) < workers - 1) {
            const int worker = int(threads_.size()) + 1;
            threads_.emplace_back([this, worker] { serve(worker); });
            threads_.back().detach();
        }
        work_ = &work;
        tasks_ = tasks;
        next_ = 0;
        wanted_ = workers - 1;
        busy_ = wanted_;
        ++job_;
    }
    wake_.notify_all();
    for (int64_t i; (i = next_.fetch_add(1)) < tasks;) work(i, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait(lock, [this] { return busy_ == 0; });
    work_ = nullptr;
}

void Threads::serve(int worker) {
    int64_t done = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        wake_.wait(lock, [&] { return job_ != done && work_ != nullptr; });
        done = job_;
        if (worker > wanted_) continue;
        const auto* work = work_;
        const int64_t tasks = tasks_;
        lock.unlock();
        for (int64_t i; (i = next_.fetch_add(1)) < tasks;) (*work)(i, worker);
        lock.lock();
        if (--busy_ == 0) idle_.notify_one();
    }
}

}  // namespace tessera
