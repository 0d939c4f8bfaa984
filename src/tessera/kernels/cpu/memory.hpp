// Working memory of a thread, kept from call to call: pages that go back to the system must be faulted in again, which for
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

    // Room for `count` of T, not initialised, at a multiple of 64 bytes, until this is destroyed.
    template <class T>
    T* take(size_t count) {
        return static_cast<T*>(bytes(count * sizeof(T)));
    }

  private:
    void* bytes(size_t count);

    std::unique_ptr<uint8_t[]> block_;  // of a fixed size, from a list of those that are free
    size_t used_ = 0;
    std::vector<std::unique_ptr<uint8_t[]>> more_;  // what did not fit there
};

}  // namespace tessera
