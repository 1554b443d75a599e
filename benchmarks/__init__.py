"""Measure, side by side with others, and write ``docs/performance.md``: ``python -m benchmarks``."""
