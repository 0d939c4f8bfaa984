// Provides codes to kernels that load whole registers of them. Included once per instruction set, after prefetch.hpp.

namespace {

// Returns the codes of the UNIT tokens of a unit, copied where whole registers would read past the end.
class Rows {
  public:
    // exact: loads stay within a row.
    Rows(int64_t bytes, bool exact, int units, Memory& memory)
        : bytes_(bytes), exact_(exact), copies_(exact ? nullptr : memory.take<uint8_t>(size_t(units) * UNIT * size_t(bytes + SLACK))) {}

    // Missing tokens get the codes of another, since their weights are zero. `number`: index of the unit, whose copies are
    // kept.
    void find(const Unit& unit, int number, const uint8_t** to) const {
        prefetch(unit.codes + AHEAD * UNIT * bytes_, UNIT * bytes_);
        uint8_t* copy = exact_ ? nullptr : copies_ + size_t(number) * UNIT * size_t(bytes_ + SLACK);
        const int last = std::min(unit.count, UNIT) - 1;
        for (int j = 0; j < UNIT; ++j) {
            const int64_t behind = (unit.count - 1 - std::min(j, last)) * bytes_;
            to[j] = unit.codes + std::min(j, last) * bytes_;
            if (exact_ || behind >= SLACK) continue;
            std::memcpy(copy, to[j], size_t(bytes_));
            to[j] = copy;
            copy += bytes_ + SLACK;
        }
    }

  private:
    static constexpr int64_t SLACK = 32;  // bytes that may be read beyond a row

    const int64_t bytes_;
    const bool exact_;
    uint8_t* const copies_;
};

}  // namespace
