// For tests of the CUDA backend: skipped where there is no device.

#ifndef CANOPY_TESTS_SUPPORT_ON_DEVICE_H_
#define CANOPY_TESTS_SUPPORT_ON_DEVICE_H_

#include <memory>
#include <string>

#include "core/cpu_backend.h"
#include "core/cuda_backend.h"
#include "gtest/gtest.h"

namespace canopy::testing {

class OnDevice : public ::testing::Test {
 protected:
  void SetUp() override {
    auto cuda = CudaBackend::Create();
    if (!cuda.ok()) {
      GTEST_SKIP() << "skipped: " << std::string(cuda.status().message());
    }
    cuda_ = *std::move(cuda);
    cpu_ = *CpuBackend::Create(1);
  }

  std::unique_ptr<CpuBackend> cpu_;
  std::unique_ptr<CudaBackend> cuda_;
};

}  // namespace canopy::testing

#endif  // CANOPY_TESTS_SUPPORT_ON_DEVICE_H_
