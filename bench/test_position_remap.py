"""position_remap."""

SUITES = ("position_remap",)


def test_position_remap(timed) -> None:
    timed()
