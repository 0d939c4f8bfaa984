// Selects the reader of each format for attention and decoding by tiles. Included once per instruction set.

#include "tiles.hpp"
#include "read_points.hpp"
#include "read_directions.hpp"
#include "unpack.hpp"
#include "read_uniform.hpp"
#include "read_blocks.hpp"
#include "read_groups.hpp"
#include "read_fp8.hpp"

namespace {

inline std::unique_ptr<Reader> make_reader(const Coder& coder, int chunks, int heads, Memory& memory) {
    using Made = std::unique_ptr<Reader>;
    if (coder.kind == Coder::JOINT) return Made(new ReadPoints(static_cast<const Book&>(coder), chunks, memory));
    if (coder.kind == Coder::PRODUCT) return Made(new ReadDirections(static_cast<const Products&>(coder), chunks, heads));
    const Scalars& scalars = static_cast<const Scalars&>(coder);
    switch (scalars.form) {
        case Scalars::UNIFORM: return Made(new ReadUniform(scalars, chunks));
        case Scalars::LEVELS: return Made(new ReadLevels(scalars, chunks));
        case Scalars::BLOCKS: return Made(new ReadBlocks(scalars, chunks));
        case Scalars::GROUPS: return Made(new ReadGroups(scalars, chunks, memory));
        default: return Made(new ReadFp8(scalars, chunks));
    }
}

// Whether both keys and values have a joint codebook, for which there are specialised kernels. P: Problem or Paged.
template <class P>
inline bool both_joint(const P& p) {
    return p.key->kind == Coder::JOINT && p.value->kind == Coder::JOINT;
}

inline void attend_tiles(Problem p) {
    Memory memory;
    std::vector<Page> pages;
    if (p.key->kind == Coder::PRODUCT || p.value->kind == Coder::PRODUCT) {
        pages = counted(p.pages, p.page_count, int64_t(p.batch) * p.kv_heads, p.dim / 4, p.threads, memory);
        p.pages = pages.data();
    }
    attend_with<TileKeys, TileValues>(p);
}

inline void attend_paged_tiles(const Paged& p) { attend_paged_with<TileKeys, TileValues>(p); }

inline void decode_tiles(Vectors p) {
    Memory memory;
    std::vector<Page> pages;
    if (p.coder->kind == Coder::PRODUCT) {
        pages = counted(p.page, 1, int64_t(p.batch) * p.heads, p.dim / 4, p.threads, memory);
        p.page = pages.data();
    }
    decode_with(p);
}

}  // namespace
