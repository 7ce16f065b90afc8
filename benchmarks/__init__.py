"""Performance benchmarks. Each is a module, run from the repository's root: `python -m benchmarks.speed`, …"""
