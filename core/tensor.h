// Buffers of a backend, matrices in them, and views that never own.

#ifndef CANOPY_CORE_TENSOR_H_
#define CANOPY_CORE_TENSOR_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "core/status.h"

namespace canopy {

class Backend;

// Rows of float matrices start at multiples of this many floats (64 bytes, a cache line and the
// widest CPU vector), so that kernels may read and write whole vectors past a row's last column.
inline constexpr int kRowAlign = 16;

constexpr int PaddedColumns(int columns) {
  return (columns + kRowAlign - 1) / kRowAlign * kRowAlign;
}

// A row-major matrix of f32 that somebody else owns. Row r begins at data + r * stride; stride is a
// multiple of kRowAlign and at least PaddedColumns(columns). What lies between the last column and
// the stride is finite and meaningless.
template <typename T>
struct MatrixView {
  T* data = nullptr;
  int rows = 0;
  int columns = 0;
  int64_t stride = 0;  // in elements

  T* row(int r) const { return data + r * stride; }
  MatrixView Rows(int first, int count) const { return {row(first), count, columns, stride}; }
  // Columns [first, first + count): first must be a multiple of kRowAlign for kernels that need
  // aligned rows; those that do say so.
  MatrixView Columns(int first, int count) const { return {data + first, rows, count, stride}; }
  // NOLINTNEXTLINE(google-explicit-constructor): a read-only view of the same thing.
  operator MatrixView<const T>() const { return {data, rows, columns, stride}; }
};
using Matrix = MatrixView<float>;
using ConstMatrix = MatrixView<const float>;

// Memory of a backend: 64-byte aligned, zeroed when allocated, given back when destroyed.
// Movable only. The backend must outlive it.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Backend* backend, void* data, size_t bytes)
      : backend_(backend), data_(data), bytes_(bytes) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  Backend* backend_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// A float matrix that owns its buffer. rows * PaddedColumns(columns) * 4 bytes.
class Tensor {
 public:
  Tensor() = default;
  // ResourceExhausted if the backend has no room.
  static absl::StatusOr<Tensor> Allocate(Backend& backend, int rows, int columns);

  Matrix view() const { return view_; }
  // The first `rows` rows.
  Matrix Rows(int rows) const { return view_.Rows(0, rows); }
  size_t bytes() const { return buffer_.bytes(); }

 private:
  Buffer buffer_;
  Matrix view_;
};

}  // namespace canopy

#endif  // CANOPY_CORE_TENSOR_H_
