/* SPDX-License-Identifier: MIT
 * What the examples share: the end of a program at an error, memory that goes with the program, and
 * numbers to work on.
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

static void* taken[32];
static int count_taken;

static inline void give_back(void) {
  while (count_taken > 0) free(taken[--count_taken]);
}

/* Zeros, as aligned as workspaces have to be; they are given back when the program ends. */
static inline void* memory(size_t bytes) {
  char* start = (char*)calloc((bytes + 63) / 64 * 64 + 64, 1);
  if (!start || count_taken == 32) exit(1);
  if (count_taken == 0) atexit(give_back);
  taken[count_taken++] = start;
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
