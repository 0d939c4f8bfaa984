#include "memory.hpp"

#include <mutex>

namespace tessera {

namespace {

constexpr size_t SIZE = size_t{1} << 20, LINE = 64;

// Never destroyed: threads may outlive the interpreter's teardown.
struct Free {
    std::mutex mutex;
    std::vector<std::unique_ptr<uint8_t[]>> blocks;
    static Free& get() {
        static Free* free = new Free;
        return *free;
    }
};

uint8_t* aligned(uint8_t* at) { return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(at) + LINE - 1) / LINE * LINE); }

}  // namespace

Memory::Memory() {
    Free& free = Free::get();
    const std::lock_guard<std::mutex> lock(free.mutex);
    if (free.blocks.empty()) {
        block_.reset(new uint8_t[SIZE + LINE]);
    } else {
        block_ = std::move(free.blocks.back());
        free.blocks.pop_back();
    }
}

Memory::~Memory() {
    Free& free = Free::get();
    const std::lock_guard<std::mutex> lock(free.mutex);
    free.blocks.push_back(std::move(block_));
}

void* Memory::bytes(size_t count) {
    const size_t rounded = (count + LINE - 1) / LINE * LINE;
    if (used_ + rounded <= SIZE) {
        uint8_t* at = aligned(block_.get()) + used_;
        used_ += rounded;
        return at;
    }
    more_.emplace_back(new uint8_t[rounded + LINE]);
    return aligned(more_.back().get());
}

}  // namespace tessera
