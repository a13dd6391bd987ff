"""Run the command line with ``python -m prune2deploy``."""

from prune2deploy.cli import main

if __name__ == "__main__":
    main()
