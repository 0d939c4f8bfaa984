// A function marked TESSERA_CLONES is compiled for several instruction sets; the dynamic loader selects the best available.
#pragma once

#if defined(TESSERA_X86) && defined(__GNUC__) && !defined(__clang__)
#define TESSERA_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define TESSERA_CLONES
#endif
