"""Benchmarks: commands at the door, pytest-benchmark suites in suites/."""
