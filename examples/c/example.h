/* SPDX-License-Identifier: MIT
 * What the examples share: the end of a program at an error, memory, and numbers to work on.
 */
#ifndef EXAMPLE_H_
#define EXAMPLE_H_

#include <kimi_ops.h>
#include <stdio.h>
#include <stdlib.h>

static inline void check(kimi_status status) {
  if (status == KIMI_OK) return;
  fprintf(stderr, "%s\n", kimi_last_error());
  exit(1);
}

/* Zeros, as aligned as workspaces have to be. */
static inline void* memory(size_t bytes) {
  const size_t rounded = (bytes + 63) / 64 * 64 + 64;
  char* start = (char*)calloc(rounded, 1);
  if (!start) exit(1);
  return start + (64 - (uintptr_t)start % 64) % 64;
}

/* -1 to 1, without a pattern. */
static inline float* numbers(size_t count, uint32_t seed) {
  float* x = (float*)memory(count * sizeof(float));
  for (size_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    x[i] = (float)(seed >> 8) / 8388608.0f - 1.0f;
  }
  return x;
}

#endif /* EXAMPLE_H_ */
