// Runs a parsed chat template.

#ifndef CANOPY_CORE_JINJA_INTERPRETER_H_
#define CANOPY_CORE_JINJA_INTERPRETER_H_

#include <map>
#include <string>

#include "core/jinja/syntax.h"
#include "core/jinja/value.h"
#include "core/status.h"

namespace canopy::jinja {

// What a template can see.
using Globals = std::map<std::string, Value>;

// Unimplemented names a filter, test, function or method outside the subset, InvalidArgument what
// Jinja would refuse too or what the template raises with raise_exception; both give the line.
absl::StatusOr<std::string> RenderTemplate(const Block& block, const Globals& globals);

}  // namespace canopy::jinja

#endif  // CANOPY_CORE_JINJA_INTERPRETER_H_
