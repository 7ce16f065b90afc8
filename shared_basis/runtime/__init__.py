"""The process: devices, memory, signals, output and files."""
