"""Benchmarks: every operator against published algorithms, careful versions of them and the machine's limit.

``python -m bench`` runs all of it; ``pytest bench --benchmark-only`` runs the same cases through pytest-benchmark.
"""
