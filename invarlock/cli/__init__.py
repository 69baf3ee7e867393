"""The command line: argparse, one module a command. What is needed for ``--help`` imports no torch."""
