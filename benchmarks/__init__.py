"""Measurements, each run as `python -m benchmarks.NAME [--quick] [--json FILE]`.

Alternatives are measured interleaved in one run, with repeats and spread, because machines are noisy; what is reported
are ratios within the run.
"""
