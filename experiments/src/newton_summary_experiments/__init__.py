"""Experiments: tasks, data, training, comparison and search, which the command line and the benchmarks call."""
