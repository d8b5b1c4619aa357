"""Continual-learning benchmarks: published protocols, our engine, and baselines to compare with."""
