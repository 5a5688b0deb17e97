// SPDX-License-Identifier: MIT
//
// The few lines of test harness that the C++ tests need: CHECK, expect_error, and a main that runs
// every TEST of the file.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace check {

struct Case {
  const char* name;
  void (*run)();
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

struct Failure {
  std::string text;
};
[[noreturn]] inline void fail(const char* file, int line, const std::string& text) {
  throw Failure{std::string(file) + ":" + std::to_string(line) + ": " + text};
}

/// Runs `action`, which must throw an exception whose text contains `expected`; gives the text.
template <class Exception, class Action>
std::string expect_error(const char* file, int line, std::string_view expected, Action action) {
  try {
    action();
  } catch (const Exception& error) {
    const std::string text = error.what();
    if (text.find(expected) == std::string::npos)
      fail(file, line, "expected an error with \"" + std::string(expected) + "\", got:\n" + text);
    return text;
  }
  fail(file, line, "expected an error with \"" + std::string(expected) + "\", got none");
}

/// Runs the tests whose name contains one of the arguments, or all.
inline int run_all(int argc, char** argv) {
  int failures = 0, runs = 0;
  for (const Case& test : cases()) {
    bool wanted = argc < 2;
    for (int i = 1; i < argc; ++i)
      wanted |= std::string_view(test.name).find(argv[i]) != std::string_view::npos;
    if (!wanted) continue;
    ++runs;
    try {
      test.run();
      std::printf("ok    %s\n", test.name);
    } catch (const Failure& failure) {
      ++failures;
      std::printf("FAIL  %s\n  %s\n", test.name, failure.text.c_str());
    } catch (const std::exception& error) {
      ++failures;
      std::printf("FAIL  %s\n  %s\n", test.name, error.what());
    }
    std::fflush(stdout);
  }
  std::printf("%d tests, %d failed\n", runs, failures);
  return failures == 0 && runs > 0 ? 0 : 1;
}

}  // namespace check

#define CHECK(condition) \
  if (!(condition)) ::check::fail(__FILE__, __LINE__, "not true: " #condition)
#define EXPECT_ERROR(exception, text, ...) \
  ::check::expect_error<exception>(__FILE__, __LINE__, text, [&] { __VA_ARGS__; })
#define TEST(name)                                         \
  static void name();                                      \
  static const ::check::Register name##_test(#name, name); \
  static void name()
#define TEST_MAIN() \
  int main(int argc, char** argv) { return ::check::run_all(argc, argv); }
