// All launchers, with the emulator in place of a device: a library of its own, for tests.
#define BRAID_EMULATOR
#include "cross_entropy_cuda.cu"
#include "noising_cuda.cu"
#include "normals_cuda.cu"
#include "sampling_cuda.cu"
