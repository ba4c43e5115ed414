// The Python module: pointers and sizes in, a status out. Nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"
#include "vidtok/adjacent_similarity.h"
#include "vidtok/attention_topk.h"
#include "vidtok/bipartite.h"
#include "vidtok/cluster_dpc_knn.h"
#include "vidtok/contour_select.h"
#include "vidtok/peak.h"
#include "vidtok/plan_apply.h"
#include "vidtok/pool_packed.h"
#include "vidtok/position_remap.h"
#include "vidtok/proportional_attention.h"
#include "vidtok/topk_select.h"

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
  return {ptr<const void>(x),
          ptr<void>(y),
          static_cast<DType>(dtype),
          n,
          m,
          c,
          x_stride,
          ptr<const int32_t>(anchor),
          ptr<const int32_t>(member),
          ptr<const int32_t>(offset),
          ptr<const float>(weight),
          nnz,
          threads};
}

// A mask and offsets decide how many outputs there are; the caller needs that to allocate them.
int64_t bipartite_outputs(int64_t batch, int64_t tokens, int64_t r, int64_t prefix, uintptr_t mask, uintptr_t cu) {
  BipartiteArgs args{};
  args.batch = batch, args.tokens = tokens, args.r = r, args.prefix = prefix;
  args.mask = ptr<const uint8_t>(mask), args.cu = ptr<const int32_t>(cu);
  int64_t m = 0;
  const Status status = bipartite_count(args, &m);
  return status == Status::ok ? m : -static_cast<int64_t>(status);
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
  return out;
}

bool force_isa(const std::string& name) {
  for (int i = 0; i < kIsaCount; ++i)
    if (name == kIsaNames[i]) return set_isa(static_cast<Isa>(i));
  return false;
}

py::tuple last_error(int status) {
  const Status kind = static_cast<Status>(status);
  const char* name = kind == Status::index ? "index" : kind == Status::value ? "value" : "memory";
  return py::make_tuple(name, last_message());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of vidtok.";
  m.def("build_info", &build_info);
  m.def("force_isa", &force_isa);
  m.def("last_error", &last_error);
  m.def("attention_topk",
        [](uintptr_t query, uintptr_t key, int dtype, int64_t batch, int64_t q_heads, int64_t kv_heads, int64_t width,
           int64_t length, int64_t dim, int64_t key_batch, int64_t key_head, int64_t key_row, float scale,
           uintptr_t mask, uintptr_t position, bool use_max, uintptr_t span, int64_t spans, uintptr_t group,
           const std::vector<int64_t>& keep, uintptr_t index, int64_t num_index, uintptr_t score, int64_t num_score,
           int threads) {
          return run(attention_topk, AttentionTopkArgs{ptr<const void>(query),
                                                       ptr<const void>(key),
                                                       static_cast<DType>(dtype),
                                                       batch,
                                                       q_heads,
                                                       kv_heads,
                                                       width,
                                                       length,
                                                       dim,
                                                       key_batch,
                                                       key_head,
                                                       key_row,
                                                       scale,
                                                       ptr<const uint8_t>(mask),
                                                       ptr<const int64_t>(position),
                                                       use_max,
                                                       ptr<const int64_t>(span),
                                                       spans,
                                                       ptr<const int64_t>(group),
                                                       keep.data(),
                                                       int64_t(keep.size()),
                                                       ptr<int64_t>(index),
                                                       num_index,
                                                       ptr<float>(score),
                                                       num_score,
                                                       threads});
        });
  m.def("bipartite_outputs", &bipartite_outputs);
  const auto bipartite_lists = [](uintptr_t metric, int metric_dtype, int64_t heads, int64_t cm, int64_t metric_batch,
                                  int64_t metric_head, int64_t metric_row, uintptr_t size, uintptr_t mask, uintptr_t cu,
                                  int64_t batch, int64_t tokens, int64_t r, int64_t prefix, int64_t rows, int threads,
                                  uintptr_t cu_in, uintptr_t cu_out, uintptr_t anchor, uintptr_t member,
                                  uintptr_t offset, uintptr_t weight, uintptr_t x, int x_dtype, int64_t c,
                                  int64_t x_batch, int64_t x_row, uintptr_t y, uintptr_t total) {
    BipartiteArgs args{};
    args.metric = ptr<const void>(metric), args.metric_dtype = static_cast<DType>(metric_dtype);
    args.heads = heads, args.cm = cm;
    args.metric_batch = metric_batch, args.metric_head = metric_head, args.metric_row = metric_row;
    args.size = ptr<const float>(size), args.mask = ptr<const uint8_t>(mask), args.cu = ptr<const int32_t>(cu);
    args.batch = batch, args.tokens = tokens, args.r = r, args.prefix = prefix;
    args.m = rows, args.threads = threads;
    args.cu_in = ptr<int32_t>(cu_in), args.cu_out = ptr<int32_t>(cu_out), args.anchor = ptr<int32_t>(anchor);
    args.member = ptr<int32_t>(member), args.offset = ptr<int32_t>(offset), args.weight = ptr<float>(weight);
    args.x = ptr<const void>(x), args.x_dtype = static_cast<DType>(x_dtype), args.c = c;
    args.x_batch = x_batch, args.x_row = x_row, args.y = ptr<void>(y), args.total = ptr<float>(total);
    return run(bipartite, args);
  };
  m.def("bipartite_match", bipartite_lists);
  m.def("bipartite_merge", bipartite_lists);
  m.def("plan_apply",
        [](uintptr_t x, uintptr_t y, int dtype, int64_t n, int64_t rows, int64_t c, int64_t x_stride, uintptr_t anchor,
           uintptr_t member, uintptr_t offset, uintptr_t weight, int64_t nnz, int threads) {
          return run(plan_apply,
                     plan_apply_args(x, y, dtype, n, rows, c, x_stride, anchor, member, offset, weight, nnz, threads));
        });
  m.def("plan_apply_backward",
        [](uintptr_t x, uintptr_t y, int dtype, int64_t n, int64_t rows, int64_t c, int64_t x_stride, uintptr_t anchor,
           uintptr_t member, uintptr_t offset, uintptr_t weight, int64_t nnz, int threads) {
          return run(plan_apply_backward,
                     plan_apply_args(x, y, dtype, n, rows, c, x_stride, anchor, member, offset, weight, nnz, threads));
        });
  m.def("position_remap", [](uintptr_t anchor, int64_t n, int64_t m, const std::vector<int64_t>& tensors, int threads) {
    constexpr size_t kFields = 6;
    std::vector<RemapTensor> list(tensors.size() / kFields);
    for (size_t i = 0; i < list.size(); ++i) {
      const int64_t* t = tensors.data() + i * kFields;
      list[i] = {ptr<const void>(uintptr_t(t[0])), ptr<void>(uintptr_t(t[1])), t[2], t[3], t[4], uint64_t(t[5])};
    }
    return run(position_remap,
               PositionRemapArgs{ptr<const int32_t>(anchor), n, m, list.data(), int64_t(list.size()), threads});
  });
  m.def("topk_select", [](uintptr_t score, int dtype, int64_t n, const std::vector<int64_t>& keep, uintptr_t cu_seqlens,
                          int64_t segments, uintptr_t index, int threads) {
    return run(topk_select,
               TopkSelectArgs{ptr<const void>(score), static_cast<DType>(dtype), n, keep.data(), int64_t(keep.size()),
                              ptr<const int32_t>(cu_seqlens), segments, ptr<int64_t>(index), threads});
  });
  const auto pool = [](Status (*kernel)(const PoolPackedArgs&)) {
    return [kernel](uintptr_t x, uintptr_t y, int dtype, int64_t num_in, int64_t num_out, int64_t c, int64_t x_stride,
                    uintptr_t grid_in, uintptr_t grid_out, int64_t videos, int threads) {
      return run(kernel,
                 PoolPackedArgs{ptr<const void>(x), ptr<void>(y), static_cast<DType>(dtype), num_in, num_out, c,
                                x_stride, ptr<const int64_t>(grid_in), ptr<const int64_t>(grid_out), videos, threads});
    };
  };
  m.def("pool_packed", pool(pool_packed));
  m.def("pool_packed_backward", pool(pool_packed_backward));
  m.def("adjacent_similarity",
        [](uintptr_t x, uintptr_t y, int dtype, int64_t n, int64_t c, int64_t x_stride, uintptr_t grid, int64_t videos,
           int to, uintptr_t window, int64_t windows, uintptr_t center, uintptr_t cu_seqlens, int64_t sequences,
           int64_t num_out, int threads) {
          return run(adjacent_similarity,
                     AdjacentSimilarityArgs{ptr<const void>(x), ptr<float>(y), static_cast<DType>(dtype), n, c,
                                            x_stride, ptr<const int64_t>(grid), videos, static_cast<SimilarTo>(to),
                                            ptr<const int64_t>(window), windows, ptr<const void>(center),
                                            ptr<const int32_t>(cu_seqlens), sequences, num_out, threads});
        });
  m.def("contour_select",
        [](uintptr_t x, int dtype, int64_t n, int64_t c, int64_t x_stride, uintptr_t cu_seqlens, int64_t sequences,
           const std::vector<int64_t>& num, uintptr_t query, int64_t max_rank, const std::vector<uintptr_t>& bases,
           int rule, uintptr_t index, uintptr_t distance, int threads) {
          std::vector<const double*> basis;
          for (const uintptr_t b : bases) basis.push_back(ptr<const double>(b));
          return run(contour_select,
                     ContourSelectArgs{ptr<const void>(x), static_cast<DType>(dtype), n, c, x_stride,
                                       ptr<const int32_t>(cu_seqlens), sequences, num.data(), int64_t(num.size()),
                                       ptr<const void>(query), max_rank, basis.data(), static_cast<ContourRule>(rule),
                                       ptr<int64_t>(index), ptr<float>(distance), threads});
        });
  m.def("cluster_dpc_knn", [](uintptr_t x, int dtype, int64_t n, int64_t c, int64_t x_stride, uintptr_t cu_seqlens,
                              int64_t segments, uintptr_t num_clusters, int64_t num_counts, int64_t k,
                              uintptr_t assignment, uintptr_t center, int64_t workspace, int threads) {
    return run(cluster_dpc_knn,
               ClusterDpcKnnArgs{ptr<const void>(x), static_cast<DType>(dtype), n, c, x_stride,
                                 ptr<const int32_t>(cu_seqlens), segments, ptr<const int64_t>(num_clusters), num_counts,
                                 k, ptr<int64_t>(assignment), ptr<int64_t>(center), workspace, threads});
  });
  m.def("proportional_attention", [](uintptr_t q, uintptr_t k, uintptr_t v, int dtype, int64_t batch, int64_t heads,
                                     int64_t rows, int64_t keys, int64_t dim, const std::vector<int64_t>& strides,
                                     uintptr_t bias, int64_t bias_stride, float scale, uintptr_t out, int threads) {
    const int64_t* s = strides.data();
    return run(proportional_attention, ProportionalAttentionArgs{ptr<const void>(q),
                                                                 ptr<const void>(k),
                                                                 ptr<const void>(v),
                                                                 static_cast<DType>(dtype),
                                                                 batch,
                                                                 heads,
                                                                 rows,
                                                                 keys,
                                                                 dim,
                                                                 {s[0], s[1], s[2]},
                                                                 {s[3], s[4], s[5]},
                                                                 {s[6], s[7], s[8]},
                                                                 ptr<const float>(bias),
                                                                 bias_stride,
                                                                 scale,
                                                                 ptr<void>(out),
                                                                 threads});
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
