// Reads KIVI's groups, see codecs/integer.py: a minimum and a scale for each channel of 32 tokens of keys, and for each 32
// channels of a token of values. For tiles.hpp.

namespace {

class ReadGroups : public Reader {
  public:
    ReadGroups(const Scalars& coder, int chunks, Memory& memory)
        : dim_(4 * chunks),
          spans_((dim_ + SPAN - 1) / SPAN),
          bytes_(coder.row_bytes(chunks)),
          unpack_(coder.bits),
          scale_(memory.take<float>(size_t(dim_) + SLACK)),
          low_(memory.take<float>(size_t(dim_) + SLACK)) {}

    void lengths(const Side&, int64_t, int64_t, int n, float* to) const override {
        std::fill(to, to + n, 1.0f);
        std::fill(to + n, to + UNIT, 0.0f);
    }

    void read(const Unit& unit, float* to) override {
        const Side& side = *unit.side;
        const uint8_t* row = unit.codes;
        const float *scale = scale_, *low = low_;
        for (int j = 0; j < unit.count; ++j, row += bytes_, to += dim_) {
            const int64_t token = unit.token + j;
            if (side.role == KEY) {
                find(side, unit.line, (side.offset + token) / SPAN);
                unpack_(row, dim_, [=](int c, IntLanes codes) { store(to + c, __builtin_convertvector(codes, Lanes) * load(scale + c) + load(low + c)); });
            } else {
                halves_to_floats(side.scale.row(unit.line, token, 2 * spans_), spans_, scale_);
                halves_to_floats(side.low.row(unit.line, token, 2 * spans_), spans_, low_);
                unpack_(row, dim_, [=](int c, IntLanes codes) { store(to + c, __builtin_convertvector(codes, Lanes) * scale[c / SPAN] + low[c / SPAN]); });
            }
        }
    }

  private:
    static constexpr int SPAN = Scalars::BLOCK;

    // Scale and minimum of each channel of a group.
    void find(const Side& side, int64_t line, int64_t group) {
        if (side_ == &side && line_ == line && group_ == group) return;
        side_ = &side, line_ = line, group_ = group;
        halves_to_floats(side.scale.row(line, group, 2 * dim_), dim_, scale_);
        halves_to_floats(side.low.row(line, group, 2 * dim_), dim_, low_);
    }

    const int dim_, spans_;
    const int64_t bytes_;
    const Unpack unpack_;
    float *const scale_, *const low_;
    const Side* side_ = nullptr;
    int64_t line_ = -1, group_ = -1;
};

}  // namespace
