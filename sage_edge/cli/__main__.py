"""`python -m sage_edge.cli` is `sage-edge`."""

from sage_edge.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
