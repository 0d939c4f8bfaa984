// Reads uniform codes counted from the lowest, `int`, and codes of levels in a table, `scalar`, with one scale per
// vector. For tiles.hpp.

namespace {

class ReadUniform : public Reader {
  public:
    ReadUniform(const Scalars& coder, int chunks) : coder_(coder), chunks_(chunks), unpack_(coder.bits) {}

    void lengths(const Side& side, int64_t line, int64_t token, int n, float* to) const override {
        read_halves(side, line, token, n, coder_.factor, to);
    }

    void read(const Unit& unit, float* to) override {
        const int dim = 4 * chunks_;
        const int64_t bytes = coder_.row_bytes(chunks_);
        const float zero = coder_.zero;
        const uint8_t* row = unit.codes;
        for (int j = 0; j < unit.count; ++j, row += bytes, to += dim)
            unpack_(row, dim, [=](int c, IntLanes codes) { store(to + c, __builtin_convertvector(codes, Lanes) - zero); });
    }

  private:
    const Scalars& coder_;
    const int chunks_;
    const Unpack unpack_;
};

// Looks numbers up in a table of up to 64, in registers if there are few.
class Table {
  public:
    explicit Table(const std::vector<float>& levels) : count_(int(levels.size())) {
        for (int i = 0; i < 64; ++i) levels_[i] = i < count_ ? levels[size_t(i)] : 0.0f;
    }

    // Calls `use` with the fastest lookup function for this many levels.
    template <class Use>
    inline __attribute__((always_inline)) void with(const Use& use) const {
#if TESSERA_LANES == 16
        const __m512 a = _mm512_load_ps(levels_), b = _mm512_load_ps(levels_ + 16);
        if (count_ <= 16) return use([=](IntLanes codes) { return Lanes(_mm512_permutexvar_ps(__m512i(codes), a)); });
        if (count_ <= 32) return use([=](IntLanes codes) { return Lanes(_mm512_permutex2var_ps(a, __m512i(codes), b)); });
        const __m512 c = _mm512_load_ps(levels_ + 32), d = _mm512_load_ps(levels_ + 48);
        use([=](IntLanes codes) {
            const __m512i i = __m512i(codes);
            const __mmask16 high = _mm512_test_epi32_mask(i, _mm512_set1_epi32(32));
            return Lanes(_mm512_mask_blend_ps(high, _mm512_permutex2var_ps(a, i, b), _mm512_permutex2var_ps(c, i, d)));
        });
#elif TESSERA_LANES == 8
        const __m256 a = _mm256_load_ps(levels_), b = _mm256_load_ps(levels_ + 8);
        if (count_ <= 8) return use([=](IntLanes codes) { return Lanes(_mm256_permutevar8x32_ps(a, __m256i(codes))); });
        if (count_ <= 16)
            return use([=](IntLanes codes) {
                const __m256i i = __m256i(codes);
                const __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
                return Lanes(_mm256_blendv_ps(_mm256_permutevar8x32_ps(a, i), _mm256_permutevar8x32_ps(b, i), high));
            });
        const float* levels = levels_;
        use([=](IntLanes codes) { return Lanes(_mm256_i32gather_ps(levels, __m256i(codes), 4)); });
#else
        const float* levels = levels_;
        use([=](IntLanes codes) {
            Lanes found;
            for (int i = 0; i < LANES; ++i) found[i] = levels[codes[i]];
            return found;
        });
#endif
    }

  private:
    const int count_;
    alignas(64) float levels_[64];
};

class ReadLevels : public Reader {
  public:
    ReadLevels(const Scalars& coder, int chunks) : coder_(coder), chunks_(chunks), unpack_(coder.bits), table_(coder.levels) {}

    void lengths(const Side& side, int64_t line, int64_t token, int n, float* to) const override {
        read_halves(side, line, token, n, coder_.factor, to);
    }

    void read(const Unit& unit, float* to) override {
        table_.with([&](const auto& level) __attribute__((always_inline)) {
            const int dim = 4 * chunks_;
            const int64_t bytes = coder_.row_bytes(chunks_);
            const uint8_t* row = unit.codes;
            float* at = to;
            for (int j = 0; j < unit.count; ++j, row += bytes, at += dim)
                unpack_(row, dim, [=](int c, IntLanes codes) { store(at + c, level(codes)); });
        });
    }

  private:
    const Scalars& coder_;
    const int chunks_;
    const Unpack unpack_;
    const Table table_;
};

}  // namespace
