#include "cuda/report.h"

namespace vidtok::cuda {

ReportName report_name(int code) {
  static constexpr ReportName kNames[] = {
      {"", "nothing"},
      {"plan_apply", "anchor"},
      {"plan_apply", "member"},
      {"plan_apply", "offset"},
      {"position_remap", "anchor"},
      {"adjacent_similarity", "cu_seqlens"},
      {"topk_select", "cu_seqlens"},
      {"topk_select", "keep"},
      {"cluster_dpc_knn", "cu_seqlens"},
      {"cluster_dpc_knn", "num_clusters"},
  };
  static_assert(sizeof kNames / sizeof kNames[0] == unsigned(Report::count), "one name per report");
  return code > 0 && code < int(Report::count) ? kNames[code] : ReportName{"an operator", "an index"};
}

}  // namespace vidtok::cuda
