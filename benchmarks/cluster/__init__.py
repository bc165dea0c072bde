"""What the way through a cluster costs, and what faults lose: `python -m benchmarks.cluster`."""
