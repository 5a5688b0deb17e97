// SPDX-License-Identifier: MIT
//
// Whether ThreadSanitizer reports anything while a child process does `work`.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

template <class Work>
bool races(Work work) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    if (!freopen("/dev/null", "w", stderr)) _exit(2);
    work();
    std::exit(0);  // ThreadSanitizer replaces the status if it has reported a race
  }
  int status = 0;
  waitpid(child, &status, 0);
  return !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
