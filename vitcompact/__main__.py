"""`python -m vitcompact`: the command, where the package is not installed."""
from vitcompact.cli import main

main()
