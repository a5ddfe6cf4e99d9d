// Adds up partial sums: of rows, or of parts of the rows, over the batches and heads that share a parameter.
//
// A block owns one line and spreads its terms over its threads where lines are few, and as many lines as threads where
// they are many: a fixed order of summation either way.
#pragma once

#include "elements.h"
#include "params.h"
#include "row_threads.h"

namespace fastattn::cuda {

// Lines from which on a thread has one to itself.
inline constexpr int kManyLines = 32;

FASTATTN_DEVICE void part_sum(const PartSumParams& p) {
  const bool many = p.lines >= kManyLines;
  const int blocks = many ? (p.lines + kRowThreads - 1) / kRowThreads : p.lines;
  const int group = block_index() / blocks, b = group / p.heads, h = group % p.heads;
  const int line = many ? block_index() % blocks * kRowThreads + thread_index() : block_index() % blocks;
  const int begin = many ? 0 : thread_index(), step = many ? 1 : kRowThreads;
  float sum[1] = {0.0f};
  if (line < p.lines)
    for (int batch = b * p.sum_batches; batch < (b + 1) * p.sum_batches; ++batch)
      for (int head = h * p.sum_heads; head < (h + 1) * p.sum_heads; ++head) {
        const i64 row = static_cast<i64>(batch) * (p.heads * p.sum_heads) + head;
        const float* const parts = p.parts + row * p.count * p.lines + line;
        for (int t = begin; t < p.count; t += step) sum[0] += load_constant(parts + static_cast<i64>(t) * p.lines);
      }
  if (!many) {
    row_sums(sum, kRowThreads);
    if (thread_index()) return;
  }
  if (line >= p.lines) return;
  const i64 at = b * p.out_batch + h * p.out_head + line;
  const float before = p.accumulate ? load_global(static_cast<const float*>(p.out) + at) : 0.0f;
  store_number(p.out, p.out_element, at, before + p.sign * sum[0]);
}

}  // namespace fastattn::cuda
