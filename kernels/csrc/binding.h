// What the bindings of all operations share. They use LibTorch's stable ABI: one library for torch 2.11 and later and for
// every Python, with and without CUDA. Each operation fills tensors that Python has made, and adds its own fragment of
// the torch library `braid`.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace braid {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline bool is_bfloat16(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }

// The data of a contiguous tensor; null where there is none.
template <class T>
T* pointer(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "braid: a tensor is not contiguous");
  return (T*)tensor.data_ptr();
}
template <class T>
T* pointer(const OptionalTensor& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

// A key on the host goes by value: nothing is copied to the device, and nothing waits.
template <class Arguments>
void set_key(Arguments& arguments, const Tensor& key) {
  const int64_t* in_memory = pointer<int64_t>(key);
  if (key.is_cpu()) {
    arguments.key_value = *in_memory;
  } else {
    arguments.key = in_memory;
  }
}

}  // namespace braid

#if defined(BRAID_CUDA)
#include <torch/csrc/stable/accelerator.h>

// libtorch_cuda has it; null where torch is built without CUDA, whose libraries then lack it.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) __attribute__((weak));

namespace braid {

inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "braid: this torch has no CUDA");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

inline void check_launch(int error) { STD_TORCH_CHECK(error == 0, "braid: a kernel was not launched, CUDA error ", error); }

}  // namespace braid
#endif
