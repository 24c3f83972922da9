"""How fast embedgrad is beside its peers: `python -m benchmarks.speed`."""
