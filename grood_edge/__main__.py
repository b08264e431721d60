"""`python -m grood_edge`."""

from grood_edge.cli import main

main()
