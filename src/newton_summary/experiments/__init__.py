"""Experiments: tasks, data, training, comparison and search, which the command line and the benchmarks call.

They need the extra ``experiments``: ``pip install 'newton-summary[experiments]'``.
"""
