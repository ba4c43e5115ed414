"""attention_topk."""

SUITES = ("attention_topk",)


def test_attention_topk(timed) -> None:
    timed()
