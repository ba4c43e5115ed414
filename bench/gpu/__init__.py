"""Benchmarks on a GPU: ``bench/gpu/run.sh`` does everything; ``python -m bench.gpu`` measures alone."""

import sys

from bench.row import ROOT

sys.path[:0] = [str(ROOT), str(ROOT / "python")]
