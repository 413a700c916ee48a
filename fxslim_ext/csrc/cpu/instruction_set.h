// Run-time choice of the instruction set. A kernel writes its loop once, as an always-inlined
// lambda; for_best_cpu compiles it for each level and runs the best one that this CPU has.
#pragma once

#include <cstdlib>
#include <cstring>

#define FXSLIM_INLINE __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
#define FXSLIM_X86 1
#include <cpuid.h>
#define FXSLIM_AVX2 __attribute__((target("avx2,fma,f16c")))
#define FXSLIM_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")))
#define FXSLIM_AVX512VNNI \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")))
#else
#define FXSLIM_X86 0
#endif

namespace fxslim {

enum class InstructionSet { portable = 0, avx2 = 1, avx512 = 2, avx512vnni = 3 };

inline InstructionSet detect_instruction_set() {
#if FXSLIM_X86
  __builtin_cpu_init();
  // Older compilers know no "f16c" here.
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_f16c)
    return __builtin_cpu_supports("avx512vnni") ? InstructionSet::avx512vnni : InstructionSet::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c)
    return InstructionSet::avx2;
#endif
  return InstructionSet::portable;
}

// FXSLIM_CPU=portable|avx2|avx512|avx512vnni, read once, caps the choice; it can't exceed what the CPU has.
inline InstructionSet choose_instruction_set() {
  const InstructionSet best = detect_instruction_set();
  const char* cap = std::getenv("FXSLIM_CPU");
  if (cap == nullptr) return best;
  InstructionSet most = best;
  if (std::strcmp(cap, "portable") == 0) most = InstructionSet::portable;
  if (std::strcmp(cap, "avx2") == 0) most = InstructionSet::avx2;
  if (std::strcmp(cap, "avx512") == 0) most = InstructionSet::avx512;
  return most < best ? most : best;
}

inline InstructionSet instruction_set() {
  static const InstructionSet chosen = choose_instruction_set();
  return chosen;
}

template <class Body>
void run_portable(const Body& body) {
  body();
}
#if FXSLIM_X86
template <class Body>
FXSLIM_AVX2 void run_avx2(const Body& body) {
  body();
}
template <class Body>
FXSLIM_AVX512 void run_avx512(const Body& body) {
  body();
}
#endif

template <class Body>
inline void for_best_cpu(const Body& body) {
#if FXSLIM_X86
  switch (instruction_set()) {
    case InstructionSet::avx512vnni:
    case InstructionSet::avx512: return run_avx512(body);
    case InstructionSet::avx2: return run_avx2(body);
    case InstructionSet::portable: break;
  }
#endif
  run_portable(body);
}

}  // namespace fxslim
