"""Trains, evaluates, exports, …: see `python main.py --help`, README.md and `shared_basis/cli/app.py`."""

from shared_basis.cli.app import main

if __name__ == "__main__":
    main()
