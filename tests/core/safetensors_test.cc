#include "core/safetensors.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/checkpoint_files.h"

namespace canopy {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using testing::F32Tensor;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::SafetensorsBytes;
using ::testing::SizeIs;
using testing::StoredTensors;
using testing::TempFolder;
using testing::WriteFile;

absl::StatusOr<Safetensors> Parse(const std::string& bytes) {
  return Safetensors::FromBytes("x.safetensors", std::as_bytes(std::span<const char>(bytes)));
}

std::string Message(const absl::Status& status) { return std::string(status.message()); }

std::string FloatBytes(const std::vector<float>& values) {
  return F32Tensor({static_cast<int64_t>(values.size())}, values).bytes;
}

TEST(Safetensors, ReadsTensorsAndMetadata) {
  // Written by hand, with tensors out of order, an empty one, a scalar, and blanks after the
  // header.
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,1],"data_offsets":[2,10]},)"
      R"("a":{"shape":[],"data_offsets":[0,2],"dtype":"BF16"},)"
      R"("none":{"dtype":"F16","shape":[3,0],"data_offsets":[10,10]}}   )";
  const std::string bytes =
      SafetensorsBytes(header, std::string("\x80\x3f", 2) + FloatBytes({1.5f, -2.0f}));
  const absl::StatusOr<Safetensors> file = Parse(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_THAT(file->entries(), SizeIs(3));
  EXPECT_EQ(file->metadata().at("format"), "pt");
  const SafetensorsEntry* b = file->Find("b");
  ASSERT_NE(b, nullptr);
  EXPECT_EQ(b->dtype, DType::kF32);
  EXPECT_THAT(b->shape, ElementsAre(2, 1));
  EXPECT_EQ(b->ShapeString(), "[2, 1]");
  std::vector<float> values(2);
  ASSERT_TRUE(ReadFloats(*b, values).ok());
  EXPECT_THAT(values, ElementsAre(1.5f, -2.0f));
  const SafetensorsEntry* a = file->Find("a");
  ASSERT_NE(a, nullptr);
  std::vector<float> scalar(1);
  ASSERT_TRUE(ReadFloats(*a, scalar).ok());
  EXPECT_EQ(scalar[0], 1.0f);
  EXPECT_EQ(file->Find("none")->elements(), 0);
  EXPECT_EQ(file->Find("c"), nullptr);
}

TEST(Safetensors, AcceptsAFileWithoutTensors) {
  const absl::StatusOr<Safetensors> file = Parse(SafetensorsBytes("{}", ""));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_THAT(file->entries(), IsEmpty());
}

struct BadCase {
  const char* name;
  std::string bytes;
  std::vector<std::string> message;  // what it must contain
};

void PrintTo(const BadCase& bad, std::ostream* out) { *out << bad.name; }

std::string OneTensor(const std::string& body, size_t data_bytes) {
  return SafetensorsBytes("{\"t\":" + body + "}", std::string(data_bytes, '\0'));
}

class BadSafetensors : public ::testing::TestWithParam<BadCase> {};

TEST_P(BadSafetensors, IsRefusedWithFileAndReason) {
  const absl::StatusOr<Safetensors> file = Parse(GetParam().bytes);
  ASSERT_FALSE(file.ok());
  EXPECT_EQ(file.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(file.status()), HasSubstr("x.safetensors: "));
  for (const std::string& part : GetParam().message) {
    EXPECT_THAT(Message(file.status()), HasSubstr(part));
  }
  EXPECT_EQ(Message(file.status()).find('\n'), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(
    All, BadSafetensors,
    ::testing::Values(
        BadCase{"Empty", "", {"has 0 bytes"}}, BadCase{"SevenBytes", "1234567", {"has 7 bytes"}},
        BadCase{"HeaderTruncated",
                SafetensorsBytes(100, R"({"t":{"dtype":"F32","shape":[1],)", ""),
                {"header's length is 100", "only 32 bytes follow"}},
        BadCase{"HeaderLengthHuge",
                SafetensorsBytes(UINT64_MAX, "{}", ""),
                {"header's length is 18446744073709551615"}},
        BadCase{"HeaderLengthWraps",
                SafetensorsBytes(UINT64_MAX - 7, "{}", ""),
                {"header's length is"}},
        BadCase{"HeaderEmpty", SafetensorsBytes("", "1234"), {"is not JSON"}},
        BadCase{"NotJson", SafetensorsBytes("{\"a\":", ""), {"is not JSON at byte"}},
        BadCase{"NotUtf8", SafetensorsBytes("{\"\xff\":1}", ""), {"is not JSON at byte"}},
        BadCase{"Trailing", SafetensorsBytes("{}x", ""), {"is not JSON at byte"}},
        BadCase{"List", SafetensorsBytes("[]", ""), {"a list, not an object"}},
        BadCase{"Number", SafetensorsBytes("7", ""), {"a number, not an object"}},
        BadCase{"TensorNotObject", SafetensorsBytes(R"({"t":3})", ""), {"entry t", "an object"}},
        BadCase{"TensorIsList", SafetensorsBytes(R"({"t":[]})", ""), {"entry t", "an object"}},
        BadCase{"MetadataNotStrings",
                SafetensorsBytes(R"({"__metadata__":{"a":1}})", ""),
                {"__metadata__", "strings"}},
        BadCase{"MetadataNested",
                SafetensorsBytes(R"({"__metadata__":{"a":{}}})", ""),
                {"__metadata__", "strings"}},
        BadCase{"NoDtype",
                OneTensor(R"({"shape":[1],"data_offsets":[0,4]})", 4),
                {"tensor t lacks dtype"}},
        BadCase{"NoShape",
                OneTensor(R"({"dtype":"F32","data_offsets":[0,4]})", 4),
                {"tensor t lacks shape"}},
        BadCase{"NoOffsets",
                OneTensor(R"({"dtype":"F32","shape":[1]})", 4),
                {"tensor t lacks data_offsets"}},
        BadCase{"UnknownDtype",
                OneTensor(R"({"dtype":"F31","shape":[1],"data_offsets":[0,4]})", 4),
                {"tensor t", "unknown dtype F31"}},
        BadCase{"DtypeNumber",
                OneTensor(R"({"dtype":32,"shape":[1],"data_offsets":[0,4]})", 4),
                {"tensor t", "a string for dtype"}},
        BadCase{"UnknownKey",
                OneTensor(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"extra":[1]})", 4),
                {"tensor t", "unknown key extra"}},
        BadCase{"ShapeNegative",
                OneTensor(R"({"dtype":"F32","shape":[-1],"data_offsets":[0,4]})", 4),
                {"tensor t", "negative number -1"}},
        BadCase{"ShapeFraction",
                OneTensor(R"({"dtype":"F32","shape":[1.0],"data_offsets":[0,4]})", 4),
                {"tensor t", "1.0", "whole number"}},
        BadCase{"ShapeString",
                OneTensor(R"({"dtype":"F32","shape":["1"],"data_offsets":[0,4]})", 4),
                {"tensor t", "whole numbers"}},
        BadCase{"ShapeNested",
                OneTensor(R"({"dtype":"F32","shape":[[1]],"data_offsets":[0,4]})", 4),
                {"tensor t", "whole numbers"}},
        BadCase{"ShapeNull",
                OneTensor(R"({"dtype":"F32","shape":null,"data_offsets":[0,4]})", 4),
                {"tensor t", "a list for shape"}},
        BadCase{
            "ShapeOverflowsWords",
            OneTensor(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]})", 0),
            {"tensor t", "[4294967296, 4294967296]", "larger than any memory"}},
        // 2^62 elements of 4 bytes: the product wraps to 0 bytes, which the offsets hold.
        BadCase{
            "ShapeOverflowsBytes",
            OneTensor(R"({"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]})", 0),
            {"tensor t", "larger than any memory"}},
        BadCase{
            "ShapeBeyondInt64",
            OneTensor(R"({"dtype":"U8","shape":[18446744073709551615,0],"data_offsets":[0,0]})", 0),
            {"tensor t", "larger than any memory"}},
        BadCase{
            "NumberBeyondUint64",
            OneTensor(R"({"dtype":"U8","shape":[99999999999999999999],"data_offsets":[0,0]})", 0),
            {"tensor t", "whole number"}},
        BadCase{"ShapeTooSmall",
                OneTensor(R"({"dtype":"F32","shape":[1],"data_offsets":[0,8]})", 8),
                {"tensor t", "F32 [1] needs 4 bytes", "[0, 8] hold 8"}},
        BadCase{"ShapeTooLarge",
                OneTensor(R"({"dtype":"BF16","shape":[2,3],"data_offsets":[0,8]})", 8),
                {"tensor t", "BF16 [2, 3] needs 12 bytes"}},
        BadCase{"OddBits",
                OneTensor(R"({"dtype":"F4","shape":[3],"data_offsets":[0,2]})", 2),
                {"tensor t", "F4 [3]"}},
        BadCase{"OffsetsReversed",
                OneTensor(R"({"dtype":"F32","shape":[1],"data_offsets":[4,0]})", 4),
                {"tensor t", "[4, 0]"}},
        BadCase{"OffsetsBeyondFile",
                OneTensor(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})", 4),
                {"tensor t", "[0, 8]", "4 bytes"}},
        BadCase{"OneOffset",
                OneTensor(R"({"dtype":"F32","shape":[1],"data_offsets":[0]})", 4),
                {"tensor t", "1 data_offsets"}},
        BadCase{"ThreeOffsets",
                OneTensor(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4,8]})", 4),
                {"tensor t", "3 data_offsets"}},
        BadCase{"TwoTensorsOfOneName",
                SafetensorsBytes(R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                 R"("t":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                                 "ab"),
                {"tensor t is there twice"}},
        BadCase{"KeyTwice",
                OneTensor(R"({"dtype":"U8","shape":[1],"shape":[2],"data_offsets":[0,2]})", 2),
                {"tensor t", "shape twice"}},
        BadCase{"Overlap",
                SafetensorsBytes(R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
                                 R"("b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
                                 "abcd"),
                {"tensor b begins at byte 2", "inside the tensor before it"}},
        BadCase{"Gap",
                SafetensorsBytes(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                 R"("b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
                                 "abc"),
                {"tensor b begins at byte 2", "ends at 1"}},
        BadCase{"TrailingData",
                SafetensorsBytes(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", "ab"),
                {"end at byte 1", "have 2"}},
        BadCase{
            "ControlCharactersInName",
            SafetensorsBytes(R"({"a\nb":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}})", "a"),
            {"tensor a?b"}}),
    [](const ::testing::TestParamInfo<BadCase>& info) { return info.param.name; });

TEST(Safetensors, DeepNestingIsRefused) {
  const std::string header = "{\"t\":" + std::string(1'000'000, '[');
  EXPECT_EQ(Parse(SafetensorsBytes(header, "")).status().code(),
            absl::StatusCode::kInvalidArgument);
}

// Every prefix of a good file is refused: nothing reads past the end (which asan would see).
TEST(Safetensors, EveryTruncationIsRefused) {
  const std::string good = SafetensorsBytes(
      StoredTensors{{"a", F32Tensor({2}, {1, 2})}, {"b", F32Tensor({1, 3}, {3, 4, 5})}});
  ASSERT_TRUE(Parse(good).ok());
  for (size_t size = 0; size < good.size(); ++size) {
    const std::vector<char> bytes(good.begin(), good.begin() + static_cast<ptrdiff_t>(size));
    EXPECT_FALSE(Safetensors::FromBytes("x", std::as_bytes(std::span<const char>(bytes))).ok())
        << size;
  }
}

TEST(Safetensors, OpensFiles) {
  const TempFolder folder;
  const std::string path = folder.File("t.safetensors");
  EXPECT_EQ(Safetensors::Open(path).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Message(Safetensors::Open(path).status()), HasSubstr(path));
  WriteFile(path, "");
  EXPECT_EQ(Safetensors::Open(path).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Safetensors::Open(folder.path().string()).status().code(),
            absl::StatusCode::kInvalidArgument);
  WriteFile(path, SafetensorsBytes(StoredTensors{{"a", F32Tensor({2}, {1, 2})}}));
  absl::StatusOr<Safetensors> file = Safetensors::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  // The data stay where they are when the object moves.
  const Safetensors moved = *std::move(file);
  std::vector<float> values(2);
  ASSERT_TRUE(ReadFloats(*moved.Find("a"), values).ok());
  EXPECT_THAT(values, ElementsAre(1, 2));
}

class ShardedFolder : public ::testing::Test {
 protected:
  void SetUp() override {
    WriteFile(folder_.File("s1.safetensors"),
              SafetensorsBytes(StoredTensors{{"a", F32Tensor({1}, {1})}}));
    WriteFile(folder_.File("s2.safetensors"),
              SafetensorsBytes(StoredTensors{{"b", F32Tensor({1}, {2})}}));
  }
  absl::StatusOr<Safetensors> Open(const std::string& index) {
    WriteFile(folder_.File("model.safetensors.index.json"), index);
    return Safetensors::OpenFolder(folder_.path().string());
  }
  TempFolder folder_;
};

TEST_F(ShardedFolder, IsReadThroughItsIndex) {
  const absl::StatusOr<Safetensors> file = Open(
      R"({"metadata":{"total_size":8},"weight_map":{"b":"s2.safetensors","a":"s1.safetensors"}})");
  ASSERT_TRUE(file.ok()) << file.status();
  std::vector<float> value(1);
  ASSERT_TRUE(ReadFloats(*file->Find("b"), value).ok());
  EXPECT_EQ(value[0], 2.0f);
  EXPECT_EQ(file->files()[file->Find("b")->file], folder_.File("s2.safetensors"));
  // The digests of both files, in name order.
  uint64_t digests[2];
  for (int i = 0; i < 2; ++i) {
    std::ifstream in(folder_.File(i == 0 ? "s1.safetensors" : "s2.safetensors"), std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(in), {}};
    digests[i] = XxHash64(std::as_bytes(std::span<const char>(bytes)));
  }
  char expected[17];
  std::snprintf(
      expected, sizeof(expected), "%016llx",
      static_cast<unsigned long long>(XxHash64(std::as_bytes(std::span<const uint64_t>(digests)))));
  EXPECT_EQ(file->Hash(), expected);
}

TEST_F(ShardedFolder, RefusesAnIndexThatDoesNotFit) {
  const struct {
    const char* index;
    const char* message;
  } cases[] = {
      {"{", "weight_map"},
      {"[]", "weight_map"},
      {R"({"weight_map":[]})", "weight_map"},
      {R"({"weight_map":{"a":1}})", "weight_map of a"},
      {R"({"weight_map":{"a":"../s1.safetensors"}})", "the name of a file in the folder"},
      {R"({"weight_map":{"a":"/etc/passwd"}})", "the name of a file in the folder"},
      {R"({"weight_map":{"a":""}})", "the name of a file in the folder"},
      {R"({"weight_map":{"a":"s3.safetensors"}})", "s3.safetensors"},
      {R"({"weight_map":{"a":"s2.safetensors"}})", "says that a is in s2.safetensors"},
      {R"({"weight_map":{"c":"s1.safetensors"}})", "says that c is in s1.safetensors"},
  };
  for (const auto& bad : cases) {
    const absl::StatusOr<Safetensors> file = Open(bad.index);
    ASSERT_FALSE(file.ok()) << bad.index;
    EXPECT_THAT(Message(file.status()),
                AllOf(HasSubstr("model.safetensors.index.json"), HasSubstr(bad.message)));
  }
}

TEST_F(ShardedFolder, RefusesATensorInTwoShards) {
  WriteFile(
      folder_.File("s2.safetensors"),
      SafetensorsBytes(StoredTensors{{"a", F32Tensor({1}, {1})}, {"b", F32Tensor({1}, {2})}}));
  const absl::StatusOr<Safetensors> file =
      Open(R"({"weight_map":{"b":"s2.safetensors","a":"s1.safetensors"}})");
  ASSERT_FALSE(file.ok());
  EXPECT_THAT(Message(file.status()), HasSubstr("tensor a is also in"));
}

TEST(Safetensors, FolderWithoutWeightsSaysWhatIsThere) {
  const TempFolder folder;
  EXPECT_THAT(Message(Safetensors::OpenFolder(folder.path().string()).status()),
              HasSubstr("neither model.safetensors nor"));
  WriteFile(folder.File("pytorch_model.bin"), "x");
  EXPECT_THAT(Message(Safetensors::OpenFolder(folder.path().string()).status()),
              HasSubstr("only pytorch_model.bin"));
}

// From the Python package xxhash 3: xxh64 of the first n of the bytes (i * 131 + 7) % 251.
TEST(XxHash64, MatchesTheReference) {
  const struct {
    size_t size;
    uint64_t seed0, seed12345;
  } cases[] = {
      {0, 0xef46db3751d8e999, 0x95584af7701f808d},   {1, 0xa96c7f0ce858bbb7, 0x496fc29a1e753bd7},
      {3, 0x340815731509cc08, 0x12e041a6322ff85e},   {4, 0x5fa711205d86e9da, 0xfbe5e246eb4de0a8},
      {7, 0xc56370b3a8e8a7bb, 0xff021a0fded5f232},   {8, 0xdf40710b591268c9, 0x24f21bc96977ed43},
      {12, 0x0593898b9f36dc8e, 0x3b62ddd465ea0ca6},  {31, 0xb1f705faa66f113e, 0x10216a5d45f17deb},
      {32, 0xe4d66d9393e3a596, 0xa947514ef2831569},  {33, 0x2f77e96907a9337b, 0x0875ed549890a0d5},
      {63, 0xdaa92a8f02a3fa78, 0x63f6c43397ae1010},  {64, 0x7d4e619b9ab28955, 0x294a42b73d4b86e2},
      {100, 0x03e12a53974cdcd9, 0xaeaa53740cfa11ee}, {1000, 0xe04669f618d13c00, 0x65d64bbf19c939af},
  };
  std::vector<unsigned char> bytes(1000);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = (i * 131 + 7) % 251;
  for (const auto& expected : cases) {
    const auto part = std::as_bytes(std::span(bytes).first(expected.size));
    EXPECT_EQ(XxHash64(part), expected.seed0) << expected.size;
    EXPECT_EQ(XxHash64(part, 12345), expected.seed12345) << expected.size;
  }
}

TEST(Safetensors, HashOfOneFileIsThatOfItsBytes) {
  const std::string bytes = SafetensorsBytes(StoredTensors{{"a", F32Tensor({2}, {1, 2})}});
  const absl::StatusOr<Safetensors> file = Parse(bytes);
  ASSERT_TRUE(file.ok());
  char expected[17];
  std::snprintf(
      expected, sizeof(expected), "%016llx",
      static_cast<unsigned long long>(XxHash64(std::as_bytes(std::span<const char>(bytes)))));
  EXPECT_EQ(file->Hash(), expected);
}

TEST(FindNonFinite, CountsAndNames) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  // Past the first block of the scan, and with the largest finite number, which is not reported.
  std::vector<float> large(10'000, std::numeric_limits<float>::max());
  large[5000] = -inf;
  large[9999] = nan;
  // bf16 1.0, NaN, -infinity; f16 1.0, infinity, NaN, the largest finite number.
  const std::string bf16("\x80\x3f\xc1\x7f\x80\xff", 6);
  const std::string f16("\x00\x3c\x00\x7c\x01\xfc\xff\x7b", 8);
  const std::string bytes = SafetensorsBytes(StoredTensors{
      {"bf16", {"BF16", {3}, bf16}},
      {"f16", {"F16", {2, 2}, f16}},
      {"good", F32Tensor({3}, {0.0f, -0.0f, 1e-45f})},
      {"ids", {"I32", {1}, std::string("\xff\xff\xff\x7f", 4)}},
      {"large", F32Tensor({100, 100}, large)},
  });
  const absl::StatusOr<Safetensors> file = Parse(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  const std::vector<NonFiniteTensor> found = FindNonFinite(*file);
  ASSERT_THAT(found, SizeIs(3));
  EXPECT_EQ(found[0].ToString(),
            "bf16 [3] in x.safetensors: 1 NaN and 1 infinite values, the first at index 1");
  EXPECT_EQ(found[1].ToString(),
            "f16 [2, 2] in x.safetensors: 1 NaN and 1 infinite values, the first at index 1");
  EXPECT_EQ(
      found[2].ToString(),
      "large [100, 100] in x.safetensors: 1 NaN and 1 infinite values, the first at index 5000");
}

TEST(ReadFloats, RefusesOtherDtypes) {
  const std::string bytes =
      SafetensorsBytes(StoredTensors{{"f8", {"F8_E4M3", {2}, std::string(2, '\0')}}});
  const absl::StatusOr<Safetensors> file = Parse(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_FALSE(file->Find("f8")->dtype.has_value());
  std::vector<float> values(2);
  const absl::Status status = ReadFloats(*file->Find("f8"), values);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(Message(status), HasSubstr("F8_E4M3"));
}

}  // namespace
}  // namespace canopy
