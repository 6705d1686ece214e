"""The gateway measured side by side with what else could stand in its place, in one run on one machine.

Not a test: nothing here asserts a speed. `python -m bench` prints a table; docs/benchmarks.md says how
to read it.
"""
