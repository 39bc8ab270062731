"""`python -m vitcompact`: the command, for use without installing the package."""
from vitcompact.cli import main

main()
