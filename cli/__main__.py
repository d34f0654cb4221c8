"""`python -m tarflow.cli`, which Accelerate's launcher can start too."""

from tarflow.cli.main import main

if __name__ == "__main__":
    main()
