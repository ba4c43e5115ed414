#pragma once

namespace vidtok::cuda {

// One number per list that a caller may get wrong.
enum class Report : int {
  none = 0,
  plan_apply_anchor,
  plan_apply_member,
  plan_apply_offset,
  position_remap_anchor,
  adjacent_similarity_cu_seqlens,
  topk_select_cu_seqlens,
  topk_select_keep,
  cluster_dpc_knn_cu_seqlens,
  cluster_dpc_knn_num_clusters,
  count
};

#if !defined(__CUDACC_RTC__)
// The operator and the list that a kernel's report is about.
struct ReportName {
  const char* op;
  const char* list;
};
ReportName report_name(int code);
#endif

}  // namespace vidtok::cuda
