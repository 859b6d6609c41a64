// Counting what holds and what does not.
#pragma once

#include <cstdio>
#include <string>

namespace sparse_ops {

inline long checks = 0;
inline int failures = 0;

inline void expect(bool condition, const std::string& what) {
  ++checks;
  if (condition) return;
  if (++failures <= 20) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// What main() returns.
inline int summary() {
  std::printf("%ld checks, %d failed\n", checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace sparse_ops
