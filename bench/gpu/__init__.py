"""Benchmarks on a GPU: ``bench/gpu/run.sh`` does everything; ``python -m bench.gpu`` measures alone."""
