"""plan_apply as a gather and as a cluster mean."""

SUITES = ("plan_apply", "plan_apply_mean")


def test_plan_apply(timed) -> None:
    timed()
