#include "tests/support/checkpoint_files.h"

#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>

#include "core/files.h"
#include "core/safetensors.h"
#include "core/status.h"
#include "nlohmann/json.hpp"

namespace canopy::testing {

namespace fs = std::filesystem;

TempFolder::TempFolder() {
  // mkdtemp replaces the last six letters.
  std::string name = (fs::temp_directory_path() / "canopy_test_").string() + std::string(6, 'X');
  CHECK(mkdtemp(name.data()) != nullptr);
  path_ = name;
}

TempFolder::~TempFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

void WriteFile(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  CHECK(file.good());
}

std::string SafetensorsBytes(uint64_t header_length, const std::string& header,
                             const std::string& data) {
  std::string bytes(sizeof(header_length), '\0');
  std::memcpy(bytes.data(), &header_length, sizeof(header_length));
  return bytes + header + data;
}

std::string SafetensorsBytes(const std::string& header, const std::string& data) {
  return SafetensorsBytes(header.size(), header, data);
}

StoredTensor F32Tensor(std::vector<int64_t> shape, const std::vector<float>& values) {
  StoredTensor tensor{"F32", std::move(shape), std::string(values.size() * sizeof(float), '\0')};
  std::memcpy(tensor.bytes.data(), values.data(), tensor.bytes.size());
  return tensor;
}

StoredTensors ReadTensors(const std::string& path) {
  const absl::StatusOr<Safetensors> file =
      fs::is_directory(path) ? Safetensors::OpenFolder(path) : Safetensors::Open(path);
  CHECK(file.ok());
  StoredTensors tensors;
  for (const auto& [name, entry] : file->entries()) {
    tensors[name] = {entry.dtype_name, entry.shape,
                     std::string(reinterpret_cast<const char*>(entry.data), entry.bytes)};
  }
  return tensors;
}

std::string SafetensorsBytes(const StoredTensors& tensors) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const size_t begin = data.size();
    data += tensor.bytes;
    header[name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {begin, data.size()}}};
  }
  return SafetensorsBytes(header.dump(), data);
}

std::string GoldenFolder(const std::string& name) {
  return std::string(CANOPY_SOURCE_DIR "/tests/models/golden/") + name;
}

void CopyGolden(const std::string& name, const std::string& config_patch, const TempFolder& to) {
  for (const fs::directory_entry& file : fs::directory_iterator(GoldenFolder(name))) {
    fs::copy_file(file.path(), to.path() / file.path().filename(),
                  fs::copy_options::overwrite_existing);
  }
  absl::StatusOr<std::string> text = ReadFile(to.File("config.json"));
  CHECK(text.ok());
  // The bare token of transformers 4, which the library does not read.
  const std::string bare = " Infinity\n";
  if (const size_t at = text->find(bare); at != std::string::npos) {
    text->replace(at, bare.size(), R"({"__float__": "Infinity"})");
  }
  nlohmann::json config = nlohmann::json::parse(*text);
  config.merge_patch(nlohmann::json::parse(config_patch));
  WriteFile(to.File("config.json"), config.dump());
}

}  // namespace canopy::testing
