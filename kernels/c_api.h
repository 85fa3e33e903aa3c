// The C interface of libmka.so. Every operation is
//     int mka_<op>_<phase>(const <Op><Phase>Args* args, void* stream)
// which checks its arguments on the host, enqueues on `stream` and returns 0, a cudaError_t, or MKA_REFUSED for sizes
// that it has no kernel for. It never allocates, never waits and never reads device memory on the host, so it can be
// captured into a CUDA graph. Tensors are contiguous, row-major, in the order of the shapes given here.
//
// A struct has int64_t and pointers only (doubles for scalars), so that it has no padding and one layout everywhere.
#ifndef MKA_C_API_H
#define MKA_C_API_H

#include <stdint.h>

#define MKA_API __attribute__((visibility("default")))
#define MKA_REFUSED (-1)

// dtype codes
#define MKA_FP32 0
#define MKA_BF16 1
#define MKA_FP16 2

#ifdef __cplusplus
extern "C" {
#endif

// The sha256 of the sources that the library was made from, in hex.
MKA_API const char* mka_source_hash(void);
// What a cudaError_t means.
MKA_API const char* mka_error_string(int code);

#ifdef __cplusplus
}
#endif

#endif
