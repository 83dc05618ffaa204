#include "core/jinja/syntax.h"

#include <initializer_list>
#include <utility>

#include "core/jinja/lexer.h"

namespace canopy::jinja {
namespace {

using Kind = Expression::Kind;

// Templates nest a handful of levels; more would overflow the stack of this recursive parser.
constexpr int kMaxNesting = 200;

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  absl::StatusOr<Block> Run() {
    ASSIGN_OR_RETURN(Block block, ParseBlock({}));
    return block;
  }

 private:
  // Counts nesting while it lives.
  class Level {
   public:
    explicit Level(int* depth) : depth_(depth) { ++*depth_; }
    ~Level() { --*depth_; }

   private:
    int* depth_;
  };

  const Token& Now() const { return tokens_[at_]; }
  const Token& After() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  Token Take() { return tokens_[at_ + 1 < tokens_.size() ? at_++ : at_]; }
  bool IsName(std::string_view name) const {
    return Now().kind == Token::Kind::kName && Now().text == name;
  }
  bool IsOperator(std::string_view text) const {
    return Now().kind == Token::Kind::kOperator && Now().text == text;
  }
  bool SkipName(std::string_view name) {
    if (!IsName(name)) return false;
    Take();
    return true;
  }
  bool SkipOperator(std::string_view text) {
    if (!IsOperator(text)) return false;
    Take();
    return true;
  }
  absl::Status Unexpected(std::string_view expected) const {
    const Token& token = Now();
    std::string found = absl::StrCat("\"", token.text, "\"");
    if (token.kind == Token::Kind::kBlockEnd) found = "'%}'";
    if (token.kind == Token::Kind::kOutputEnd) found = "'}}'";
    if (token.kind == Token::Kind::kEnd) found = "the end";
    return absl::InvalidArgumentError(
        AtLine(token.line, absl::StrCat("expected ", std::string(expected), ", found ", found)));
  }
  absl::Status ExpectOperator(std::string_view text) {
    if (SkipOperator(text)) return absl::OkStatus();
    return Unexpected(absl::StrCat("'", std::string(text), "'"));
  }
  absl::Status ExpectName(std::string_view name) {
    if (SkipName(name)) return absl::OkStatus();
    return Unexpected(absl::StrCat("'", std::string(name), "'"));
  }
  absl::StatusOr<std::string> AnyName() {
    if (Now().kind != Token::Kind::kName) return Unexpected("a name");
    return Take().text;
  }
  absl::Status EndBlock() {
    if (Now().kind != Token::Kind::kBlockEnd) return Unexpected("'%}'");
    Take();
    return absl::OkStatus();
  }
  static ExpressionPtr Make(Kind kind, int line, std::string text = "") {
    auto made = std::make_unique<Expression>();
    made->kind = kind;
    made->line = line;
    made->text = std::move(text);
    return made;
  }

  // Statements up to '{% WORD' of one of `ends`, which is not taken; to the template's end if there
  // are none.
  absl::StatusOr<Block> ParseBlock(std::initializer_list<std::string_view> ends) {
    const Level level(&depth_);
    if (depth_ > kMaxNesting) return Unsupported(Now().line, "nesting this deep");
    Block block;
    while (true) {
      switch (Now().kind) {
        case Token::Kind::kText: {
          Statement text{.kind = Statement::Kind::kText, .line = Now().line};
          text.text = Take().text;
          block.push_back(std::move(text));
          break;
        }
        case Token::Kind::kOutputBegin: {
          Statement output{.kind = Statement::Kind::kOutput, .line = Now().line};
          Take();
          ASSIGN_OR_RETURN(output.expression, ParseExpression());
          if (IsOperator(",")) return Unsupported(Now().line, "a tuple");
          if (Now().kind != Token::Kind::kOutputEnd) return Unexpected("'}}'");
          Take();
          block.push_back(std::move(output));
          break;
        }
        case Token::Kind::kBlockBegin: {
          const Token& word = After();
          for (const std::string_view end : ends) {
            if (word.kind == Token::Kind::kName && word.text == end) return block;
          }
          Take();
          ASSIGN_OR_RETURN(Statement statement, ParseStatement());
          block.push_back(std::move(statement));
          break;
        }
        default:
          if (ends.size() == 0) return block;
          return Unexpected(absl::StrCat("'{% ", std::string(*(ends.end() - 1)), " %}'"));
      }
    }
  }

  absl::StatusOr<Statement> ParseStatement() {
    const int line = Now().line;
    ASSIGN_OR_RETURN(const std::string word, AnyName());
    if (word == "if") return ParseIf(line);
    if (word == "for") return ParseFor(line);
    if (word == "set") return ParseSet(line);
    if (word == "break" || word == "continue") {
      if (loops_ == 0) {
        return absl::InvalidArgumentError(
            AtLine(line, absl::StrCat("'{% ", word, " %}' outside a loop")));
      }
      RETURN_IF_ERROR(EndBlock());
      return Statement{
          .kind = word == "break" ? Statement::Kind::kBreak : Statement::Kind::kContinue,
          .line = line};
    }
    if (word == "generation") {
      // transformers' mark of the answers; it adds no text.
      Statement block{.kind = Statement::Kind::kBlock, .line = line};
      RETURN_IF_ERROR(EndBlock());
      block.branches.emplace_back();
      ASSIGN_OR_RETURN(block.branches[0].body, ParseBlock({"endgeneration"}));
      RETURN_IF_ERROR(EndTag());
      return block;
    }
    for (const std::string_view stray : {"elif", "else", "endif", "endfor", "endset"}) {
      if (word == stray) {
        return absl::InvalidArgumentError(
            AtLine(line, absl::StrCat("'{% ", word, " %}' without its beginning")));
      }
    }
    return Unsupported(line, absl::StrCat("the statement '{% ", word, " %}'"));
  }

  // '{% WORD %}' of an end that ParseBlock stopped at.
  absl::Status EndTag() {
    Take();
    Take();
    return EndBlock();
  }

  absl::StatusOr<Statement> ParseIf(int line) {
    Statement statement{.kind = Statement::Kind::kIf, .line = line};
    bool conditional = true;
    while (true) {
      Statement::Branch branch;
      if (conditional) {
        ASSIGN_OR_RETURN(branch.condition, ParseExpression());
      }
      RETURN_IF_ERROR(EndBlock());
      if (conditional) {
        ASSIGN_OR_RETURN(branch.body, ParseBlock({"elif", "else", "endif"}));
      } else {
        ASSIGN_OR_RETURN(branch.body, ParseBlock({"endif"}));
      }
      statement.branches.push_back(std::move(branch));
      Take();
      const std::string word = Take().text;
      if (word == "endif") break;
      conditional = word == "elif";
    }
    RETURN_IF_ERROR(EndBlock());
    return statement;
  }

  absl::StatusOr<Statement> ParseFor(int line) {
    Statement statement{.kind = Statement::Kind::kFor, .line = line};
    do {
      ASSIGN_OR_RETURN(std::string name, AnyName());
      statement.names.push_back(std::move(name));
    } while (SkipOperator(","));
    RETURN_IF_ERROR(ExpectName("in"));
    // Not a conditional expression: 'if' belongs to the loop.
    ASSIGN_OR_RETURN(statement.expression, ParseOr());
    if (SkipName("if")) {
      ASSIGN_OR_RETURN(statement.condition, ParseExpression());
    }
    if (IsName("recursive")) return Unsupported(line, "'recursive' of a loop");
    RETURN_IF_ERROR(EndBlock());
    ++loops_;
    statement.branches.emplace_back();
    ASSIGN_OR_RETURN(statement.branches[0].body, ParseBlock({"else", "endfor"}));
    --loops_;
    if (After().text == "else") {
      RETURN_IF_ERROR(EndTag());
      ASSIGN_OR_RETURN(statement.otherwise, ParseBlock({"endfor"}));
    }
    RETURN_IF_ERROR(EndTag());
    return statement;
  }

  absl::StatusOr<Statement> ParseSet(int line) {
    Statement statement{.kind = Statement::Kind::kSet, .line = line};
    ASSIGN_OR_RETURN(std::string name, AnyName());
    statement.names.push_back(std::move(name));
    if (SkipOperator(".")) {
      ASSIGN_OR_RETURN(std::string member, AnyName());
      statement.names.push_back(std::move(member));
    }
    if (IsOperator(",")) return Unsupported(line, "'{% set %}' of several names");
    if (SkipOperator("=")) {
      ASSIGN_OR_RETURN(statement.expression, ParseExpression());
      if (IsOperator(",")) return Unsupported(line, "a tuple");
      RETURN_IF_ERROR(EndBlock());
      return statement;
    }
    if (IsOperator("|")) return Unsupported(line, "a filter of a '{% set %}' block");
    statement.kind = Statement::Kind::kSetBlock;
    if (statement.names.size() > 1) return Unexpected("'='");
    RETURN_IF_ERROR(EndBlock());
    statement.branches.emplace_back();
    const int loops = std::exchange(loops_, 0);
    ASSIGN_OR_RETURN(statement.branches[0].body, ParseBlock({"endset"}));
    loops_ = loops;
    RETURN_IF_ERROR(EndTag());
    return statement;
  }

  // The grammar of Jinja's own parser, loosest first.

  absl::StatusOr<ExpressionPtr> ParseExpression() {
    const Level level(&depth_);
    if (depth_ > kMaxNesting) return Unsupported(Now().line, "nesting this deep");
    ASSIGN_OR_RETURN(ExpressionPtr value, ParseOr());
    while (IsName("if")) {
      ExpressionPtr choice = Make(Kind::kIf, Take().line);
      ASSIGN_OR_RETURN(ExpressionPtr condition, ParseOr());
      ExpressionPtr otherwise;
      if (SkipName("else")) {
        ASSIGN_OR_RETURN(otherwise, ParseExpression());
      }
      choice->items.push_back(std::move(value));
      choice->items.push_back(std::move(condition));
      choice->items.push_back(std::move(otherwise));
      value = std::move(choice);
    }
    return value;
  }

  // OPERAND (NAME OPERAND)* for 'or' and 'and'; to the left.
  template <typename Operand>
  absl::StatusOr<ExpressionPtr> ParseChain(std::string_view name, Kind kind, Operand operand) {
    ASSIGN_OR_RETURN(ExpressionPtr left, operand());
    while (IsName(name)) {
      ExpressionPtr both = Make(kind, Take().line);
      ASSIGN_OR_RETURN(ExpressionPtr right, operand());
      both->items.push_back(std::move(left));
      both->items.push_back(std::move(right));
      left = std::move(both);
    }
    return left;
  }

  absl::StatusOr<ExpressionPtr> ParseOr() {
    return ParseChain("or", Kind::kOr, [&] { return ParseAnd(); });
  }
  absl::StatusOr<ExpressionPtr> ParseAnd() {
    return ParseChain("and", Kind::kAnd, [&] { return ParseNot(); });
  }

  absl::StatusOr<ExpressionPtr> ParseNot() {
    if (!IsName("not")) return ParseCompare();
    const Level level(&depth_);
    if (depth_ > kMaxNesting) return Unsupported(Now().line, "nesting this deep");
    ExpressionPtr negated = Make(Kind::kNot, Take().line);
    ASSIGN_OR_RETURN(ExpressionPtr operand, ParseNot());
    negated->items.push_back(std::move(operand));
    return negated;
  }

  absl::StatusOr<ExpressionPtr> ParseCompare() {
    ASSIGN_OR_RETURN(ExpressionPtr left, ParseSum());
    ExpressionPtr compare;
    while (true) {
      std::string op;
      for (const std::string_view each : {"==", "!=", "<", "<=", ">", ">="}) {
        if (IsOperator(each)) op = each;
      }
      if (IsName("in")) op = "in";
      if (IsName("not") && After().kind == Token::Kind::kName && After().text == "in") {
        op = "not in";
        Take();
      }
      if (op.empty()) break;
      const int line = Take().line;
      if (compare == nullptr) {
        compare = Make(Kind::kCompare, line);
        compare->items.push_back(std::move(left));
      }
      ASSIGN_OR_RETURN(ExpressionPtr right, ParseSum());
      compare->operators.push_back(std::move(op));
      compare->items.push_back(std::move(right));
    }
    return compare == nullptr ? std::move(left) : std::move(compare);
  }

  template <typename Operand>
  absl::StatusOr<ExpressionPtr> ParseBinary(std::initializer_list<std::string_view> operators,
                                            Operand operand) {
    ASSIGN_OR_RETURN(ExpressionPtr left, operand());
    while (true) {
      bool found = false;
      for (const std::string_view op : operators) {
        if (!IsOperator(op)) continue;
        ExpressionPtr both = Make(Kind::kBinary, Take().line, std::string(op));
        ASSIGN_OR_RETURN(ExpressionPtr right, operand());
        both->items.push_back(std::move(left));
        both->items.push_back(std::move(right));
        left = std::move(both);
        found = true;
        break;
      }
      if (!found) return left;
    }
  }

  absl::StatusOr<ExpressionPtr> ParseSum() {
    return ParseBinary({"+", "-"}, [&] { return ParseConcatenation(); });
  }
  absl::StatusOr<ExpressionPtr> ParseConcatenation() {
    return ParseBinary({"~"}, [&] { return ParseProduct(); });
  }
  absl::StatusOr<ExpressionPtr> ParseProduct() {
    return ParseBinary({"*", "/", "//", "%"}, [&]() -> absl::StatusOr<ExpressionPtr> {
      ASSIGN_OR_RETURN(ExpressionPtr operand, ParseUnary(true));
      if (IsOperator("**")) return Unsupported(Now().line, "the operator '**'");
      return operand;
    });
  }

  absl::StatusOr<ExpressionPtr> ParseUnary(bool with_filters) {
    const Level level(&depth_);
    if (depth_ > kMaxNesting) return Unsupported(Now().line, "nesting this deep");
    ExpressionPtr value;
    if (IsOperator("-")) {
      value = Make(Kind::kMinus, Take().line);
      ASSIGN_OR_RETURN(ExpressionPtr operand, ParseUnary(false));
      value->items.push_back(std::move(operand));
    } else if (IsOperator("+")) {
      return Unsupported(Now().line, "the sign '+'");
    } else {
      ASSIGN_OR_RETURN(value, ParsePrimary());
    }
    RETURN_IF_ERROR(ParsePostfix(&value));
    if (with_filters) RETURN_IF_ERROR(ParseFilters(&value));
    return value;
  }

  absl::StatusOr<ExpressionPtr> ParsePrimary() {
    const Token token = Now();
    switch (token.kind) {
      case Token::Kind::kName: {
        Take();
        if (token.text == "true" || token.text == "True" || token.text == "false" ||
            token.text == "False") {
          ExpressionPtr value = Make(Kind::kBool, token.line);
          value->number = token.text[0] == 't' || token.text[0] == 'T';
          return value;
        }
        if (token.text == "none" || token.text == "None") return Make(Kind::kNone, token.line);
        return Make(Kind::kName, token.line, token.text);
      }
      case Token::Kind::kString: {
        ExpressionPtr value = Make(Kind::kString, token.line);
        while (Now().kind == Token::Kind::kString) value->text += Take().text;
        return value;
      }
      case Token::Kind::kInteger: {
        Take();
        ExpressionPtr value = Make(Kind::kInteger, token.line);
        value->number = std::stoll(token.text);
        return value;
      }
      default:
        break;
    }
    if (SkipOperator("(")) {
      if (IsOperator(")")) return Unsupported(token.line, "a tuple");
      ASSIGN_OR_RETURN(ExpressionPtr value, ParseExpression());
      if (IsOperator(",")) return Unsupported(token.line, "a tuple");
      RETURN_IF_ERROR(ExpectOperator(")"));
      return value;
    }
    if (SkipOperator("[")) {
      ExpressionPtr list = Make(Kind::kList, token.line);
      while (!SkipOperator("]")) {
        if (!list->items.empty()) RETURN_IF_ERROR(ExpectOperator(","));
        if (SkipOperator("]")) break;
        ASSIGN_OR_RETURN(ExpressionPtr item, ParseExpression());
        list->items.push_back(std::move(item));
      }
      return list;
    }
    if (SkipOperator("{")) {
      ExpressionPtr dict = Make(Kind::kDict, token.line);
      while (!SkipOperator("}")) {
        if (!dict->items.empty()) RETURN_IF_ERROR(ExpectOperator(","));
        if (SkipOperator("}")) break;
        ASSIGN_OR_RETURN(ExpressionPtr key, ParseExpression());
        RETURN_IF_ERROR(ExpectOperator(":"));
        ASSIGN_OR_RETURN(ExpressionPtr value, ParseExpression());
        dict->items.push_back(std::move(key));
        dict->items.push_back(std::move(value));
      }
      return dict;
    }
    return Unexpected("an expression");
  }

  absl::Status ParsePostfix(ExpressionPtr* value) {
    while (true) {
      const int line = Now().line;
      if (SkipOperator(".")) {
        if (Now().kind == Token::Kind::kInteger) {
          ExpressionPtr item = Make(Kind::kItem, line);
          ExpressionPtr index = Make(Kind::kInteger, line);
          index->number = std::stoll(Take().text);
          item->items.push_back(std::move(*value));
          item->items.push_back(std::move(index));
          *value = std::move(item);
          continue;
        }
        ASSIGN_OR_RETURN(std::string name, AnyName());
        ExpressionPtr attribute = Make(Kind::kAttribute, line, std::move(name));
        attribute->items.push_back(std::move(*value));
        *value = std::move(attribute);
      } else if (SkipOperator("[")) {
        RETURN_IF_ERROR(ParseSubscript(line, value));
      } else if (IsOperator("(")) {
        RETURN_IF_ERROR(ParseCall(value));
      } else {
        return absl::OkStatus();
      }
    }
  }

  // After '['.
  absl::Status ParseSubscript(int line, ExpressionPtr* value) {
    ExpressionPtr parts[3];
    int part = 0;
    bool slice = false;
    while (!IsOperator("]")) {
      if (SkipOperator(":")) {
        slice = true;
        if (++part > 2) return Unexpected("']'");
        continue;
      }
      if (parts[part] != nullptr) return Unexpected("']'");
      ASSIGN_OR_RETURN(parts[part], ParseExpression());
      if (IsOperator(",")) return Unsupported(line, "a tuple as an index");
    }
    Take();
    if (!slice && parts[0] == nullptr) return Unexpected("an index");
    ExpressionPtr made = Make(slice ? Kind::kSlice : Kind::kItem, line);
    made->items.push_back(std::move(*value));
    for (int i = 0; i < (slice ? 3 : 1); ++i) made->items.push_back(std::move(parts[i]));
    *value = std::move(made);
    return absl::OkStatus();
  }

  absl::Status ParseCall(ExpressionPtr* value) {
    ExpressionPtr call = Make(Kind::kCall, Now().line);
    call->items.push_back(std::move(*value));
    RETURN_IF_ERROR(ParseArguments(call.get()));
    *value = std::move(call);
    return absl::OkStatus();
  }

  // '(' ... ')' into items and named of `call`.
  absl::Status ParseArguments(Expression* call) {
    RETURN_IF_ERROR(ExpectOperator("("));
    bool first = true;
    while (!SkipOperator(")")) {
      if (!first) RETURN_IF_ERROR(ExpectOperator(","));
      first = false;
      if (SkipOperator(")")) break;
      if (IsOperator("*") || IsOperator("**")) return Unsupported(Now().line, "'*' of arguments");
      if (Now().kind == Token::Kind::kName && After().kind == Token::Kind::kOperator &&
          After().text == "=") {
        std::string name = Take().text;
        Take();
        ASSIGN_OR_RETURN(ExpressionPtr argument, ParseExpression());
        call->named.emplace_back(std::move(name), std::move(argument));
      } else {
        if (!call->named.empty()) return Unexpected("a named argument");
        ASSIGN_OR_RETURN(ExpressionPtr argument, ParseExpression());
        call->items.push_back(std::move(argument));
      }
    }
    return absl::OkStatus();
  }

  absl::Status ParseFilters(ExpressionPtr* value) {
    while (true) {
      const int line = Now().line;
      if (SkipOperator("|")) {
        ASSIGN_OR_RETURN(std::string name, AnyName());
        ExpressionPtr filter = Make(Kind::kFilter, line, std::move(name));
        filter->items.push_back(std::move(*value));
        if (IsOperator("(")) RETURN_IF_ERROR(ParseArguments(filter.get()));
        *value = std::move(filter);
      } else if (SkipName("is")) {
        RETURN_IF_ERROR(ParseTest(line, value));
      } else if (IsOperator("(")) {
        RETURN_IF_ERROR(ParseCall(value));
      } else {
        return absl::OkStatus();
      }
    }
  }

  // After 'is'.
  absl::Status ParseTest(int line, ExpressionPtr* value) {
    const bool negated = SkipName("not");
    ASSIGN_OR_RETURN(std::string name, AnyName());
    ExpressionPtr test = Make(Kind::kTest, line, std::move(name));
    test->items.push_back(std::move(*value));
    const Token& next = Now();
    if (IsName("is")) return Unexpected("an end of the test");
    // Jinja takes any other name for an argument, 'if' too.
    const bool argument_name = next.kind == Token::Kind::kName && next.text != "else" &&
                               next.text != "or" && next.text != "and";
    if (IsOperator("(")) {
      RETURN_IF_ERROR(ParseArguments(test.get()));
    } else if (argument_name || next.kind == Token::Kind::kString ||
               next.kind == Token::Kind::kInteger || IsOperator("[") || IsOperator("{")) {
      ASSIGN_OR_RETURN(ExpressionPtr argument, ParsePrimary());
      RETURN_IF_ERROR(ParsePostfix(&argument));
      test->items.push_back(std::move(argument));
    }
    *value = std::move(test);
    if (negated) {
      ExpressionPtr wrapped = Make(Kind::kNot, line);
      wrapped->items.push_back(std::move(*value));
      *value = std::move(wrapped);
    }
    return absl::OkStatus();
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int depth_ = 0;
  int loops_ = 0;  // that the current statement is in
};

}  // namespace

absl::StatusOr<Block> ParseTemplate(std::string_view source) {
  ASSIGN_OR_RETURN(std::vector<Token> tokens, Tokenize(source));
  return Parser(std::move(tokens)).Run();
}

}  // namespace canopy::jinja
