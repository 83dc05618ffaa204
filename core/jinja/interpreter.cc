#include "core/jinja/interpreter.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <utility>

#include "core/jinja/lexer.h"
#include "core/tokenization/unicode.h"

namespace canopy::jinja {
namespace {

using Kind = Expression::Kind;

// A prompt beyond this comes from a template that has run away.
constexpr size_t kMaxOutput = 256u << 20;
// Statements; loops in loops can run for longer than anybody waits.
constexpr int64_t kMaxSteps = 10'000'000;
constexpr int64_t kMaxRange = 100'000;  // as Jinja's sandbox has it

absl::Status Fault(int line, std::string_view what) {
  return absl::InvalidArgumentError(AtLine(line, what));
}

bool IsAscii(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}
char Upper(char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 32) : c; }
char Lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; }

std::vector<std::string_view> Characters(std::string_view text) {
  std::vector<std::string_view> characters;
  while (!text.empty()) {
    characters.push_back(text.substr(0, Utf8Length(text[0])));
    text.remove_prefix(characters.back().size());
  }
  return characters;
}

std::string ReplaceAll(std::string_view text, std::string_view from, std::string_view to,
                       int64_t most) {
  std::string result;
  if (from.empty()) {
    // Python puts `to` before every character and at the end.
    for (const std::string_view c : Characters(text)) {
      if (most-- != 0) result.append(to);
      result.append(c);
    }
    if (most != 0) result.append(to);
    return result;
  }
  size_t done = 0;
  for (size_t at = text.find(from); at != std::string_view::npos && most-- != 0;
       at = text.find(from, done)) {
    result.append(text.substr(done, at - done)).append(to);
    done = at + from.size();
  }
  return result.append(text.substr(done));
}

List Split(std::string_view text, std::string_view separator, int64_t most) {
  List parts;
  while (most-- != 0) {
    const size_t at = text.find(separator);
    if (at == std::string_view::npos) break;
    parts.emplace_back(std::string(text.substr(0, at)));
    text.remove_prefix(at + separator.size());
  }
  parts.emplace_back(std::string(text));
  return parts;
}

List SplitAtSpace(std::string_view text) {
  List parts;
  for (text = StripLeft(text); !text.empty(); text = StripLeft(text)) {
    std::string_view rest = text;
    while (!rest.empty()) {
      std::string_view after = rest;
      if (IsPythonSpace(TakeChar(&after))) break;
      rest = after;
    }
    parts.emplace_back(std::string(text.substr(0, text.size() - rest.size())));
    text = rest;
  }
  return parts;
}

// The indices of Python's [start:stop:step] over `size` elements.
std::vector<int64_t> SliceIndices(int64_t size, std::optional<int64_t> start,
                                  std::optional<int64_t> stop, int64_t step) {
  const int64_t low = step > 0 ? 0 : -1, high = step > 0 ? size : size - 1;
  const auto place = [&](std::optional<int64_t> at, int64_t if_missing) {
    if (!at) return if_missing;
    return std::clamp(*at < 0 ? *at + size : *at, low, high);
  };
  std::vector<int64_t> indices;
  const int64_t first = place(start, step > 0 ? low : high),
                last = place(stop, step > 0 ? high : low);
  for (int64_t i = first; step > 0 ? i < last : i > last; i += step) indices.push_back(i);
  return indices;
}

class Interpreter {
 public:
  explicit Interpreter(const Globals& globals) { scopes_.push_back(globals); }

  absl::StatusOr<std::string> Run(const Block& block) {
    RETURN_IF_ERROR(Execute(block).status());
    return std::move(out_);
  }

 private:
  enum class Flow { kNext, kBreak, kContinue };
  struct Arguments {
    std::vector<Value> values;
    std::vector<std::pair<std::string, Value>> named;
  };

  absl::StatusOr<Flow> Execute(const Block& block) {
    for (const Statement& statement : block) {
      if (++steps_ > kMaxSteps) return Fault(statement.line, "the template runs without end");
      ASSIGN_OR_RETURN(const Flow flow, Execute(statement));
      if (flow != Flow::kNext) return flow;
      if (out_.size() > kMaxOutput) return Fault(statement.line, "the prompt exceeds 256 MiB");
    }
    return Flow::kNext;
  }

  absl::StatusOr<Flow> Execute(const Statement& statement) {
    switch (statement.kind) {
      case Statement::Kind::kText:
        out_ += statement.text;
        return Flow::kNext;
      case Statement::Kind::kOutput: {
        ASSIGN_OR_RETURN(const Value value, Evaluate(*statement.expression));
        ASSIGN_OR_RETURN(const std::string text, ToText(value, statement.line));
        out_ += text;
        return Flow::kNext;
      }
      case Statement::Kind::kIf:
        for (const Statement::Branch& branch : statement.branches) {
          if (branch.condition != nullptr) {
            ASSIGN_OR_RETURN(const Value condition, Evaluate(*branch.condition));
            if (!condition.truth()) continue;
          }
          return Execute(branch.body);
        }
        return Flow::kNext;
      case Statement::Kind::kFor:
        return ExecuteFor(statement);
      case Statement::Kind::kSet: {
        ASSIGN_OR_RETURN(Value value, Evaluate(*statement.expression));
        if (statement.names.size() == 1) {
          scopes_.back()[statement.names[0]] = std::move(value);
          return Flow::kNext;
        }
        Namespace* names = Lookup(statement.names[0]).names();
        if (names == nullptr) {
          return Fault(statement.line, absl::StrCat("'", statement.names[0], "' is no namespace"));
        }
        (*names)[statement.names[1]] = std::move(value);
        return Flow::kNext;
      }
      case Statement::Kind::kSetBlock: {
        std::string outer = std::exchange(out_, {});
        scopes_.emplace_back();
        RETURN_IF_ERROR(Execute(statement.branches[0].body).status());
        scopes_.pop_back();
        scopes_.back()[statement.names[0]] = std::exchange(out_, std::move(outer));
        return Flow::kNext;
      }
      case Statement::Kind::kBreak:
        return Flow::kBreak;
      case Statement::Kind::kContinue:
        return Flow::kContinue;
      case Statement::Kind::kBlock:
        return Execute(statement.branches[0].body);
    }
    return Flow::kNext;
  }

  absl::Status Bind(const Statement& statement, const Value& item) {
    if (statement.names.size() == 1) {
      scopes_.back()[statement.names[0]] = item;
      return absl::OkStatus();
    }
    const List* parts = item.list();
    if (parts == nullptr || parts->size() != statement.names.size()) {
      return Fault(statement.line,
                   absl::StrCat("the loop needs items of ", statement.names.size(), " parts"));
    }
    for (size_t i = 0; i < parts->size(); ++i) scopes_.back()[statement.names[i]] = (*parts)[i];
    return absl::OkStatus();
  }

  absl::StatusOr<Flow> ExecuteFor(const Statement& statement) {
    ASSIGN_OR_RETURN(const Value iterable, Evaluate(*statement.expression));
    ASSIGN_OR_RETURN(List items, ToList(iterable, statement.line));
    if (statement.condition != nullptr) {
      List kept;
      for (Value& item : items) {
        scopes_.emplace_back();
        RETURN_IF_ERROR(Bind(statement, item));
        ASSIGN_OR_RETURN(const Value condition, Evaluate(*statement.condition));
        scopes_.pop_back();
        if (condition.truth()) kept.push_back(std::move(item));
      }
      items = std::move(kept);
    }
    if (items.empty()) return Execute(statement.otherwise);
    const auto size = static_cast<int64_t>(items.size());
    for (int64_t i = 0; i < size; ++i) {
      scopes_.emplace_back();
      scopes_.back()["loop"] =
          Dict{{"index", i + 1},
               {"index0", i},
               {"revindex", size - i},
               {"revindex0", size - i - 1},
               {"first", i == 0},
               {"last", i + 1 == size},
               {"length", size},
               {"previtem", i > 0 ? items[i - 1] : Value(Undefined{"loop.previtem"})},
               {"nextitem", i + 1 < size ? items[i + 1] : Value(Undefined{"loop.nextitem"})}};
      RETURN_IF_ERROR(Bind(statement, items[i]));
      ASSIGN_OR_RETURN(const Flow flow, Execute(statement.branches[0].body));
      scopes_.pop_back();
      if (flow == Flow::kBreak) break;
    }
    return Flow::kNext;
  }

  Value Lookup(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = scope->find(name); found != scope->end()) return found->second;
    }
    return Undefined{name};
  }

  static absl::Status UndefinedFault(int line, const Value& value) {
    return Fault(line, absl::StrCat("'", value.undefined_name(), "' is undefined"));
  }

  // Python's str().
  static absl::StatusOr<std::string> ToText(const Value& value, int line) {
    if (value.is_undefined()) return std::string();
    if (value.is_none()) return std::string("None");
    if (value.is_string()) return *value.string();
    int64_t number = 0;
    if (value.integer(&number) != nullptr) {
      if (value.is_bool()) return std::string(number != 0 ? "True" : "False");
      return absl::StrCat(number);
    }
    return Unsupported(line, absl::StrCat("the text of ", std::string(value.kind())));
  }

  static absl::StatusOr<List> ToList(const Value& value, int line) {
    if (value.is_undefined()) return List();
    if (value.is_list()) return *value.list();
    List items;
    if (value.is_string()) {
      for (const std::string_view c : Characters(*value.string()))
        items.emplace_back(std::string(c));
      return items;
    }
    if (value.is_dict()) {
      for (const auto& [key, unused] : *value.dict()) items.emplace_back(key);
      return items;
    }
    return Fault(line, absl::StrCat(std::string(value.kind()), " cannot be looped over"));
  }

  absl::StatusOr<Value> Evaluate(const Expression& expression) {
    switch (expression.kind) {
      case Kind::kString:
        return Value(expression.text);
      case Kind::kInteger:
        return Value(expression.number);
      case Kind::kBool:
        return Value(expression.number != 0);
      case Kind::kNone:
        return Value(None{});
      case Kind::kName:
        return Lookup(expression.text);
      case Kind::kList: {
        List items;
        for (const ExpressionPtr& item : expression.items) {
          ASSIGN_OR_RETURN(Value value, Evaluate(*item));
          items.push_back(std::move(value));
        }
        return Value(std::move(items));
      }
      case Kind::kDict:
        return EvaluateDict(expression);
      case Kind::kAttribute: {
        ASSIGN_OR_RETURN(const Value object, Evaluate(*expression.items[0]));
        return Member(object, expression.text, expression.line);
      }
      case Kind::kItem:
        return EvaluateItem(expression);
      case Kind::kSlice:
        return EvaluateSlice(expression);
      case Kind::kCall:
        return EvaluateCall(expression);
      case Kind::kFilter:
        return EvaluateFilter(expression);
      case Kind::kTest:
        return EvaluateTest(expression);
      case Kind::kNot: {
        ASSIGN_OR_RETURN(const Value operand, Evaluate(*expression.items[0]));
        return Value(!operand.truth());
      }
      case Kind::kMinus: {
        ASSIGN_OR_RETURN(const Value operand, Evaluate(*expression.items[0]));
        int64_t number = 0;
        if (operand.integer(&number) == nullptr) {
          return Fault(expression.line,
                       absl::StrCat("'-' of ", std::string(operand.kind()), " makes no sense"));
        }
        return Value(-number);
      }
      case Kind::kAnd:
      case Kind::kOr: {
        ASSIGN_OR_RETURN(Value left, Evaluate(*expression.items[0]));
        if (left.truth() != (expression.kind == Kind::kAnd)) return left;
        return Evaluate(*expression.items[1]);
      }
      case Kind::kBinary:
        return EvaluateBinary(expression);
      case Kind::kCompare:
        return EvaluateCompare(expression);
      case Kind::kIf: {
        ASSIGN_OR_RETURN(const Value condition, Evaluate(*expression.items[1]));
        if (condition.truth()) return Evaluate(*expression.items[0]);
        if (expression.items[2] != nullptr) return Evaluate(*expression.items[2]);
        return Value(Undefined{"the missing else of a conditional expression"});
      }
    }
    return Value();
  }

  absl::StatusOr<Value> EvaluateDict(const Expression& expression) {
    Dict dict;
    for (size_t i = 0; i < expression.items.size(); i += 2) {
      ASSIGN_OR_RETURN(const Value key, Evaluate(*expression.items[i]));
      ASSIGN_OR_RETURN(Value value, Evaluate(*expression.items[i + 1]));
      if (!key.is_string()) return Unsupported(expression.line, "a key that is no string");
      const auto same = std::find_if(dict.begin(), dict.end(), [&](const auto& entry) {
        return entry.first == *key.string();
      });
      if (same != dict.end()) {
        same->second = std::move(value);
      } else {
        dict.emplace_back(*key.string(), std::move(value));
      }
    }
    return Value(std::move(dict));
  }

  static absl::StatusOr<Value> Member(const Value& object, const std::string& name, int line) {
    if (object.is_undefined()) return UndefinedFault(line, object);
    if (const Value* found = object.Find(name)) return *found;
    return Value(Undefined{name});
  }

  absl::StatusOr<Value> EvaluateItem(const Expression& expression) {
    ASSIGN_OR_RETURN(const Value object, Evaluate(*expression.items[0]));
    ASSIGN_OR_RETURN(const Value index, Evaluate(*expression.items[1]));
    if (index.is_string()) return Member(object, *index.string(), expression.line);
    if (object.is_undefined()) return UndefinedFault(expression.line, object);
    int64_t at = 0;
    if (index.integer(&at) != nullptr && (object.is_list() || object.is_string())) {
      if (object.is_list()) {
        const auto size = static_cast<int64_t>(object.list()->size());
        if (at < 0) at += size;
        if (at >= 0 && at < size) return (*object.list())[at];
      } else {
        const std::vector<std::string_view> characters = Characters(*object.string());
        const auto size = static_cast<int64_t>(characters.size());
        if (at < 0) at += size;
        if (at >= 0 && at < size) return Value(std::string(characters[at]));
      }
    }
    return Value(Undefined{"an item"});
  }

  absl::StatusOr<Value> EvaluateSlice(const Expression& expression) {
    ASSIGN_OR_RETURN(const Value object, Evaluate(*expression.items[0]));
    std::optional<int64_t> bounds[3];
    for (int i = 0; i < 3; ++i) {
      if (expression.items[i + 1] == nullptr) continue;
      ASSIGN_OR_RETURN(const Value bound, Evaluate(*expression.items[i + 1]));
      int64_t number = 0;
      if (bound.is_none()) continue;
      if (bound.integer(&number) == nullptr) {
        return Fault(expression.line, "a slice needs integers");
      }
      // Beyond any text or list, and safe to add to.
      bounds[i] = std::clamp<int64_t>(number, -(int64_t{1} << 40), int64_t{1} << 40);
    }
    const int64_t step = bounds[2].value_or(1);
    if (step == 0) return Fault(expression.line, "a slice's step is 0");
    if (object.is_undefined()) return UndefinedFault(expression.line, object);
    if (object.is_list()) {
      List items;
      const auto size = static_cast<int64_t>(object.list()->size());
      for (const int64_t i : SliceIndices(size, bounds[0], bounds[1], step)) {
        items.push_back((*object.list())[i]);
      }
      return Value(std::move(items));
    }
    if (object.is_string()) {
      const std::vector<std::string_view> characters = Characters(*object.string());
      std::string text;
      const auto size = static_cast<int64_t>(characters.size());
      for (const int64_t i : SliceIndices(size, bounds[0], bounds[1], step)) text += characters[i];
      return Value(std::move(text));
    }
    return Fault(expression.line, absl::StrCat(std::string(object.kind()), " cannot be sliced"));
  }

  static absl::StatusOr<Value> Joined(std::string text, const std::string& tail, int line) {
    if (text.size() + tail.size() > kMaxOutput) return Fault(line, "a string exceeds 256 MiB");
    return Value(text.append(tail));
  }

  absl::StatusOr<Value> EvaluateBinary(const Expression& expression) {
    ASSIGN_OR_RETURN(const Value left, Evaluate(*expression.items[0]));
    ASSIGN_OR_RETURN(const Value right, Evaluate(*expression.items[1]));
    const std::string& op = expression.text;
    const int line = expression.line;
    if (op == "~") {
      ASSIGN_OR_RETURN(std::string text, ToText(left, line));
      ASSIGN_OR_RETURN(const std::string tail, ToText(right, line));
      return Joined(std::move(text), tail, line);
    }
    if (left.is_undefined()) return UndefinedFault(line, left);
    if (right.is_undefined()) return UndefinedFault(line, right);
    if (op == "+" && left.is_string() && right.is_string()) {
      return Joined(*left.string(), *right.string(), line);
    }
    if (op == "+" && left.is_list() && right.is_list()) {
      List items = *left.list();
      items.insert(items.end(), right.list()->begin(), right.list()->end());
      return Value(std::move(items));
    }
    int64_t a = 0, b = 0, result = 0;
    if (op == "*" && left.is_string() && right.integer(&b) != nullptr) {
      if (b > 0 && left.string()->size() > kMaxOutput / b) {
        return Fault(line, "a repeated string exceeds 256 MiB");
      }
      std::string text;
      for (int64_t i = 0; i < b; ++i) text += *left.string();
      return Value(std::move(text));
    }
    if (left.integer(&a) == nullptr || right.integer(&b) == nullptr) {
      if (op == "%" && left.is_string()) return Unsupported(line, "'%' of a string");
      return Fault(line, absl::StrCat("'", op, "' of ", std::string(left.kind()), " and ",
                                      std::string(right.kind()), " makes no sense"));
    }
    bool overflow = false;
    if (op == "+") overflow = __builtin_add_overflow(a, b, &result);
    if (op == "-") overflow = __builtin_sub_overflow(a, b, &result);
    if (op == "*") overflow = __builtin_mul_overflow(a, b, &result);
    if (op == "/") return Unsupported(line, "'/', whose result is no integer,");
    if (op == "//" || op == "%") {
      if (b == 0) return Fault(line, "a division by zero");
      if (b == -1) {
        overflow = __builtin_sub_overflow(int64_t{0}, op == "%" ? 0 : a, &result);
      } else {
        // Rounded down, as Python does.
        const int64_t quotient = a / b - (a % b != 0 && (a < 0) != (b < 0) ? 1 : 0);
        result = op == "//" ? quotient : a - quotient * b;
      }
    }
    if (overflow) return Unsupported(line, "an integer beyond 64 bits");
    return Value(result);
  }

  static absl::StatusOr<bool> Compare(const std::string& op, const Value& left, const Value& right,
                                      int line) {
    if (op == "==") return left == right;
    if (op == "!=") return !(left == right);
    if (op == "in" || op == "not in") {
      ASSIGN_OR_RETURN(const bool in, Contains(right, left, line));
      return in == (op == "in");
    }
    int order = 0;
    int64_t a = 0, b = 0;
    if (left.is_string() && right.is_string()) {
      order = left.string()->compare(*right.string());
    } else if (left.integer(&a) != nullptr && right.integer(&b) != nullptr) {
      order = a < b ? -1 : a > b;
    } else {
      return Fault(line, absl::StrCat("'", op, "' of ", std::string(left.kind()), " and ",
                                      std::string(right.kind()), " makes no sense"));
    }
    if (op == "<") return order < 0;
    if (op == "<=") return order <= 0;
    if (op == ">") return order > 0;
    return order >= 0;
  }

  static absl::StatusOr<bool> Contains(const Value& container, const Value& item, int line) {
    if (container.is_undefined()) return false;
    if (container.is_list()) {
      return std::find(container.list()->begin(), container.list()->end(), item) !=
             container.list()->end();
    }
    if (container.is_string() && item.is_string()) {
      return container.string()->find(*item.string()) != std::string::npos;
    }
    if (container.is_dict()) return item.is_string() && container.Find(*item.string()) != nullptr;
    return Fault(line, absl::StrCat("'in' of ", std::string(item.kind()), " and ",
                                    std::string(container.kind()), " makes no sense"));
  }

  absl::StatusOr<Value> EvaluateCompare(const Expression& expression) {
    ASSIGN_OR_RETURN(Value left, Evaluate(*expression.items[0]));
    for (size_t i = 0; i < expression.operators.size(); ++i) {
      ASSIGN_OR_RETURN(Value right, Evaluate(*expression.items[i + 1]));
      ASSIGN_OR_RETURN(const bool holds,
                       Compare(expression.operators[i], left, right, expression.line));
      if (!holds) return Value(false);
      left = std::move(right);
    }
    return Value(true);
  }

  absl::StatusOr<Arguments> EvaluateArguments(const Expression& expression) {
    Arguments arguments;
    for (size_t i = 1; i < expression.items.size(); ++i) {
      ASSIGN_OR_RETURN(Value value, Evaluate(*expression.items[i]));
      arguments.values.push_back(std::move(value));
    }
    for (const auto& [name, argument] : expression.named) {
      ASSIGN_OR_RETURN(Value value, Evaluate(*argument));
      arguments.named.emplace_back(name, std::move(value));
    }
    return arguments;
  }

  absl::StatusOr<Value> EvaluateCall(const Expression& expression) {
    const Expression& callee = *expression.items[0];
    const int line = expression.line;
    if (callee.kind == Kind::kAttribute) {
      ASSIGN_OR_RETURN(const Value object, Evaluate(*callee.items[0]));
      ASSIGN_OR_RETURN(const Arguments arguments, EvaluateArguments(expression));
      if (object.is_undefined()) return UndefinedFault(line, object);
      if (object.is_string()) return CallString(*object.string(), callee.text, arguments, line);
      if (object.is_dict()) return CallDict(object, callee.text, arguments, line);
      return Unsupported(
          line, absl::StrCat("the method '", callee.text, "' of ", std::string(object.kind())));
    }
    if (callee.kind != Kind::kName) return Unsupported(line, "a call of an expression");
    ASSIGN_OR_RETURN(const Arguments arguments, EvaluateArguments(expression));
    if (callee.text == "raise_exception" && arguments.values.size() == 1) {
      ASSIGN_OR_RETURN(const std::string message, ToText(arguments.values[0], line));
      return Fault(line, absl::StrCat("the template refuses these messages: ", message));
    }
    if (callee.text == "namespace" && arguments.values.empty()) {
      auto names = std::make_shared<Namespace>();
      for (const auto& [name, value] : arguments.named) (*names)[name] = value;
      return Value(std::move(names));
    }
    if (callee.text == "range" && arguments.named.empty()) return Range(arguments.values, line);
    const Value value = Lookup(callee.text);
    for (const std::string_view known : {"raise_exception", "namespace", "range", "strftime_now",
                                         "dict", "lipsum", "cycler", "joiner"}) {
      if (callee.text == known) {
        return Unsupported(line, absl::StrCat("this call of '", callee.text, "'"));
      }
    }
    if (value.is_undefined()) return UndefinedFault(line, value);
    return Fault(line, absl::StrCat("'", callee.text, "' is no function"));
  }

  static absl::StatusOr<Value> Range(const std::vector<Value>& arguments, int line) {
    int64_t numbers[3] = {0, 0, 1};
    bool fine = !arguments.empty() && arguments.size() <= 3;
    for (size_t i = 0; fine && i < arguments.size(); ++i) {
      fine = arguments[i].integer(&numbers[i]) != nullptr && std::abs(numbers[i]) <= kMaxRange;
    }
    if (arguments.size() == 1) std::swap(numbers[0], numbers[1]);
    if (!fine || numbers[2] == 0) {
      return Fault(line, "range needs one to three integers up to 100000");
    }
    List items;
    for (int64_t i = numbers[0]; numbers[2] > 0 ? i < numbers[1] : i > numbers[1];
         i += numbers[2]) {
      items.emplace_back(i);
    }
    return Value(std::move(items));
  }

  // The arguments of a filter or method as strings; fails unless there are `least` to `most`.
  static absl::StatusOr<std::vector<std::string>> Strings(const Arguments& arguments, size_t least,
                                                          size_t most, std::string_view of,
                                                          int line) {
    std::vector<std::string> texts;
    bool fine = arguments.named.empty() && arguments.values.size() >= least &&
                arguments.values.size() <= most;
    for (const Value& value : arguments.values) {
      fine = fine && value.is_string();
      if (fine) texts.push_back(*value.string());
    }
    if (!fine)
      return Unsupported(line, absl::StrCat("'", std::string(of), "' with these arguments"));
    return texts;
  }

  absl::StatusOr<Value> CallString(const std::string& text, const std::string& method,
                                   const Arguments& arguments, int line) {
    if (method == "strip" || method == "lstrip" || method == "rstrip") {
      std::string_view characters;
      Arguments given = arguments;
      if (given.values.size() == 1 && given.values[0].is_none()) given.values.clear();
      ASSIGN_OR_RETURN(const std::vector<std::string> texts, Strings(given, 0, 1, method, line));
      if (!texts.empty()) {
        characters = texts[0];
        if (characters.empty()) return Value(text);
      }
      std::string_view rest = text;
      if (method != "rstrip") rest = StripLeft(rest, characters);
      if (method != "lstrip") rest = StripRight(rest, characters);
      return Value(std::string(rest));
    }
    if (method == "startswith" || method == "endswith") {
      ASSIGN_OR_RETURN(const std::vector<std::string> texts,
                       Strings(arguments, 1, 1, method, line));
      return Value(method == "startswith" ? text.starts_with(texts[0]) : text.ends_with(texts[0]));
    }
    if (method == "split") {
      Arguments given = arguments;
      int64_t most = -1;
      if (given.values.size() == 2) {
        if (given.values[1].integer(&most) == nullptr) most = -1;
        given.values.pop_back();
      }
      if (given.values.empty() && given.named.empty()) return Value(SplitAtSpace(text));
      ASSIGN_OR_RETURN(const std::vector<std::string> texts, Strings(given, 1, 1, method, line));
      if (texts[0].empty()) return Fault(line, "split needs a separator");
      return Value(Split(text, texts[0], most));
    }
    if (method == "replace") {
      ASSIGN_OR_RETURN(const std::vector<std::string> texts,
                       Strings(arguments, 2, 2, method, line));
      return Value(ReplaceAll(text, texts[0], texts[1], -1));
    }
    if (method == "upper" || method == "lower" || method == "capitalize" || method == "title") {
      RETURN_IF_ERROR(Strings(arguments, 0, 0, method, line).status());
      return ChangeCase(text, method, line);
    }
    if (method == "join" && arguments.values.size() == 1 && arguments.named.empty()) {
      return Join(arguments.values[0], text, line);
    }
    return Unsupported(line, absl::StrCat("the method '", method, "' of a string"));
  }

  static absl::StatusOr<Value> CallDict(const Value& dict, const std::string& method,
                                        const Arguments& arguments, int line) {
    const size_t count = arguments.values.size();
    if (method == "get" && arguments.named.empty() && (count == 1 || count == 2) &&
        arguments.values[0].is_string()) {
      if (const Value* found = dict.Find(*arguments.values[0].string())) return *found;
      return count == 2 ? arguments.values[1] : Value(None{});
    }
    if ((method == "items" || method == "keys" || method == "values") && count == 0) {
      List list;
      for (const auto& [key, value] : *dict.dict()) {
        if (method == "items") list.emplace_back(List{Value(key), value});
        if (method == "keys") list.emplace_back(key);
        if (method == "values") list.push_back(value);
      }
      return Value(std::move(list));
    }
    return Unsupported(line, absl::StrCat("the method '", method, "' of a dictionary"));
  }

  // ASCII only: Python's full mappings of other letters depend on its Unicode version.
  static absl::StatusOr<Value> ChangeCase(std::string text, const std::string& how, int line) {
    if (!IsAscii(text)) {
      return Unsupported(line, absl::StrCat("'", how, "' of letters other than ASCII"));
    }
    bool in_word = false;
    for (size_t i = 0; i < text.size(); ++i) {
      const bool upper =
          how == "upper" || (how == "capitalize" && i == 0) || (how == "title" && !in_word);
      text[i] = upper ? Upper(text[i]) : Lower(text[i]);
      in_word = Upper(text[i]) != Lower(text[i]);
    }
    return Value(std::move(text));
  }

  static absl::StatusOr<Value> Join(const Value& items, const std::string& separator, int line) {
    ASSIGN_OR_RETURN(const List list, ToList(items, line));
    std::string text;
    for (size_t i = 0; i < list.size(); ++i) {
      ASSIGN_OR_RETURN(const std::string each, ToText(list[i], line));
      if (i > 0) text += separator;
      text += each;
    }
    return Value(std::move(text));
  }

  static absl::StatusOr<Value> Length(const Value& value, int line) {
    if (value.is_string()) return Value(CountChars(*value.string()));
    if (value.is_dict()) return Value(static_cast<int64_t>(value.dict()->size()));
    if (value.is_list()) return Value(static_cast<int64_t>(value.list()->size()));
    if (value.is_undefined()) return Value(int64_t{0});
    return Fault(line, absl::StrCat(std::string(value.kind()), " has no length"));
  }

  absl::StatusOr<Value> EvaluateFilter(const Expression& expression) {
    ASSIGN_OR_RETURN(const Value value, Evaluate(*expression.items[0]));
    ASSIGN_OR_RETURN(const Arguments arguments, EvaluateArguments(expression));
    const std::string& name = expression.text;
    const int line = expression.line;
    const size_t count = arguments.values.size();
    if (!arguments.named.empty() && !(name == "default" || name == "d")) {
      return Unsupported(line, absl::StrCat("the filter '", name, "' with named arguments"));
    }
    if (name == "default" || name == "d") return Default(value, arguments, line);
    if (name == "length" || name == "count") return Length(value, line);
    if (name == "join" && count <= 1) {
      ASSIGN_OR_RETURN(const std::vector<std::string> texts, Strings(arguments, 0, 1, name, line));
      return Join(value, texts.empty() ? "" : texts[0], line);
    }
    if ((name == "first" || name == "last") && count == 0) {
      ASSIGN_OR_RETURN(const List list, ToList(value, line));
      if (list.empty()) return Value(Undefined{absl::StrCat("the ", name, " item of nothing")});
      return name == "first" ? list.front() : list.back();
    }
    if (name == "list" && count == 0) {
      ASSIGN_OR_RETURN(List list, ToList(value, line));
      return Value(std::move(list));
    }
    if (name == "items" && count == 0 && (value.is_dict() || value.is_undefined())) {
      if (value.is_undefined()) return Value(List());
      return CallDict(value, name, arguments, line);
    }
    if (name == "selectattr" || name == "rejectattr") {
      return SelectByAttribute(value, arguments, name == "selectattr", line);
    }
    // The rest are of strings; anything else is made one.
    if (name == "trim" || name == "upper" || name == "lower" || name == "capitalize" ||
        name == "title" || name == "string" || name == "replace") {
      ASSIGN_OR_RETURN(const std::string text, ToText(value, line));
      if (name == "trim") return CallString(text, "strip", arguments, line);
      if (name == "string" && count == 0) return Value(text);
      return CallString(text, name, arguments, line);
    }
    return Unsupported(line, absl::StrCat("the filter '", name, "'"));
  }

  static absl::StatusOr<Value> Default(const Value& value, const Arguments& arguments, int line) {
    Value otherwise = "";
    bool also_false = false;
    if (!arguments.values.empty()) otherwise = arguments.values[0];
    if (arguments.values.size() > 1) also_false = arguments.values[1].truth();
    for (const auto& [name, given] : arguments.named) {
      if (name == "default_value") {
        otherwise = given;
      } else if (name == "boolean") {
        also_false = given.truth();
      } else {
        return Fault(line, absl::StrCat("the filter 'default' has no argument '", name, "'"));
      }
    }
    return value.is_undefined() || (also_false && !value.truth()) ? otherwise : value;
  }

  absl::StatusOr<Value> EvaluateTest(const Expression& expression) {
    ASSIGN_OR_RETURN(const Value value, Evaluate(*expression.items[0]));
    ASSIGN_OR_RETURN(const Arguments arguments, EvaluateArguments(expression));
    ASSIGN_OR_RETURN(const bool holds, Test(value, expression.text, arguments, expression.line));
    return Value(holds);
  }

  // selectattr and rejectattr: (attribute), or (attribute, test, the test's arguments...).
  absl::StatusOr<Value> SelectByAttribute(const Value& value, const Arguments& arguments,
                                          bool select, int line) {
    if (arguments.values.empty() || !arguments.values[0].is_string() ||
        (arguments.values.size() > 1 && !arguments.values[1].is_string())) {
      return Fault(line, "selectattr and rejectattr need the name of an attribute");
    }
    const std::string& attribute = *arguments.values[0].string();
    if (attribute.find('.') != std::string::npos) {
      return Unsupported(line, absl::StrCat("the attribute path '", attribute, "'"));
    }
    Arguments rest;
    for (size_t i = 2; i < arguments.values.size(); ++i) rest.values.push_back(arguments.values[i]);
    ASSIGN_OR_RETURN(const List items, ToList(value, line));
    List kept;
    for (const Value& item : items) {
      ASSIGN_OR_RETURN(const Value member, Member(item, attribute, line));
      bool holds = member.truth();
      if (arguments.values.size() > 1) {
        ASSIGN_OR_RETURN(holds, Test(member, *arguments.values[1].string(), rest, line));
      }
      if (holds == select) kept.push_back(item);
    }
    return Value(std::move(kept));
  }

  static absl::StatusOr<bool> Test(const Value& value, const std::string& name,
                                   const Arguments& arguments, int line) {
    if (arguments.values.size() == 1 && arguments.named.empty()) {
      constexpr std::pair<std::string_view, const char*> kCompare[] = {
          {"eq", "=="}, {"equalto", "=="}, {"ne", "!="},         {"lt", "<"},  {"lessthan", "<"},
          {"le", "<="}, {"gt", ">"},       {"greaterthan", ">"}, {"ge", ">="}, {"in", "in"}};
      for (const auto& [word, op] : kCompare) {
        if (name != word) continue;
        return Compare(op, value, arguments.values[0], line);
      }
    }
    if (arguments.values.empty() && arguments.named.empty()) {
      int64_t number = 0;
      const bool numeric = value.integer(&number) != nullptr;
      if (name == "defined") return !value.is_undefined();
      if (name == "undefined") return value.is_undefined();
      if (name == "none") return value.is_none();
      if (name == "string") return value.is_string();
      if (name == "boolean") return value.is_bool();
      if (name == "true") return value.is_bool() && number != 0;
      if (name == "false") return value.is_bool() && number == 0;
      if (name == "integer") return value.is_int();
      if (name == "number") return numeric;
      if (name == "mapping") return value.is_dict();
      if (name == "sequence" || name == "iterable") {
        return value.is_string() || value.is_list() || value.is_dict() || value.is_undefined();
      }
      if (numeric && name == "odd") return number % 2 != 0;
      if (numeric && name == "even") return number % 2 == 0;
    }
    return Unsupported(line, absl::StrCat("the test 'is ", name, "'"));
  }

  std::vector<std::map<std::string, Value>> scopes_;
  std::string out_;
  int64_t steps_ = 0;
};

}  // namespace

absl::StatusOr<std::string> RenderTemplate(const Block& block, const Globals& globals) {
  return Interpreter(globals).Run(block);
}

}  // namespace canopy::jinja
