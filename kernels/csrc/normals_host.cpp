#include "normals_host.h"

#include "host_normals.h"

namespace braid {
namespace {

void draw(const NormalArguments& a, int64_t first, int64_t last) {
  const Key key = read_key(a.key, a.key_value);
  for (int64_t i = first; i < last; ++i) {
    const int64_t row = i / a.length, column = i % a.length;
    const uint32_t position = (uint32_t)a.positions[row * a.positions_row_stride + column];
    float* to = a.normals + i * a.channels;
    for_normals(position, a.first_channel, a.channels, (uint32_t)a.draw, a.ordinals[row], key,
                [&](int64_t channel, const float* normals, int64_t number) {
                  __builtin_memcpy(to + channel, normals, number * sizeof(float));
                });
  }
}

}  // namespace

namespace BRAID_ISA {
const HostNormals normals = {draw};
}

}  // namespace braid
