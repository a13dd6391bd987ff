"""Interval arithmetic over a graph: what a value, and the change of a value, can be over a box of inputs."""
