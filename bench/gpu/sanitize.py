"""A short list of cases for compute-sanitizer: the first of each operator in fp16, compared with the reference."""

from __future__ import annotations

import sys

import torch

import vidtok
from tests.cases import Make
from tests.ops.test_contract import FIRST, assert_same, leaves, map_arguments


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for case in FIRST.values():
        args, kwargs = case.make(Make(torch.float16))
        with vidtok.use_backend("reference"):
            expected = case.call(args, kwargs)
        backend = "cuda" if device == "cuda" else "auto"
        with vidtok.use_backend(backend):
            got = case.call(*map_arguments((args, kwargs), lambda t: t.to(device)))
        assert_same(case, [t.cpu() for t in leaves(got)], leaves(expected), torch.float16)
        print(case)
    return 0


if __name__ == "__main__":
    sys.exit(main())
