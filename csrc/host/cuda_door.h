#pragma once

#include <pybind11/pybind11.h>

namespace ea::host {

// Doors into what the CUDA kernels of attention to a cache take from common/.
void add_cuda_doors(pybind11::module_& m);

}  // namespace ea::host
