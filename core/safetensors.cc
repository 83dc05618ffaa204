#include "core/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <set>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "core/files.h"
#include "nlohmann/json.hpp"

namespace canopy {
namespace {

static_assert(std::endian::native == std::endian::little,
              "safetensors data are little-endian and are read in place");

// The limit of the reference implementation; a header of that size would name a million tensors.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;

struct StoredType {
  std::string_view name;
  int bits;
  std::optional<DType> dtype;
};

constexpr StoredType kStoredTypes[] = {
    {"F32", 32, DType::kF32},
    {"BF16", 16, DType::kBF16},
    {"F16", 16, DType::kF16},
    {"I32", 32, DType::kI32},
    {"I64", 64, DType::kI64},
    {"U8", 8, DType::kU8},
    {"F64", 64, {}},
    {"I16", 16, {}},
    {"I8", 8, {}},
    {"U16", 16, {}},
    {"U32", 32, {}},
    {"U64", 64, {}},
    {"BOOL", 8, {}},
    {"F8_E4M3", 8, {}},
    {"F8_E5M2", 8, {}},
    {"F8_E8M0", 8, {}},
    {"C64", 64, {}},
    {"F4", 4, {}},
    {"F6_E2M3", 6, {}},
    {"F6_E3M2", 6, {}},
};

const StoredType* FindStoredType(std::string_view name) {
  for (const StoredType& type : kStoredTypes) {
    if (type.name == name) return &type;
  }
  return nullptr;
}

// Names come from the file: shown without control characters and cut to a readable length.
std::string Printable(std::string_view name) {
  constexpr size_t kMax = 120;
  std::string result;
  for (char c : name.substr(0, kMax)) {
    result += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  }
  if (name.size() > kMax) result += "...";
  return result;
}

struct HeaderTensor {
  std::string name;
  std::optional<std::string> dtype;
  std::optional<std::vector<uint64_t>> shape;
  std::optional<std::vector<uint64_t>> offsets;
};

// Reads the header event by event, so that a name that stands there twice is seen and nothing but
// the expected form is ever built.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::vector<HeaderTensor> tensors;
  std::map<std::string, std::string, std::less<>> metadata;
  std::string error;

  bool null() override { return Unexpected("null"); }
  bool boolean(bool) override { return Unexpected("a boolean"); }
  bool number_integer(number_integer_t value) override {
    return Fail(absl::StrCat(Where(), "has the negative number ", value));
  }
  bool number_float(number_float_t, const string_t& text) override {
    return Fail(
        absl::StrCat(Where(), "has ", Printable(text), " where a whole number is expected"));
  }
  bool number_unsigned(number_unsigned_t value) override {
    if (place_ != Place::kNumbers) return Unexpected("a number");
    numbers_->push_back(value);
    return true;
  }
  bool string(string_t& value) override {
    if (place_ == Place::kMetadata) {
      metadata[key_] = std::move(value);
      return true;
    }
    if (place_ == Place::kTensor && key_ == "dtype") {
      tensors.back().dtype = std::move(value);
      return true;
    }
    return Unexpected("a string");
  }
  bool binary(binary_t&) override { return Unexpected("binary data"); }
  bool start_object(std::size_t) override {
    if (place_ == Place::kStart) {
      place_ = Place::kTop;
      return true;
    }
    if (place_ != Place::kTop) return Unexpected("an object");
    keys_.clear();
    if (key_ == "__metadata__") {
      place_ = Place::kMetadata;
    } else {
      place_ = Place::kTensor;
      tensors.emplace_back().name = key_;
    }
    return true;
  }
  bool key(string_t& value) override {
    std::set<std::string>& seen = place_ == Place::kTop ? names_ : keys_;
    if (!seen.insert(value).second) {
      return place_ == Place::kTop
                 ? Fail(absl::StrCat("tensor ", Printable(value), " is there twice"))
                 : Fail(absl::StrCat(Where(), "has the key ", Printable(value), " twice"));
    }
    key_ = std::move(value);
    if (place_ == Place::kTensor && key_ != "dtype" && key_ != "shape" && key_ != "data_offsets") {
      return Fail(absl::StrCat(Where(), "has the unknown key ", Printable(key_),
                               "; expected dtype, shape and data_offsets"));
    }
    return true;
  }
  bool end_object() override {
    place_ = place_ == Place::kTop ? Place::kStart : Place::kTop;
    return true;
  }
  bool start_array(std::size_t) override {
    if (place_ != Place::kTensor || key_ == "dtype") return Unexpected("a list");
    auto& target = key_ == "shape" ? tensors.back().shape : tensors.back().offsets;
    numbers_ = &target.emplace();
    place_ = Place::kNumbers;
    return true;
  }
  bool end_array() override {
    place_ = Place::kTensor;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    return Fail(absl::StrCat("is not JSON at byte ", position));
  }

 private:
  enum class Place { kStart, kTop, kMetadata, kTensor, kNumbers };

  std::string Where() const {
    if (place_ == Place::kTensor || place_ == Place::kNumbers) {
      return absl::StrCat("tensor ", Printable(tensors.back().name), " ");
    }
    if (place_ == Place::kMetadata) return "__metadata__ ";
    return place_ == Place::kTop ? absl::StrCat("entry ", Printable(key_), " ") : "";
  }
  bool Unexpected(std::string_view what) {
    if (place_ == Place::kStart)
      return Fail(absl::StrCat("is ", std::string(what), ", not an object"));
    const std::string expected = place_ == Place::kNumbers    ? "whole numbers"
                                 : place_ == Place::kMetadata ? "strings"
                                 : place_ == Place::kTop      ? "an object"
                                 : key_ == "dtype"            ? "a string for dtype"
                                                              : absl::StrCat("a list for ", key_);
    return Fail(absl::StrCat(Where(), "has ", std::string(what), "; expected ", expected));
  }
  bool Fail(std::string message) {
    if (error.empty()) error = std::move(message);
    return false;
  }

  Place place_ = Place::kStart;
  std::string key_;
  std::set<std::string> names_;
  std::set<std::string> keys_;
  std::vector<uint64_t>* numbers_ = nullptr;
};

// Bits of a tensor of that type and shape, or nothing if the product does not fit.
std::optional<uint64_t> BitsOf(const StoredType& type, std::span<const uint64_t> shape) {
  uint64_t bits = static_cast<uint64_t>(type.bits);
  // A zero anywhere makes the tensor empty, whatever the other sizes are.
  if (std::find(shape.begin(), shape.end(), 0u) != shape.end()) bits = 0;
  for (uint64_t size : shape) {
    if (size > static_cast<uint64_t>(INT64_MAX)) return std::nullopt;
    if (bits != 0 && __builtin_mul_overflow(bits, size, &bits)) return std::nullopt;
  }
  return bits;
}

uint64_t Load64(const std::byte* p) {
  uint64_t value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

uint32_t Load32(const std::byte* p) {
  uint32_t value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

struct Scan {
  int64_t nans = 0;
  int64_t infinities = 0;
  int64_t first = -1;
};

// Counts elements whose exponent bits are all ones, in blocks, so that the common case is one
// vectorised test a block.
template <typename Bits, Bits kExponent, Bits kMantissa>
Scan ScanBits(const std::byte* data, int64_t elements) {
  constexpr int64_t kBlock = 4096;
  Scan scan;
  Bits block[kBlock];
  for (int64_t begin = 0; begin < elements; begin += kBlock) {
    const int64_t count = std::min(kBlock, elements - begin);
    std::memcpy(block, data + begin * sizeof(Bits), count * sizeof(Bits));
    bool any = false;
    for (int64_t i = 0; i < count; ++i) any |= (block[i] & kExponent) == kExponent;
    if (!any) continue;
    for (int64_t i = 0; i < count; ++i) {
      if ((block[i] & kExponent) != kExponent) continue;
      ((block[i] & kMantissa) != 0 ? scan.nans : scan.infinities) += 1;
      if (scan.first < 0) scan.first = begin + i;
    }
  }
  return scan;
}

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87u;
constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Fu;
constexpr uint64_t kPrime3 = 0x165667B19E3779F9u;
constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63u;
constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5u;

uint64_t Round(uint64_t lane, uint64_t input) {
  return std::rotl(lane + input * kPrime2, 31) * kPrime1;
}

}  // namespace

struct Safetensors::Mapping {
  void* data = nullptr;
  size_t bytes = 0;
  ~Mapping() {
    if (data != nullptr) munmap(data, bytes);
  }
};

int64_t SafetensorsEntry::elements() const {
  int64_t count = 1;
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  for (int64_t size : shape) count *= size;
  return count;
}

std::string SafetensorsEntry::ShapeString() const {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

Safetensors::Safetensors() = default;
Safetensors::Safetensors(Safetensors&&) noexcept = default;
Safetensors& Safetensors::operator=(Safetensors&&) noexcept = default;
Safetensors::~Safetensors() = default;

absl::Status Safetensors::AddFile(std::string name, std::span<const std::byte> bytes) {
  const auto invalid = [&name](const std::string& what) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": ", what, "; the file is damaged or not safetensors, fetch it again"));
  };
  if (bytes.size() < 8) {
    return invalid(
        absl::StrCat("has ", bytes.size(), " bytes, too few for the 8 of the header's length"));
  }
  const uint64_t header_bytes = Load64(bytes.data());
  if (header_bytes > bytes.size() - 8) {
    return invalid(absl::StrCat("the header's length is ", header_bytes, ", but only ",
                                bytes.size() - 8, " bytes follow"));
  }
  if (header_bytes > kMaxHeaderBytes) {
    return invalid(absl::StrCat("the header's length is ", header_bytes, ", beyond the limit of ",
                                kMaxHeaderBytes));
  }
  const char* text = reinterpret_cast<const char*>(bytes.data() + 8);
  HeaderReader reader;
  const bool parsed = nlohmann::json::sax_parse(text, text + header_bytes, &reader);
  if (!parsed) return invalid(absl::StrCat("the header ", reader.error));

  const std::span<const std::byte> data = bytes.subspan(8 + header_bytes);
  const int file = static_cast<int>(files_.size());
  struct Extent {
    uint64_t begin, end;
    const std::string* name;
  };
  std::vector<Extent> extents;
  extents.reserve(reader.tensors.size());
  for (HeaderTensor& tensor : reader.tensors) {
    const std::string label = absl::StrCat("tensor ", Printable(tensor.name));
    if (!tensor.dtype || !tensor.shape || !tensor.offsets) {
      return invalid(absl::StrCat(label, " lacks ",
                                  !tensor.dtype   ? "dtype"
                                  : !tensor.shape ? "shape"
                                                  : "data_offsets"));
    }
    const StoredType* type = FindStoredType(*tensor.dtype);
    if (type == nullptr) {
      return invalid(absl::StrCat(label, " has the unknown dtype ", Printable(*tensor.dtype)));
    }
    if (tensor.offsets->size() != 2) {
      return invalid(
          absl::StrCat(label, " has ", tensor.offsets->size(), " data_offsets; expected 2"));
    }
    const uint64_t begin = (*tensor.offsets)[0];
    const uint64_t end = (*tensor.offsets)[1];
    if (begin > end || end > data.size()) {
      return invalid(absl::StrCat(label, " has data_offsets [", begin, ", ", end,
                                  "], but the data have ", data.size(), " bytes"));
    }
    const std::optional<uint64_t> bits = BitsOf(*type, *tensor.shape);
    const std::string shape = absl::StrCat("[", absl::StrJoin(*tensor.shape, ", "), "]");
    if (!bits) {
      return invalid(
          absl::StrCat(label, " has shape ", shape, ", which is larger than any memory"));
    }
    if (*bits % 8 != 0 || *bits / 8 != end - begin) {
      return invalid(absl::StrCat(label, " of ", *tensor.dtype, " ", shape, " needs ",
                                  (*bits + 7) / 8, " bytes, but its data_offsets [", begin, ", ",
                                  end, "] hold ", end - begin));
    }
    SafetensorsEntry entry;
    entry.dtype_name = *tensor.dtype;
    entry.dtype = type->dtype;
    entry.shape.assign(tensor.shape->begin(), tensor.shape->end());
    entry.data = data.data() + begin;
    entry.bytes = end - begin;
    entry.file = file;
    const auto [position, inserted] = entries_.emplace(std::move(tensor.name), std::move(entry));
    if (!inserted) {
      return invalid(absl::StrCat(label, " is also in ", files_[position->second.file]));
    }
    extents.push_back({begin, end, &position->first});
  }
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t covered = 0;
  for (const Extent& extent : extents) {
    if (extent.begin != covered) {
      return invalid(absl::StrCat(
          "tensor ", Printable(*extent.name), " begins at byte ", extent.begin, " of the data, ",
          extent.begin < covered ? "inside the tensor before it, which ends at "
                                 : "but the tensor before it ends at ",
          covered));
    }
    covered = extent.end;
  }
  if (covered != data.size()) {
    return invalid(absl::StrCat("the tensors end at byte ", covered, " of the data, which have ",
                                data.size()));
  }
  files_.push_back(std::move(name));
  contents_.push_back(bytes);
  metadata_.merge(reader.metadata);
  return absl::OkStatus();
}

absl::Status Safetensors::MapFile(const std::string& path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) {
    return absl::NotFoundError(absl::StrCat(path, ": cannot be opened: ", std::strerror(errno)));
  }
  struct stat info;
  if (fstat(descriptor, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(descriptor);
    return absl::InvalidArgumentError(absl::StrCat(path, ": is not a regular file"));
  }
  auto mapping = std::make_unique<Mapping>();
  if (info.st_size > 0) {
    void* data = mmap(nullptr, info.st_size, PROT_READ, MAP_PRIVATE, descriptor, 0);
    if (data == MAP_FAILED) {
      const std::string reason = std::strerror(errno);
      close(descriptor);
      return absl::ResourceExhaustedError(absl::StrCat(path, ": cannot be mapped: ", reason));
    }
    mapping->data = data;
    mapping->bytes = info.st_size;
  }
  close(descriptor);
  const std::span<const std::byte> bytes(static_cast<const std::byte*>(mapping->data),
                                         mapping->bytes);
  mappings_.push_back(std::move(mapping));
  return AddFile(path, bytes);
}

absl::StatusOr<Safetensors> Safetensors::Open(const std::string& path) {
  Safetensors result;
  RETURN_IF_ERROR(result.MapFile(path));
  return result;
}

absl::StatusOr<Safetensors> Safetensors::FromBytes(std::string name,
                                                   std::span<const std::byte> bytes) {
  Safetensors result;
  RETURN_IF_ERROR(result.AddFile(std::move(name), bytes));
  return result;
}

absl::StatusOr<Safetensors> Safetensors::OpenFolder(const std::string& folder) {
  const std::filesystem::path root(folder);
  const std::string single = (root / "model.safetensors").string();
  const std::string index = (root / "model.safetensors.index.json").string();
  std::error_code ignored;
  if (std::filesystem::exists(single, ignored)) return Open(single);
  if (!std::filesystem::exists(index, ignored)) {
    const bool pickled = std::filesystem::exists(root / "pytorch_model.bin", ignored) ||
                         std::filesystem::exists(root / "pytorch_model.bin.index.json", ignored);
    return absl::NotFoundError(absl::StrCat(
        folder, ": has neither model.safetensors nor model.safetensors.index.json",
        pickled
            ? ", only pytorch_model.bin; save it as safetensors with transformers' save_pretrained"
            : "; expected a checkpoint folder in Hugging Face form"));
  }
  ASSIGN_OR_RETURN(const std::string text, ReadFile(index));
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(index, ": expected a JSON object with an object weight_map"));
  }
  std::map<std::string, std::string> shard_of;
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : json["weight_map"].items()) {
    if (!shard.is_string()) {
      return absl::InvalidArgumentError(
          absl::StrCat(index, ": weight_map of ", Printable(tensor), " is not a file name"));
    }
    const std::string name = shard.get<std::string>();
    if (name.empty() || name == "." || name == ".." ||
        name.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat(index, ": weight_map of ", Printable(tensor), " is ", Printable(name),
                       "; expected the name of a file in the folder"));
    }
    shards.insert(name);
    shard_of[tensor] = name;
  }
  Safetensors result;
  for (const std::string& shard : shards) {
    RETURN_IF_ERROR(
        Annotate(result.MapFile((root / shard).string()), absl::StrCat("shard of ", index)));
  }
  for (const auto& [tensor, shard] : shard_of) {
    const SafetensorsEntry* entry = result.Find(tensor);
    if (entry == nullptr || result.files_[entry->file] != (root / shard).string()) {
      return absl::InvalidArgumentError(absl::StrCat(index, ": says that ", Printable(tensor),
                                                     " is in ", Printable(shard),
                                                     ", but it is not there"));
    }
  }
  return result;
}

const SafetensorsEntry* Safetensors::Find(std::string_view name) const {
  const auto it = entries_.find(name);
  return it == entries_.end() ? nullptr : &it->second;
}

std::string Safetensors::Hash() const {
  std::vector<uint64_t> digests;
  for (std::span<const std::byte> bytes : contents_) digests.push_back(XxHash64(bytes));
  const uint64_t digest = digests.size() == 1
                              ? digests[0]
                              : XxHash64(std::as_bytes(std::span<const uint64_t>(digests)));
  return absl::StrFormat("%016x", digest);
}

uint64_t XxHash64(std::span<const std::byte> bytes, uint64_t seed) {
  const std::byte* p = bytes.data();
  const std::byte* end = p + bytes.size();
  uint64_t hash;
  if (bytes.size() >= 32) {
    uint64_t lanes[4] = {seed + kPrime1 + kPrime2, seed + kPrime2, seed, seed - kPrime1};
    for (; end - p >= 32; p += 32) {
      for (int i = 0; i < 4; ++i) lanes[i] = Round(lanes[i], Load64(p + 8 * i));
    }
    hash = std::rotl(lanes[0], 1) + std::rotl(lanes[1], 7) + std::rotl(lanes[2], 12) +
           std::rotl(lanes[3], 18);
    for (uint64_t lane : lanes) hash = (hash ^ Round(0, lane)) * kPrime1 + kPrime4;
  } else {
    hash = seed + kPrime5;
  }
  hash += bytes.size();
  for (; end - p >= 8; p += 8) {
    hash = std::rotl(hash ^ Round(0, Load64(p)), 27) * kPrime1 + kPrime4;
  }
  if (end - p >= 4) {
    hash = std::rotl(hash ^ (Load32(p) * kPrime1), 23) * kPrime2 + kPrime3;
    p += 4;
  }
  for (; p != end; ++p) {
    hash = std::rotl(hash ^ (static_cast<uint64_t>(*p) * kPrime5), 11) * kPrime1;
  }
  hash = (hash ^ (hash >> 33)) * kPrime2;
  hash = (hash ^ (hash >> 29)) * kPrime3;
  return hash ^ (hash >> 32);
}

std::string NonFiniteTensor::ToString() const {
  return absl::StrCat(name, " [", absl::StrJoin(shape, ", "), "] in ", file, ": ", nans,
                      " NaN and ", infinities, " infinite values, the first at index ", first);
}

std::vector<NonFiniteTensor> FindNonFinite(const Safetensors& tensors) {
  std::vector<NonFiniteTensor> found;
  for (const auto& [name, entry] : tensors.entries()) {
    if (!entry.dtype) continue;
    Scan scan;
    if (*entry.dtype == DType::kF32) {
      scan = ScanBits<uint32_t, 0x7f800000u, 0x007fffffu>(entry.data, entry.elements());
    } else if (*entry.dtype == DType::kBF16) {
      scan = ScanBits<uint16_t, 0x7f80u, 0x007fu>(entry.data, entry.elements());
    } else if (*entry.dtype == DType::kF16) {
      scan = ScanBits<uint16_t, 0x7c00u, 0x03ffu>(entry.data, entry.elements());
    }
    if (scan.first < 0) continue;
    found.push_back({.name = name,
                     .file = tensors.files()[entry.file],
                     .shape = entry.shape,
                     .nans = scan.nans,
                     .infinities = scan.infinities,
                     .first = scan.first});
  }
  return found;
}

absl::Status ReadFloats(const SafetensorsEntry& entry, std::span<float> out) {
  CHECK(entry.elements() == static_cast<int64_t>(out.size()));
  if (entry.dtype == DType::kF32) {
    if (!out.empty()) std::memcpy(out.data(), entry.data, out.size_bytes());
  } else if (entry.dtype == DType::kBF16 || entry.dtype == DType::kF16) {
    const bool bf16 = entry.dtype == DType::kBF16;
    for (size_t i = 0; i < out.size(); ++i) {
      uint16_t bits;
      std::memcpy(&bits, entry.data + 2 * i, sizeof(bits));
      out[i] = bf16 ? BF16ToF32(bits) : F16ToF32(bits);
    }
  } else {
    return absl::UnimplementedError(
        absl::StrCat("dtype ", entry.dtype_name, "; expected F32, BF16 or F16"));
  }
  return absl::OkStatus();
}

}  // namespace canopy
