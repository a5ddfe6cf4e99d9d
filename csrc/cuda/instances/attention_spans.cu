// Written by generate_instances.py.
// clang-format off
#include "../attention/spans.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(attention_spans, SpansParams, (attention_spans), SpansTiles::kThreads, 4)
}  // namespace fastattn::cuda
