"""adjacent_similarity."""

SUITES = ("adjacent_similarity",)


def test_adjacent_similarity(timed) -> None:
    timed()
