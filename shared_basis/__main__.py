"""Runs the command `shared-basis` as `python -m shared_basis`."""

from shared_basis.cli.app import main

if __name__ == "__main__":
    main()
