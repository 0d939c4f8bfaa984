// TESSERA_CLONES before a function: it is compiled for several instruction sets, and the loader takes the best that there is.
#pragma once

#if defined(TESSERA_X86) && defined(__GNUC__) && !defined(__clang__)
#define TESSERA_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define TESSERA_CLONES
#endif
