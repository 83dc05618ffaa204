// Checkpoint folders that tests make, copy and damage.

#ifndef CANOPY_TESTS_SUPPORT_CHECKPOINT_FILES_H_
#define CANOPY_TESTS_SUPPORT_CHECKPOINT_FILES_H_

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace canopy::testing {

// A new empty folder, removed with everything in it at the end. Aborts if it cannot be made.
class TempFolder {
 public:
  TempFolder();
  ~TempFolder();
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::string File(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

void WriteFile(const std::string& path, const std::string& bytes);

// A safetensors file of that header text and data: the length is the header's unless given.
std::string SafetensorsBytes(const std::string& header, const std::string& data);
std::string SafetensorsBytes(uint64_t header_length, const std::string& header,
                             const std::string& data);

struct StoredTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};
using StoredTensors = std::map<std::string, StoredTensor>;

// A StoredTensor of f32.
StoredTensor F32Tensor(std::vector<int64_t> shape, const std::vector<float>& values);

// Every tensor of a checkpoint folder or of one file; aborts if it cannot be read.
StoredTensors ReadTensors(const std::string& path);
std::string SafetensorsBytes(const StoredTensors& tensors);

// A copy of tests/models/golden/NAME with the keys of `config_patch` (JSON merge patch, RFC 7396)
// applied to its config.json.
void CopyGolden(const std::string& name, const std::string& config_patch, const TempFolder& to);
// Path of tests/models/golden/NAME.
std::string GoldenFolder(const std::string& name);

}  // namespace canopy::testing

#endif  // CANOPY_TESTS_SUPPORT_CHECKPOINT_FILES_H_
