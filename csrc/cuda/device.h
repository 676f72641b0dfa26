// Devices: whether there is one, and which is current.
#pragma once
#include <stdexcept>
#include <string>

#include "runtime.h"

namespace danlu {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// launches: how many of this step were enqueued before
inline void check_launch(cudaError_t error, const std::string& name, int launches) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // this one is told, it shall not show up again elsewhere
  throw std::runtime_error(name + ": the CUDA kernel could not be launched: " + cudaGetErrorString(error) +
                           (launches ? "; earlier launches of this step have been made" : ""));
}

// Makes a device current, and the one that was so again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Why no device can be used; empty if one can.
inline std::string unavailable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return "";
  cudaGetLastError();
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  // both a missing and an old driver are error 35
  if (driver == 0) return "no NVIDIA driver is installed";
  if (error == cudaErrorInsufficientDriver)
    return "the NVIDIA driver is too old: it supports CUDA " + version_text(driver) +
           ", danlu was built with " + version_text(runtime);
  if (error == cudaSuccess || error == cudaErrorNoDevice) return "no CUDA device is visible";
  return std::string("CUDA cannot be used: ") + cudaGetErrorString(error);
}

inline int capability(int device) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  return 10 * major + minor;
}

}  // namespace danlu
