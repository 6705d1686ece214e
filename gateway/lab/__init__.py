"""Offline work: the demo today; benchmark, audit and exports later."""
