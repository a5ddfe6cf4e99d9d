// Included before everything else (-include) in files that include torch's headers, which write into string streams.
// libstdc++ keeps the members of those in its library, some of them only since GCC 11; compiled in, they ask for no
// such young library. Streams by themselves stay there: their locales are known by address, so each must be one.
#pragma once

#include <istream>
#include <ostream>

#ifdef _GLIBCXX_EXTERN_TEMPLATE
#pragma push_macro("_GLIBCXX_EXTERN_TEMPLATE")
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0
#include <sstream>
#pragma pop_macro("_GLIBCXX_EXTERN_TEMPLATE")
#endif
