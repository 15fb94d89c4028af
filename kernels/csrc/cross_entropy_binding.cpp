#include <algorithm>

#include "binding.h"
#include "cross_entropy_cuda.h"
#include "cross_entropy_host.h"

namespace braid {
namespace {

constexpr int64_t GRAIN = 1 << 14;  // logits worth waking a thread for

void cross_entropy_into(Tensor logits, Tensor targets, Tensor weights, double z_loss, int64_t left_out, bool statistics,
                        bool gradient, Tensor largest, Tensor total, Tensor at_target) {
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) == 1 || logits.stride(1) == 1), "braid: logits have no rows");
  CrossEntropyArguments a = {};
  a.logits = logits.data_ptr();
  a.targets = pointer<int64_t>(targets);
  a.weights = pointer<float>(weights);
  a.largest = pointer<float>(largest);
  a.total = pointer<double>(total);
  a.at_target = pointer<float>(at_target);
  a.rows = logits.size(0);
  a.size = logits.size(1);
  a.stride = logits.stride(0);
  a.left_out = left_out;
  a.z_loss = (float)z_loss;
  a.statistics = statistics;
  a.gradient = gradient;
  a.bfloat16 = is_bfloat16(logits);
#if defined(BRAID_CUDA)
  if (logits.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
    return check_launch(braid_launch_cross_entropy(&a, current_stream(logits)));
  }
#endif
  STD_TORCH_CHECK(logits.is_cpu(), "braid: this library was built for the CPU alone");
  const HostCrossEntropy& host = cross_entropy_here();
  torch::stable::parallel_for(0, a.rows, std::max<int64_t>(1, GRAIN / a.size),
                              [&](int64_t first, int64_t last) { host.rows(a, first, last); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(braid, m) {
  m.def(
      "cross_entropy_into(Tensor(a!) logits, Tensor targets, Tensor weights, float z_loss, int left_out, "
      "bool statistics, bool gradient, Tensor(b!) largest, Tensor(c!) total, Tensor(d!) at_target) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(braid, CPU, m) { m.impl("cross_entropy_into", TORCH_BOX(&cross_entropy_into)); }
#if defined(BRAID_CUDA)
STABLE_TORCH_LIBRARY_IMPL(braid, CUDA, m) { m.impl("cross_entropy_into", TORCH_BOX(&cross_entropy_into)); }
#endif

}  // namespace
}  // namespace braid
