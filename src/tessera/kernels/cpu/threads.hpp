// Threads for the kernels: those of the OpenMP runtime that the process has already loaded, because its idle threads spin for a
// while and would compete with others; otherwise a small thread pool.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace tessera {

class Threads {
  public:
    // Entries of an OpenMP runtime: GOMP_parallel and omp_get_thread_num. Null: use threads of our own.
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
    using Number = int (*)();
    static void use(Parallel parallel, Number number);

    // The one pool of the process. It is never destroyed: threads may outlive the interpreter's teardown.
    static Threads& get();

    // Calls work(task, worker) for every task in [0, tasks), on at most `workers` threads, including the caller's. `worker`
    // counts from 0 and is below `workers`. Returns when all tasks are done. One caller at a time; others wait.
    void run(int64_t tasks, int workers, const std::function<void(int64_t, int)>& work);

  private:
    void serve(int worker);

    std::mutex caller_;  // held by the caller whose work is running
    std::mutex mutex_;
    std::condition_variable wake_, idle_;
    std::vector<std::thread> threads_;
    const std::function<void(int64_t, int)>* work_ = nullptr;
    std::atomic<int64_t> next_{0};
    int64_t tasks_ = 0, job_ = 0;
    int wanted_ = 0, busy_ = 0;
};

}  // namespace tessera
