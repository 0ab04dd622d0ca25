"""`python -m serving ...` is the `searoom` command, for where the package is not installed."""

from serving.cli import main

if __name__ == "__main__":
    main()
