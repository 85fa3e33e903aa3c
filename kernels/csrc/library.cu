// What the library says of itself; mka_source_hash is made by build.py.
#include "mka/common.cuh"

const char* mka_error_string(int code) {
  if (code == MKA_REFUSED) return "there is no kernel for these sizes or types";
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
