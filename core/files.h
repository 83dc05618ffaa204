// Reading whole files.

#ifndef CANOPY_CORE_FILES_H_
#define CANOPY_CORE_FILES_H_

#include <string>

#include "core/status.h"

namespace canopy {

// The bytes of a file. NotFound if it cannot be opened, Internal if it cannot be read to its end,
// both with path and reason; InvalidArgument for a folder.
absl::StatusOr<std::string> ReadFile(const std::string& path);

}  // namespace canopy

#endif  // CANOPY_CORE_FILES_H_
