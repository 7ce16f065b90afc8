"""Process-level support: devices, memory, signals, output and files."""
