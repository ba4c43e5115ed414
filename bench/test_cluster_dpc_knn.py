"""cluster_dpc_knn."""

SUITES = ("cluster_dpc_knn",)


def test_cluster_dpc_knn(timed) -> None:
    timed()
