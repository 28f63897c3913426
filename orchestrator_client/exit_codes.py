"""What the exit codes of commands mean; documented in docs/cli.md and in every help."""

DONE = 0
FAILED = 1
USAGE = 2
REFUSED = 3
UNAUTHORIZED = 4
UNREACHABLE = 5
WAITED_TOO_LONG = 124
INTERRUPTED = 130
BROKEN_PIPE = 141
