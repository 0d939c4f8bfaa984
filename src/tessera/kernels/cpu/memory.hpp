// Scratch memory of a thread, kept between calls: pages returned to the system must be faulted in again, which for
// short sequences takes longer than the work.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace tessera {

class Memory {
  public:
    Memory();
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    // Allocates `count` of T, uninitialised and aligned to 64 bytes, until this object is destroyed.
    template <class T>
    T* take(size_t count) {
        return static_cast<T*>(bytes(count * sizeof(T)));
    }

  private:
    void* bytes(size_t count);

    std::unique_ptr<uint8_t[]> block_;  // of a fixed size, from a free list
    size_t used_ = 0;
    std::vector<std::unique_ptr<uint8_t[]>> more_;  // allocations that did not fit
};

}  // namespace tessera
