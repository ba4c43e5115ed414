// The Python module: pointers and sizes in, a status out. Nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"
#include "vidtok/peak.h"
#include "vidtok/plan_apply.h"

namespace py = pybind11;
using namespace vidtok;

namespace {

template <class T>
T* ptr(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

PlanApplyArgs plan_apply_args(uintptr_t x, uintptr_t y, int dtype, int64_t n, int64_t m, int64_t c, int64_t x_stride,
                              uintptr_t anchor, uintptr_t member, uintptr_t offset, uintptr_t weight, int64_t nnz,
                              int threads) {
  return {ptr<const void>(x),       ptr<void>(y),
          static_cast<DType>(dtype), n,
          m,                         c,
          x_stride,                  ptr<const int32_t>(anchor),
          ptr<const int32_t>(member), ptr<const int32_t>(offset),
          ptr<const float>(weight),  nnz,
          threads};
}

// Kernels run without the GIL; the arguments are plain data by then.
template <class Args>
int run(Status (*kernel)(const Args&), const Args& args) {
  py::gil_scoped_release release;
  return static_cast<int>(kernel(args));
}

py::dict build_info() {
  py::dict out;
  py::list built, usable;
  for (int i = 0; i < kIsaCount; ++i) {
#ifndef VIDTOK_X86
    if (i > 0) break;
#endif
    built.append(kIsaNames[i]);
    if (supported(static_cast<Isa>(i))) usable.append(kIsaNames[i]);
  }
  out["isa"] = kIsaNames[static_cast<int>(current_isa())];
  out["isa_built"] = built;
  out["isa_usable"] = usable;
  out["compiler"] = __VERSION__;
#ifdef VIDTOK_USE_STD_THREAD
  out["threads"] = "std::thread";
#else
  out["threads"] = "OpenMP";
#endif
  out["cuda"] = false;
  return out;
}

bool force_isa(const std::string& name) {
  for (int i = 0; i < kIsaCount; ++i)
    if (name == kIsaNames[i]) return set_isa(static_cast<Isa>(i));
  return false;
}

py::tuple last_error(int status) {
  const char* kind = static_cast<Status>(status) == Status::index ? "index" : "memory";
  return py::make_tuple(kind, last_message());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of vidtok.";
  m.def("build_info", &build_info);
  m.def("force_isa", &force_isa);
  m.def("last_error", &last_error);
  m.def("plan_apply", [](uintptr_t x, uintptr_t y, int dtype, int64_t n, int64_t rows, int64_t c, int64_t x_stride,
                         uintptr_t anchor, uintptr_t member, uintptr_t offset, uintptr_t weight, int64_t nnz,
                         int threads) {
    return run(plan_apply,
               plan_apply_args(x, y, dtype, n, rows, c, x_stride, anchor, member, offset, weight, nnz, threads));
  });
  m.def("plan_apply_backward", [](uintptr_t x, uintptr_t y, int dtype, int64_t n, int64_t rows, int64_t c,
                                  int64_t x_stride, uintptr_t anchor, uintptr_t member, uintptr_t offset,
                                  uintptr_t weight, int64_t nnz, int threads) {
    return run(plan_apply_backward,
               plan_apply_args(x, y, dtype, n, rows, c, x_stride, anchor, member, offset, weight, nnz, threads));
  });
  m.def("peak_flops", [](int64_t rounds, int threads) {
    double flops = 0;
    float sum = 0;
    run(peak_flops, PeakFlopsArgs{rounds, &flops, &sum, threads});
    return py::make_tuple(flops, sum);
  });
  m.def("stream_copy", [](uintptr_t x, uintptr_t y, int64_t bytes, int threads) {
    return run(stream_copy, StreamCopyArgs{ptr<const void>(x), ptr<void>(y), bytes, threads});
  });
}
