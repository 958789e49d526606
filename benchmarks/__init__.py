"""Measurements of speed, memory and work: `python -m benchmarks list` says what there is.

Cases of speed have the runner's options and its output: variants in turn in one process, ratios within a round, work
counted, the floor measured beside them. Tables stand in the documentation, and each has options of its own. Counts are
what a test holds the code to.
"""
