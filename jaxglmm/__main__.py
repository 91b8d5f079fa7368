"""``python -m jaxglmm``: the command line."""

from jaxglmm.cli import main

if __name__ == "__main__":
    main()
