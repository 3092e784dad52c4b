"""`python -m attnopt`, which is also how torchrun starts a command."""

from attnopt.cli import main

if __name__ == "__main__":
    main()
