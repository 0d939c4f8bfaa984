// Selects kernels by the instruction sets that this build and this processor support.
#pragma once

#if defined(TESSERA_X86)
#include <cpuid.h>
#endif
#if defined(TESSERA_NEON) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <string>
#include <vector>

#include "attend.hpp"
#include "nearest.hpp"

namespace tessera {

// A build has the instruction sets of one processor family. An operation without a kernel for one uses the level below.
enum Level { PORTABLE, NEON, DOTPROD, AVX2, AVXVNNI, AVX512 };
constexpr Level LEVELS[] = {PORTABLE, NEON, DOTPROD, AVX2, AVXVNNI, AVX512};
constexpr const char* NAMES[] = {"portable", "neon", "dotprod", "avx2", "avxvnni", "avx512"};

#if defined(TESSERA_X86)
inline bool has(Level level) {
    __builtin_cpu_init();
    if (level == AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    if (level == AVXVNNI) {
#if defined(TESSERA_AVX_VNNI)
        unsigned a = 0, b = 0, c = 0, d = 0;
        return has(AVX2) && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#else
        return false;
#endif
    }
    if (level == AVX512)
        return has(AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
    return level == PORTABLE;
}
#elif defined(TESSERA_NEON)
inline bool has(Level level) {
#if defined(__linux__)
    const unsigned long features = getauxval(AT_HWCAP);
    if (level == NEON) return features & HWCAP_ASIMD;
    if (level == DOTPROD) return has(NEON) && (features & HWCAP_ASIMDDP);
#else
    if (level == NEON) return true;
#endif
    return level == PORTABLE;
}
#else
inline bool has(Level level) { return level == PORTABLE; }
#endif

// Returns the names of the available levels, the best last.
inline std::vector<std::string> levels() {
    std::vector<std::string> names;
    for (Level level : LEVELS)
        if (has(level)) names.push_back(NAMES[level]);
    return names;
}

// Whether the named level is at least this one, and this processor supports it.
inline bool at_least(const std::string& name, Level least) {
    for (Level level : LEVELS)
        if (name == NAMES[level]) return level >= least && has(level);
    return false;
}

inline void run([[maybe_unused]] const std::string& level, const Problem& p) {
#if defined(TESSERA_X86)
    if (at_least(level, AVX512)) return attend_avx512(p);
#if defined(TESSERA_AVX_VNNI)
    if (at_least(level, AVXVNNI)) return attend_avxvnni(p);
#endif
    if (at_least(level, AVX2)) return attend_avx2(p);
#elif defined(TESSERA_NEON)
    if (at_least(level, DOTPROD)) return attend_dotprod(p);
    if (at_least(level, NEON)) return attend_neon(p);
#endif
    attend_portable(p);
}

inline void run([[maybe_unused]] const std::string& level, const Problem& p, const Exact& x) {
#if defined(TESSERA_X86)
    if (at_least(level, AVX512)) return attend_exact_avx512(p, x);
    if (at_least(level, AVX2)) return attend_exact_avx2(p, x);
#endif
    attend_exact_portable(p, x);
}

// On Arm the portable search already uses NEON, whose vectors are equally wide.
inline Nearest nearest_at([[maybe_unused]] const std::string& level) {
#if defined(TESSERA_X86)
    if (at_least(level, AVX512)) return nearest_avx512;
    if (at_least(level, AVX2)) return nearest_avx2;
#endif
    return nearest_portable;
}

}  // namespace tessera
