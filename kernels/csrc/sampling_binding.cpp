#include <algorithm>

#include "binding.h"
#include "sampling_cuda.h"
#include "sampling_host.h"

namespace braid {
namespace {

constexpr int64_t GRAIN = 1 << 13;  // logits worth waking a thread for

void sample_into(Tensor tokens, Tensor logits, OptionalTensor other, OptionalTensor rows, int64_t key,
                 Tensor ordinals, Tensor positions, double guidance, double temperature, double top_p, int64_t left_out, int64_t draw,
                 bool greedy, OptionalTensor noisy, double survival, double noise, double mask, double stays,
                 double arrives_at_mask, double arrives) {
  SamplingArguments a = {};
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) == 1 || logits.stride(1) == 1), "braid: logits have no rows");
  STD_TORCH_CHECK(!other || (other->scalar_type() == logits.scalar_type() && other->stride(0) == logits.stride(0) &&
                             (logits.size(1) == 1 || other->stride(1) == 1)),
                  "braid: the other logits differ in layout");
  a.logits = logits.data_ptr();
  a.other = other ? other->data_ptr() : nullptr;
  a.bfloat16 = is_bfloat16(logits);
  a.size = logits.size(1);
  a.logits_stride = logits.stride(0);
  a.rows = pointer<int64_t>(rows);
  a.key = key;
  a.ordinals = pointer<int64_t>(ordinals);
  a.positions = pointer<int64_t>(positions);
  a.noisy = pointer<int64_t>(noisy);
  a.tokens = pointer<int64_t>(tokens);
  a.count = tokens.size(0);
  a.left_out = left_out;
  a.temperature = temperature;
  a.top_p = top_p;
  a.survival = survival;
  a.noise = noise;
  a.mask = mask;
  a.stays = stays;
  a.arrives_at_mask = arrives_at_mask;
  a.arrives = arrives;
  a.guidance = (float)guidance;
  a.rest = (float)(1 - guidance);
  a.draw = (int32_t)draw;
  a.greedy = greedy;
#if defined(BRAID_CUDA)
  if (logits.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
    return check_launch(braid_launch_sampling(&a, current_stream(logits)));
  }
#endif
  STD_TORCH_CHECK(logits.is_cpu(), "braid: this library was built for the CPU alone");
  const HostSampling& host = sampling_here();
  torch::stable::parallel_for(0, a.count, std::max<int64_t>(1, GRAIN / a.size),
                              [&](int64_t first, int64_t last) { host.draw(a, first, last); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(braid, m) {
  m.def(
      "sample_into(Tensor(a!) tokens, Tensor logits, Tensor? other, Tensor? rows, int key, Tensor ordinals, "
      "Tensor positions, float guidance, float temperature, float top_p, int left_out, int draw, bool greedy, "
      "Tensor? noisy, float survival, float noise, float mask, float stays, float arrives_at_mask, float arrives) "
      "-> ()");
}
STABLE_TORCH_LIBRARY_IMPL(braid, CPU, m) { m.impl("sample_into", TORCH_BOX(&sample_into)); }
#if defined(BRAID_CUDA)
STABLE_TORCH_LIBRARY_IMPL(braid, CUDA, m) { m.impl("sample_into", TORCH_BOX(&sample_into)); }
#endif

}  // namespace
}  // namespace braid
