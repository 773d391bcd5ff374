"""`python -m elsteer` is the command `elsteer`."""

from elsteer.cli import main

if __name__ == "__main__":
    main()
