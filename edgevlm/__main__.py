"""`python -m edgevlm` is `edgevlm`."""

from edgevlm.cli import main

if __name__ == "__main__":
    main()
