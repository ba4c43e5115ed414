"""topk_select."""

SUITES = ("topk_select",)


def test_topk_select(timed) -> None:
    timed()
