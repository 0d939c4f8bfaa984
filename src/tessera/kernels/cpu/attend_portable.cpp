#include "attend.hpp"
#include "attend_impl.hpp"
#include "portable.hpp"

void tessera::attend_portable(const Problem& p) { attend_with<Portable>(p); }
