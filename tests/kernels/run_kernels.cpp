// Runs kernels on a problem in a file, without Python, on emulated processors: `run_kernels LEVEL PROBLEM RESULT`,
// or without arguments: prints the available levels.
// The files are sequences of arrays, each a 64-bit length in bytes and the bytes; their order is defined by
// emulated.py. Every input array ends at a protected page, so that reading beyond it ends the process.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <deque>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "levels.hpp"

using namespace tessera;

namespace {

class Input {
  public:
    explicit Input(const char* path) : file_(path, std::ios::binary) {}

    // Returns the next array and sets `count` to its number of elements; null if empty.
    template <class T>
    const T* next(int64_t* count = nullptr) {
        int64_t bytes = 0;
        file_.read(reinterpret_cast<char*>(&bytes), 8);
        if (!file_) throw std::runtime_error("the file ends early");
        if (count) *count = bytes / int64_t(sizeof(T));
        if (!bytes) return nullptr;
        const size_t page = size_t(sysconf(_SC_PAGESIZE)), room = (size_t(bytes) + page - 1) / page * page;
        void* at = mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED || mprotect(static_cast<char*>(at) + room, page, PROT_NONE)) throw std::runtime_error("no memory");
        char* array = static_cast<char*>(at) + room - bytes;
        file_.read(array, bytes);
        if (!file_) throw std::runtime_error("the file ends early");
        return reinterpret_cast<const T*>(array);
    }

  private:
    std::ifstream file_;
};

template <class T>
void put(std::ofstream& file, const std::vector<T>& array) {
    const int64_t bytes = int64_t(array.size() * sizeof(T));
    file.write(reinterpret_cast<const char*>(&bytes), 8);
    file.write(reinterpret_cast<const char*>(array.data()), bytes);
}

// A std::deque, because it does not move its elements.
const Book& read_book(Input& in, std::deque<Book>& books) {
    const int64_t* ints = in.next<int64_t>();
    const float step = *in.next<float>();
    int64_t points, odd, dim;
    const int16_t* point = in.next<int16_t>(&points);
    const int64_t *permutation = in.next<int64_t>(), *sign = in.next<int64_t>();
    const float *scales = in.next<float>(), *dct = in.next<float>(&odd), *signs = in.next<float>(&dim);
    int size = 0;
    while (size * size < odd) ++size;
    return books.emplace_back(int(ints[0]), int(ints[1]), step, point, points / 4, permutation, sign, scales, dct, size, signs, int(dim));
}

// The arrays of one page: rows of all heads are contiguous.
Side read_side(Input& in, Role role, int64_t lines, int64_t offset) {
    Side side{};
    side.role = role, side.offset = offset;
    for (Field* field : {&side.codes, &side.scale, &side.centre}) {
        int64_t bytes;
        field->data = in.next<uint8_t>(&bytes);
        field->stride = bytes / lines;
    }
    return side;
}

void attend(const std::string& level, Input& in, std::ofstream& to) {
    std::deque<Book> books;
    const int64_t* ints = in.next<int64_t>();
    const float* floats = in.next<float>();
    Problem p{};
    p.batch = int(ints[0]), p.q_heads = int(ints[1]), p.kv_heads = int(ints[2]), p.q_tokens = int(ints[3]), p.dim = int(ints[4]);
    p.page_count = ints[5], p.placed = ints[6] != 0, p.start = ints[7], p.window = ints[8], p.limbs = int(ints[9]), p.threads = int(ints[10]);
    p.scale = floats[0], p.value_gain = floats[1], p.softcap = floats[2];
    p.key = &read_book(in, books), p.value = &read_book(in, books);
    p.q = in.next<float>();
    p.mask = in.next<uint8_t>();
    std::vector<Page> pages;
    for (int64_t i = 0; i < p.page_count; ++i) {
        const int64_t* about = in.next<int64_t>();
        Page page{};
        page.tokens = about[0], page.offset = about[1];
        for (Role role : {KEY, VALUE}) page.side[role] = read_side(in, role, int64_t(p.batch) * p.kv_heads, page.offset);
        pages.push_back(page);
        p.tokens += page.tokens;
    }
    p.pages = pages.data();
    p.mask_query = p.tokens, p.mask_head = p.q_tokens * p.mask_query, p.mask_batch = p.q_heads * p.mask_head;
    const size_t rows = size_t(p.batch) * size_t(p.q_heads) * size_t(p.q_tokens);
    std::vector<float> out(rows * size_t(p.dim)), lse(rows);
    p.out = out.data(), p.lse = lse.data();
    run(level, p);
    put(to, out), put(to, lse);
}

template <size_t N>
void fill(Input& in, uint8_t (&to)[N]) {
    const int64_t* from = in.next<int64_t>();
    for (size_t i = 0; i < N; ++i) to[i] = uint8_t(from[i]);
}

Index read_index(Input& in) {
    const bool conjugations = *in.next<int64_t>() != 0;
    const float step = *in.next<float>();
    int64_t count;
    const int16_t* words = in.next<int16_t>();
    const int32_t* codes = in.next<int32_t>(&count);
    Group group;
    const int64_t* product = in.next<int64_t>();
    for (int i = 0; i < 24 * 24; ++i) group.product[i / 24][i % 24] = uint8_t(product[i]);
    fill(in, group.inverse), fill(in, group.reduction_unit), fill(in, group.rotation_unit), fill(in, group.unit_rotation);
    return Index(words, codes, int(count / 24), conjugations, step, group);
}

// Finds the nearest codewords of chunks and their codes; then encodes and packs vectors.
void encode(const std::string& level, Input& in, std::ofstream& to) {
    const Index index = read_index(in);
    int64_t numbers, vectors;
    const float* x = in.next<float>(&numbers);
    std::vector<int32_t> codes(size_t(numbers / 4));
    std::vector<float> words(static_cast<size_t>(numbers));
    nearest_at(level)({&index, x, 4, 1, numbers / 4, codes.data(), words.data()});
    put(to, codes), put(to, words);
    const int64_t* ints = in.next<int64_t>();  // numbers of a vector, bits of a code
    const float *y = in.next<float>(), *scale = in.next<float>(&vectors);
    std::vector<uint8_t> packed(size_t(vectors * (((ints[0] + 3) / 4 * ints[1] + 7) / 8)));
    vector_codes(index, nearest_at(level), {y, scale, ints[0], int(ints[1]), packed.data()}, 0, vectors);
    put(to, packed);
}

}  // namespace

int main(int count, char** words) {
    if (count == 1) {
        for (const std::string& level : levels()) std::printf("%s\n", level.c_str());
        return 0;
    }
    try {
        const std::string level = words[1];
        if (count != 4 || !at_least(level, PORTABLE)) throw std::runtime_error("no such level");
        Input in(words[2]);
        std::ofstream to(words[3], std::ios::binary);
        const char* what = in.next<char>();
        if (std::strcmp(what, "attend") == 0) attend(level, in, to);
        else if (std::strcmp(what, "encode") == 0) encode(level, in, to);
        else throw std::runtime_error("no such problem");
        to.close();
        if (!to) throw std::runtime_error("the result cannot be written");
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
