"""PruneVid stage 1."""

SUITES = ("prunevid",)


def test_prunevid(timed) -> None:
    timed()
