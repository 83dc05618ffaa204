// The syntax tree of a chat template and its parser.

#ifndef CANOPY_CORE_JINJA_SYNTAX_H_
#define CANOPY_CORE_JINJA_SYNTAX_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/status.h"

namespace canopy::jinja {

struct Expression;
using ExpressionPtr = std::unique_ptr<Expression>;

struct Expression {
  enum class Kind {
    kString,   // text
    kInteger,  // number
    kBool,     // number
    kNone,
    kName,       // text
    kList,       // items
    kDict,       // items: key, value, key, value, ...
    kAttribute,  // items[0].text
    kItem,       // items[0][items[1]]
    kSlice,      // items[0][items[1]:items[2]:items[3]]; missing ones are null
    kCall,       // items[0](items[1], ..., named...)
    kFilter,     // items[0] | text(items[1], ..., named...)
    kTest,       // items[0] is text(items[1], ...)
    kNot,        // items[0]
    kMinus,      // items[0]
    kAnd,        // items[0], items[1]
    kOr,         // items[0], items[1]
    kBinary,     // items[0] text items[1]: + - * / // % ~ **
    kCompare,    // items[0] operators[0] items[1] operators[1] items[2] ...
    kIf,         // items[0] if items[1] else items[2]; items[2] may be null
  };
  Kind kind;
  int line = 0;
  std::string text;
  int64_t number = 0;
  std::vector<ExpressionPtr> items;
  std::vector<std::pair<std::string, ExpressionPtr>> named;
  std::vector<std::string> operators;
};

struct Statement;
using Block = std::vector<Statement>;

struct Statement {
  enum class Kind {
    kText,      // text
    kOutput,    // expression
    kIf,        // branches
    kFor,       // names in expression [if condition]: branches[0].body, otherwise
    kSet,       // names[0] = expression, or names[0].names[1] = expression
    kSetBlock,  // names[0] = the text of branches[0].body
    kBreak,
    kContinue,
    kBlock,  // branches[0].body, in place
  };
  struct Branch {
    ExpressionPtr condition;  // null for else
    Block body;
  };
  Kind kind;
  int line = 0;
  std::string text = {};
  std::vector<std::string> names = {};
  ExpressionPtr expression = {};
  ExpressionPtr condition = {};
  std::vector<Branch> branches = {};
  Block otherwise = {};
};

// Parses with trim_blocks and lstrip_blocks, as transformers sets them. InvalidArgument for what
// Jinja would refuse too, Unimplemented for statements and literals outside the subset; both give
// the line.
absl::StatusOr<Block> ParseTemplate(std::string_view source);

}  // namespace canopy::jinja

#endif  // CANOPY_CORE_JINJA_SYNTAX_H_
