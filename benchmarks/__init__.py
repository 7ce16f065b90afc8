"""How fast is it? Each benchmark is a module, run from the repository's root: `python -m benchmarks.speed`, …"""
