// Error handling: absl::Status for what can fail, CHECK for what cannot unless Canopy is wrong.
//
//   ASSIGN_OR_RETURN(Tokenizer tokenizer, Tokenizer::Load(path));
//   RETURN_IF_ERROR(state.Commit(path));

#ifndef CANOPY_CORE_STATUS_H_
#define CANOPY_CORE_STATUS_H_

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace canopy {

// Prints file, line and condition, and aborts.
[[noreturn]] void CheckFailed(const char* file, int line, const char* condition);

// The same error with "context: " before its message, for adding a file or a key on the way up.
absl::Status Annotate(const absl::Status& status, const std::string& context);

}  // namespace canopy

#define CANOPY_CONCAT_INNER(a, b) a##b
#define CANOPY_CONCAT(a, b) CANOPY_CONCAT_INNER(a, b)

#define RETURN_IF_ERROR(expression)                                                           \
  do {                                                                                        \
    if (absl::Status canopy_status = (expression); !canopy_status.ok()) return canopy_status; \
  } while (false)

#define ASSIGN_OR_RETURN(declaration, expression) \
  CANOPY_ASSIGN_OR_RETURN(CANOPY_CONCAT(canopy_statusor_, __LINE__), declaration, expression)

#define CANOPY_ASSIGN_OR_RETURN(statusor, declaration, expression) \
  auto statusor = (expression);                                    \
  if (!statusor.ok()) return statusor.status();                    \
  declaration = *std::move(statusor)

#define CHECK(condition)                                                     \
  do {                                                                       \
    if (!(condition)) ::canopy::CheckFailed(__FILE__, __LINE__, #condition); \
  } while (false)

#endif  // CANOPY_CORE_STATUS_H_
