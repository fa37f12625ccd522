"""Benchmark: time and memory of fedkd, of a bare PyTorch loop and of other simulators on this machine."""
