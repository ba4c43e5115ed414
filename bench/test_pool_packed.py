"""pool_packed."""

SUITES = ("pool_packed",)


def test_pool_packed(timed) -> None:
    timed()
