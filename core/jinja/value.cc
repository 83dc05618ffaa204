#include "core/jinja/value.h"

namespace canopy::jinja {

const int64_t* Value::integer(int64_t* storage) const {
  if (const auto* value = std::get_if<int64_t>(&data_)) {
    *storage = *value;
  } else if (const auto* flag = std::get_if<bool>(&data_)) {
    *storage = *flag ? 1 : 0;
  } else {
    return nullptr;
  }
  return storage;
}

bool Value::truth() const {
  if (is_undefined() || is_none()) return false;
  int64_t number = 0;
  if (integer(&number) != nullptr) return number != 0;
  if (string() != nullptr) return !string()->empty();
  if (list() != nullptr) return !list()->empty();
  if (dict() != nullptr) return !dict()->empty();
  return true;
}

std::string_view Value::kind() const {
  constexpr std::string_view kKinds[] = {"an undefined value", "none",       "a boolean",
                                         "an integer",         "a string",   "a list",
                                         "a dictionary",       "a namespace"};
  return kKinds[data_.index()];
}

const Value* Value::Find(std::string_view key) const {
  if (dict() != nullptr) {
    for (const auto& [name, value] : *dict()) {
      if (name == key) return &value;
    }
  }
  if (names() != nullptr) {
    const auto found = names()->find(std::string(key));
    if (found != names()->end()) return &found->second;
  }
  return nullptr;
}

bool operator==(const Value& a, const Value& b) {
  int64_t left = 0, right = 0;
  if (a.integer(&left) != nullptr && b.integer(&right) != nullptr) return left == right;
  if (a.data_.index() != b.data_.index()) return false;
  if (a.string() != nullptr) return *a.string() == *b.string();
  if (a.list() != nullptr) return *a.list() == *b.list();
  if (a.names() != nullptr) return a.names() == b.names();
  if (a.dict() != nullptr) {
    if (a.dict()->size() != b.dict()->size()) return false;
    for (const auto& [name, value] : *a.dict()) {
      const Value* other = b.Find(name);
      if (other == nullptr || !(value == *other)) return false;
    }
  }
  return true;
}

}  // namespace canopy::jinja
