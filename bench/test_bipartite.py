"""bipartite_merge and bipartite_match."""

SUITES = ("bipartite_merge", "bipartite_match")


def test_bipartite(timed) -> None:
    timed()
