"""`python -m embedgrad`."""

from embedgrad.cli import main

main()
