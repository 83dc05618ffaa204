// The values of a chat template: a subset of Python's.

#ifndef CANOPY_CORE_JINJA_VALUE_H_
#define CANOPY_CORE_JINJA_VALUE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace canopy::jinja {

class Value;
using List = std::vector<Value>;
using Dict = std::vector<std::pair<std::string, Value>>;  // in the order of insertion
using Namespace = std::map<std::string, Value>;

struct Undefined {
  std::string name;  // what was looked for
};
struct None {};

// Cheap to copy but for strings; lists and dictionaries are shared and never change, a namespace is
// shared and does.
class Value {
 public:
  Value() : data_(Undefined{}) {}
  Value(Undefined undefined) : data_(std::move(undefined)) {}                 // NOLINT
  Value(None none) : data_(none) {}                                           // NOLINT
  Value(bool value) : data_(value) {}                                         // NOLINT
  Value(int64_t value) : data_(value) {}                                      // NOLINT
  Value(std::string text) : data_(std::move(text)) {}                         // NOLINT
  Value(const char* text) : data_(std::string(text)) {}                       // NOLINT
  Value(List list) : data_(std::make_shared<const List>(std::move(list))) {}  // NOLINT
  Value(Dict dict) : data_(std::make_shared<const Dict>(std::move(dict))) {}  // NOLINT
  Value(std::shared_ptr<Namespace> names) : data_(std::move(names)) {}        // NOLINT

  bool is_undefined() const { return std::holds_alternative<Undefined>(data_); }
  bool is_none() const { return std::holds_alternative<None>(data_); }
  bool is_bool() const { return std::holds_alternative<bool>(data_); }
  bool is_int() const { return std::holds_alternative<int64_t>(data_); }
  bool is_string() const { return string() != nullptr; }
  bool is_list() const { return list() != nullptr; }
  bool is_dict() const { return dict() != nullptr; }

  const std::string* string() const { return std::get_if<std::string>(&data_); }
  const List* list() const {
    const auto* shared = std::get_if<std::shared_ptr<const List>>(&data_);
    return shared == nullptr ? nullptr : shared->get();
  }
  const Dict* dict() const {
    const auto* shared = std::get_if<std::shared_ptr<const Dict>>(&data_);
    return shared == nullptr ? nullptr : shared->get();
  }
  Namespace* names() const {
    const auto* shared = std::get_if<std::shared_ptr<Namespace>>(&data_);
    return shared == nullptr ? nullptr : shared->get();
  }
  // A bool counts as 0 or 1; null for what is no number.
  const int64_t* integer(int64_t* storage) const;
  const std::string& undefined_name() const { return std::get<Undefined>(data_).name; }

  // Python's truth of a value.
  bool truth() const;
  // "a string", "a list", ...: for messages.
  std::string_view kind() const;
  // The value under a string key of a dictionary or namespace; null if there is none.
  const Value* Find(std::string_view key) const;

  friend bool operator==(const Value& a, const Value& b);

 private:
  std::variant<Undefined, None, bool, int64_t, std::string, std::shared_ptr<const List>,
               std::shared_ptr<const Dict>, std::shared_ptr<Namespace>>
      data_;
};

}  // namespace canopy::jinja

#endif  // CANOPY_CORE_JINJA_VALUE_H_
