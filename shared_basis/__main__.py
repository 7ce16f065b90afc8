"""`python -m shared_basis` is the command `shared-basis`."""

from shared_basis.cli.app import main

if __name__ == "__main__":
    main()
