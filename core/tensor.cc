#include "core/tensor.h"

#include "core/backend.h"

namespace canopy {

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this == &other) return *this;
  if (data_ != nullptr) backend_->Free(data_, bytes_);
  backend_ = std::exchange(other.backend_, nullptr);
  data_ = std::exchange(other.data_, nullptr);
  bytes_ = std::exchange(other.bytes_, 0);
  return *this;
}

Buffer::~Buffer() {
  if (data_ != nullptr) backend_->Free(data_, bytes_);
}

absl::StatusOr<Tensor> Tensor::Allocate(Backend& backend, int rows, int columns) {
  const int64_t stride = PaddedColumns(columns);
  Tensor tensor;
  ASSIGN_OR_RETURN(tensor.buffer_,
                   backend.Allocate(static_cast<size_t>(rows) * stride * sizeof(float)));
  tensor.view_ = {tensor.buffer_.as<float>(), rows, columns, stride};
  return tensor;
}

}  // namespace canopy
