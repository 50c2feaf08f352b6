"""What the commands of train/ have in common."""

import sys
from collections.abc import Callable


def run_command(main: Callable[[], None]) -> None:
    """Run a command; what was wrong with its input is one sentence and exit status 2, not a traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
