#include <algorithm>

#include "binding.h"
#include "normals_cuda.h"
#include "normals_host.h"

namespace braid {
namespace {

constexpr int64_t GRAIN = 1 << 13;  // channels worth waking a thread for

void normals_into(Tensor normals, Tensor key, Tensor ordinals, Tensor positions, int64_t first_channel, int64_t draw) {
  NormalArguments a = {};
  a.normals = pointer<float>(normals);
  set_key(a, key);
  a.ordinals = pointer<int64_t>(ordinals);
  a.positions = pointer<int64_t>(positions);
  a.rows = normals.size(0);
  a.length = normals.size(1);
  a.channels = normals.size(2);
  a.positions_row_stride = positions.dim() == 2 ? a.length : 0;
  a.first_channel = first_channel;
  a.draw = (int32_t)draw;
#if defined(BRAID_CUDA)
  if (normals.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(normals.get_device_index());
    return check_launch(braid_launch_normals(&a, current_stream(normals)));
  }
#endif
  STD_TORCH_CHECK(normals.is_cpu(), "braid: this library was built for the CPU alone");
  const HostNormals& host = normals_here();
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(16, a.channels));
  torch::stable::parallel_for(0, a.rows * a.length, grain,
                              [&](int64_t first, int64_t last) { host.draw(a, first, last); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(braid, m) {
  m.def(
      "normals_into(Tensor(a!) normals, Tensor key, Tensor ordinals, Tensor positions, int first_channel, int draw) "
      "-> ()");
}
STABLE_TORCH_LIBRARY_IMPL(braid, CPU, m) { m.impl("normals_into", TORCH_BOX(&normals_into)); }
#if defined(BRAID_CUDA)
STABLE_TORCH_LIBRARY_IMPL(braid, CUDA, m) { m.impl("normals_into", TORCH_BOX(&normals_into)); }
#endif

}  // namespace
}  // namespace braid
