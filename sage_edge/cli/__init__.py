"""The command line. One module a command, each with `add(subparsers)` and `run(arguments) -> exit code`."""
