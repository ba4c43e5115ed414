"""contour_select."""

SUITES = ("contour_select",)


def test_contour_select(timed) -> None:
    timed()
