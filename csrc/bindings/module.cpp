#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) { m.doc() = "Kernels of vidtok: pointers and sizes in, status out."; }
