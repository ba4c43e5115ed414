// The Python module of the CUDA kernels, and of the same kernels compiled for the host: pointers, sizes and a
// stream in, a status out. Nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cuda/adjacent_similarity.h"
#include "cuda/attention_topk.h"
#include "cuda/bipartite.h"
#include "cuda/cluster_dpc_knn.h"
#include "cuda/contour_select.h"
#include "cuda/plan_apply.h"
#include "cuda/pool_packed.h"
#include "cuda/position_remap.h"
#include "cuda/report.h"
#include "cuda/topk_select.h"
#if defined(VIDTOK_HOST)
#include "cuda/host/host.h"
#include "cuda/host/samples.h"
#include "cuda/host/tiles.h"
#endif

namespace py = pybind11;
using namespace vidtok;

namespace {

template <class T>
T* ptr(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

cuda::Launch launch(uintptr_t stream, uintptr_t error, int sm, int sms) {
  return {ptr<void>(stream), ptr<int32_t>(error), sm, sms};
}

PlanApplyArgs plan_apply_args(uintptr_t x, uintptr_t y, int dtype, int64_t n, int64_t m, int64_t c, int64_t x_stride,
                              uintptr_t anchor, uintptr_t member, uintptr_t offset, uintptr_t weight, int64_t nnz) {
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
          0};
}

std::vector<int> numbers(const std::string& list) {
  std::vector<int> out;
  for (size_t at = 0; at < list.size();) {
    size_t used = 0;
    out.push_back(std::stoi(list.substr(at), &used));
    at += used + 1;
  }
  return out;
}

py::dict build_info() {
  py::dict out;
#if defined(VIDTOK_HOST)
  out["host"] = true;
  out["sms"] = std::vector<int>{VIDTOK_HOST};
  out["ptx"] = std::vector<int>{};
  out["compiler"] = __VERSION__;
#else
  out["host"] = false;
  out["sms"] = numbers(VIDTOK_CUDA_SMS);
  out["ptx"] = numbers(VIDTOK_CUDA_PTX);
  out["compiler"] = VIDTOK_CUDA_COMPILER;
#endif
  return out;
}

py::tuple last_error(int status) {
  const Status kind = static_cast<Status>(status);
  const char* name = kind == Status::index    ? "index"
                     : kind == Status::value  ? "value"
                     : kind == Status::memory ? "memory"
                                              : "launch";
  return py::make_tuple(name, last_message());
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of vidtok.";
  m.def("build_info", &build_info);
  m.def("last_error", &last_error);
  m.def("report_name", [](int code) {
    const cuda::ReportName name = cuda::report_name(code);
    return py::make_tuple(name.op, name.list);
  });
#if defined(VIDTOK_HOST)
  m.def("set_order", &host::set_order);
  m.def("launches", &host::launches);
  m.def("run_sample", [](const std::string& sample, uintptr_t x, uintptr_t out, int n, uintptr_t stream,
                         uintptr_t error, int sm, int sms) {
    return int(
        host::run_sample(sample.c_str(), ptr<const float>(x), ptr<float>(out), n, launch(stream, error, sm, sms)));
  });
  m.def("switch_fibers", [](int64_t rounds, uintptr_t stream, uintptr_t error, int sm, int sms) {
    return int(host::switch_fibers(rounds, launch(stream, error, sm, sms)));
  });
  m.def("run_mma", [](bool bf16, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t a_words, uintptr_t b_words,
                      uintptr_t d, uintptr_t stream, uintptr_t error, int sm, int sms) {
    return int(host::run_mma(bf16, ptr<void>(a), ptr<void>(b), ptr<float>(c), ptr<uint32_t>(a_words),
                             ptr<uint32_t>(b_words), ptr<float>(d), launch(stream, error, sm, sms)));
  });
  m.def("run_wmma", [](uintptr_t a, uintptr_t b, uintptr_t out, uintptr_t stream, uintptr_t error, int sm, int sms) {
    return int(host::run_wmma(ptr<void>(a), ptr<void>(b), ptr<float>(out), launch(stream, error, sm, sms)));
  });
  m.def("run_gram", [](int dtype, uintptr_t a, uintptr_t b, int64_t a_stride, int64_t b_stride, int64_t a_rows,
                       int64_t b_rows, int64_t channels, uintptr_t index, bool same, int tile, int warps, int stages,
                       uintptr_t out, uintptr_t row_max, uintptr_t stream, uintptr_t error, int sm, int sms) {
    return int(
        host::run_gram({static_cast<DType>(dtype), ptr<void>(a), ptr<void>(b), a_stride, b_stride, a_rows, b_rows,
                        channels, ptr<int32_t>(index), same, tile, warps, stages, ptr<float>(out), ptr<float>(row_max)},
                       launch(stream, error, sm, sms)));
  });
#endif
  // Every call: its arguments, the choice of the tuning table, then the launch (stream, error, sm, sms).
  m.def("plan_apply", [](uintptr_t x, uintptr_t y, int dtype, int64_t n, int64_t rows, int64_t c, int64_t x_stride,
                         uintptr_t anchor, uintptr_t member, uintptr_t offset, uintptr_t weight, int64_t nnz,
                         int threads, int vectors, uintptr_t stream, uintptr_t error, int sm, int sms) {
    return int(cuda::plan_apply(plan_apply_args(x, y, dtype, n, rows, c, x_stride, anchor, member, offset, weight, nnz),
                                {threads, vectors}, launch(stream, error, sm, sms)));
  });
  m.def("plan_apply_backward_workspace", [](int64_t n, int64_t rows, bool gather, int64_t nnz) {
    PlanApplyArgs args{};
    const int32_t some = 0;
    args.n = n, args.m = rows, args.nnz = nnz, args.member = gather ? nullptr : &some;
    return cuda::plan_apply_backward_workspace(args);
  });
  m.def("plan_apply_backward",
        [](uintptr_t x, uintptr_t y, int dtype, int64_t n, int64_t rows, int64_t c, int64_t x_stride, uintptr_t anchor,
           uintptr_t member, uintptr_t offset, uintptr_t weight, int64_t nnz, uintptr_t workspace, int threads,
           int vectors, uintptr_t stream, uintptr_t error, int sm, int sms) {
          return int(cuda::plan_apply_backward(
              plan_apply_args(x, y, dtype, n, rows, c, x_stride, anchor, member, offset, weight, nnz),
              ptr<void>(workspace), {threads, vectors}, launch(stream, error, sm, sms)));
        });
  m.def("position_remap", [](uintptr_t anchor, int64_t n, int64_t rows, const std::vector<int64_t>& tensors,
                             int threads, uintptr_t stream, uintptr_t error, int sm, int sms) {
    constexpr size_t kFields = 6;
    std::vector<RemapTensor> list(tensors.size() / kFields);
    for (size_t i = 0; i < list.size(); ++i) {
      const int64_t* t = tensors.data() + i * kFields;
      list[i] = {ptr<const void>(uintptr_t(t[0])), ptr<void>(uintptr_t(t[1])), t[2], t[3], t[4], uint64_t(t[5])};
    }
    return int(cuda::position_remap({ptr<const int32_t>(anchor), n, rows, list.data(), int64_t(list.size()), 0},
                                    {threads}, launch(stream, error, sm, sms)));
  });
  m.def("topk_select", [](uintptr_t score, int dtype, int64_t n, uintptr_t cu_seqlens, int64_t segments, int64_t keep,
                          uintptr_t keep_start, uintptr_t position, uintptr_t index, int threads, uintptr_t stream,
                          uintptr_t error, int sm, int sms) {
    return int(cuda::topk_select(
        {ptr<const void>(score), static_cast<DType>(dtype), n, ptr<const int32_t>(cu_seqlens), segments, keep,
         ptr<const int64_t>(keep_start), ptr<const int32_t>(position), ptr<int64_t>(index)},
        {threads}, launch(stream, error, sm, sms)));
  });
  const auto pool =
      [](Status (*kernel)(const cuda::PoolPackedArgs&, const cuda::PoolPackedChoice&, const cuda::Launch&)) {
        return [kernel](uintptr_t x, uintptr_t y, int dtype, int64_t num_in, int64_t num_out, int64_t c,
                        int64_t x_stride, uintptr_t grids, int64_t videos, int threads, int vectors, uintptr_t stream,
                        uintptr_t error, int sm, int sms) {
          return int(kernel({ptr<const void>(x), ptr<void>(y), static_cast<DType>(dtype), num_in, num_out, c, x_stride,
                             ptr<const int64_t>(grids), videos},
                            {threads, vectors}, launch(stream, error, sm, sms)));
        };
      };
  m.def("pool_packed", pool(cuda::pool_packed));
  m.def("pool_packed_backward", pool(cuda::pool_packed_backward));
  m.def("bipartite_workspace", &cuda::bipartite_workspace);
  // Bipartite matching; with x, the merge by it. cu_out is given with cu.
  const auto bipartite = [](uintptr_t metric, int dtype, int64_t heads, int64_t cm, int64_t metric_batch,
                            int64_t metric_head, int64_t metric_row, uintptr_t size, uintptr_t mask, uintptr_t cu,
                            int64_t batch, int64_t tokens, int64_t r, int64_t prefix, int64_t rows, int64_t longest,
                            uintptr_t cu_in, uintptr_t cu_out, uintptr_t anchor, uintptr_t member, uintptr_t offset,
                            uintptr_t weight, uintptr_t x, int x_dtype, int64_t c, int64_t x_batch, int64_t x_row,
                            uintptr_t y, uintptr_t total, uintptr_t workspace, bool one_block, int tile,
                            uintptr_t stream, uintptr_t error, int sm, int sms) {
    BipartiteArgs args{};
    args.metric = ptr<const void>(metric), args.metric_dtype = static_cast<DType>(dtype);
    args.heads = heads, args.cm = cm;
    args.metric_batch = metric_batch, args.metric_head = metric_head, args.metric_row = metric_row;
    args.size = ptr<const float>(size), args.mask = ptr<const uint8_t>(mask), args.cu = ptr<const int32_t>(cu);
    args.batch = batch, args.tokens = tokens, args.r = r, args.prefix = prefix, args.m = rows;
    args.cu_in = ptr<int32_t>(cu_in), args.cu_out = ptr<int32_t>(cu_out), args.anchor = ptr<int32_t>(anchor);
    args.member = ptr<int32_t>(member), args.offset = ptr<int32_t>(offset), args.weight = ptr<float>(weight);
    args.x = ptr<const void>(x), args.x_dtype = static_cast<DType>(x_dtype), args.c = c;
    args.x_batch = x_batch, args.x_row = x_row, args.y = ptr<void>(y), args.total = ptr<float>(total);
    return int(cuda::bipartite(args, longest, ptr<void>(workspace), {one_block, tile}, launch(stream, error, sm, sms)));
  };
  m.def("bipartite_match", bipartite);
  m.def("bipartite_merge", bipartite);
  m.def("adjacent_similarity", [](uintptr_t x, uintptr_t y, int dtype, int64_t n, int64_t c, int64_t x_stride, int to,
                                  uintptr_t runs, int64_t num_runs, int64_t pieces, int64_t step, uintptr_t center,
                                  uintptr_t cu_seqlens, int64_t sequences, int warps, uintptr_t stream, uintptr_t error,
                                  int sm, int sms) {
    return int(cuda::adjacent_similarity({ptr<const void>(x), ptr<float>(y), static_cast<DType>(dtype), n, c, x_stride,
                                          static_cast<SimilarTo>(to), ptr<const int64_t>(runs), num_runs, pieces, step,
                                          ptr<const void>(center), ptr<const int32_t>(cu_seqlens), sequences},
                                         {warps}, launch(stream, error, sm, sms)));
  });
  const auto clusters = [](uintptr_t x, int dtype, int64_t n, int64_t c, int64_t x_stride, uintptr_t cu_seqlens,
                           int64_t segments, uintptr_t num_clusters, int64_t num_counts, int64_t k,
                           uintptr_t assignment, uintptr_t center, int64_t workspace, uintptr_t cu_host,
                           int64_t num_center) {
    return cuda::ClusterDpcKnnCall{
        {ptr<const void>(x), static_cast<DType>(dtype), n, c, x_stride, ptr<const int32_t>(cu_seqlens), segments,
         ptr<const int64_t>(num_clusters), num_counts, k, ptr<int64_t>(assignment), ptr<int64_t>(center), workspace, 0},
        ptr<const int32_t>(cu_host),
        num_center};
  };
  m.def("cluster_dpc_knn_workspace", [clusters](int64_t n, uintptr_t cu_seqlens, int64_t segments, int64_t workspace,
                                                uintptr_t cu_host, int64_t num_center) {
    return cuda::cluster_dpc_knn_workspace(
        clusters(0, 0, n, 0, 0, cu_seqlens, segments, 0, 1, 1, 0, 0, workspace, cu_host, num_center));
  });
  m.def(
      "cluster_dpc_knn",
      [clusters](uintptr_t x, int dtype, int64_t n, int64_t c, int64_t x_stride, uintptr_t cu_seqlens, int64_t segments,
                 uintptr_t num_clusters, int64_t num_counts, int64_t k, uintptr_t assignment, uintptr_t center,
                 int64_t room, uintptr_t cu_host, int64_t num_center, uintptr_t workspace, int tile, int warps,
                 int stages, uintptr_t stream, uintptr_t error, int sm, int sms) {
        return int(cuda::cluster_dpc_knn(clusters(x, dtype, n, c, x_stride, cu_seqlens, segments, num_clusters,
                                                  num_counts, k, assignment, center, room, cu_host, num_center),
                                         ptr<void>(workspace), {tile, warps, stages}, launch(stream, error, sm, sms)));
      });
  m.def("contour_select_workspace", [](int64_t n, int64_t c, int64_t sequences, int64_t rank) {
    cuda::ContourArgs args{};
    args.n = n, args.c = c, args.sequences = sequences, args.rank = rank;
    return cuda::contour_select_workspace(args);
  });
  m.def("contour_select",
        [](uintptr_t x, int dtype, int64_t n, int64_t c, int64_t x_stride, uintptr_t list, int64_t sequences,
           int64_t rank, int64_t tiles, uintptr_t query, int rule, uintptr_t index, uintptr_t distance,
           uintptr_t workspace, int threads, uintptr_t stream, uintptr_t error, int sm, int sms) {
          return int(cuda::contour_select({ptr<const void>(x), static_cast<DType>(dtype), n, c, x_stride,
                                           ptr<const int64_t>(list), sequences, rank, tiles, ptr<const void>(query),
                                           static_cast<ContourRule>(rule), ptr<int64_t>(index), ptr<float>(distance)},
                                          ptr<void>(workspace), {threads}, launch(stream, error, sm, sms)));
        });
  m.def(
      "attention_topk_workspace", [](int dtype, int64_t batch, int64_t q_heads, int64_t kv_heads, int64_t width,
                                     int64_t length, int64_t dim, int64_t tokens, bool ordered, int split, int warps) {
        cuda::AttentionTopkArgs args{};
        args.dtype = static_cast<DType>(dtype);
        args.batch = batch, args.q_heads = q_heads, args.kv_heads = kv_heads, args.width = width, args.length = length;
        args.dim = dim, args.tokens = tokens, args.ordered = ordered;
        return cuda::attention_topk_workspace(args, {split, warps});
      });
  m.def(
      "attention_topk",
      [](uintptr_t query, uintptr_t key, int dtype, int64_t batch, int64_t q_heads, int64_t kv_heads, int64_t width,
         int64_t length, int64_t dim, int64_t key_batch, int64_t key_head, int64_t key_row, float scale, uintptr_t mask,
         uintptr_t position, bool use_max, uintptr_t span, int64_t spans, int64_t tokens, bool ordered, uintptr_t group,
         int64_t groups, int64_t keep, uintptr_t keep_start, uintptr_t index, uintptr_t score, uintptr_t workspace,
         int select_threads, int split, int warps, uintptr_t stream, uintptr_t error, int sm, int sms) {
        const cuda::AttentionTopkArgs args{ptr<const void>(query),
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
                                           tokens,
                                           ordered,
                                           ptr<const int32_t>(group),
                                           groups,
                                           keep,
                                           ptr<const int64_t>(keep_start),
                                           ptr<int64_t>(index),
                                           ptr<float>(score)};
        return int(cuda::attention_topk(args, ptr<void>(workspace), select_threads, {split, warps},
                                        launch(stream, error, sm, sms)));
      });
}
