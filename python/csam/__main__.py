"""`python -m csam`: the `csam` command."""

from csam.cli import main

main()
