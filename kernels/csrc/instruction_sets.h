// Host code is compiled once for each instruction set, with BRAID_ISA set to a name below, and chosen at run time. It
// has the same results on all of them: nothing in it is contracted or reassociated.
//
// An operation `x` puts its host functions (or pointers to instances of templates) into one struct `HostX`, defines
// `const HostX x = {...}` in `namespace braid::BRAID_ISA`, and declares BRAID_HOST(HostX, x) in its header; then
// `x_here()` is the best one for this processor.
#pragma once

namespace braid {

enum class InstructionSet { generic, avx2, avx512 };

// The best this processor has, or what BRAID_KERNELS_ISA (generic, avx2, avx512) limits it to.
InstructionSet instruction_set();

}  // namespace braid

#if defined(__x86_64__)
#define BRAID_HOST(type, name)                   \
  namespace generic { extern const type name; }  \
  namespace avx2 { extern const type name; }     \
  namespace avx512 { extern const type name; }   \
  inline const type& name##_here() {             \
    switch (instruction_set()) {                 \
      case InstructionSet::avx512: return avx512::name; \
      case InstructionSet::avx2: return avx2::name;     \
      default: return generic::name;             \
    }                                            \
  }
#else
#define BRAID_HOST(type, name)                  \
  namespace generic { extern const type name; } \
  inline const type& name##_here() { return generic::name; }
#endif
