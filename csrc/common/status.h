// SPDX-License-Identifier: MIT
// What every launcher returns: a code of the C API and, if not ok, the text for kimi_last_error().
#pragma once

#include <sstream>
#include <string>
#include <utility>

#include "kimi_ops.h"

namespace kimi {

struct [[nodiscard]] Status {
  kimi_status code = KIMI_OK;
  std::string message;

  static Status ok() { return {}; }
  bool is_ok() const { return code == KIMI_OK; }
};

// invalid("topk_gate: top_k: expected 1..", limit, ", got ", k): pieces joined with operator<<.
template <class... Parts>
Status error(kimi_status code, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return {code, std::move(text).str()};
}

template <class... Parts>
Status invalid(const Parts&... parts) {
  return error(KIMI_INVALID_ARGUMENT, parts...);
}

}  // namespace kimi

// Returns early with a status that is not ok.
#define KIMI_RETURN_IF_ERROR(expression) \
  if (::kimi::Status status_ = (expression); !status_.is_ok()) return status_
