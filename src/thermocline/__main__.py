"""The program's entry, and `python -m thermocline`."""

import signal
import sys


def main() -> int:
    """Run the command line (`thermocline.cli.main`); the exit code.

    An interrupt while that is still being imported ends the program at once, as there is nothing to be said or kept.
    """
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from thermocline.cli.main import main as run

    signal.signal(signal.SIGINT, interrupt)
    return run()


if __name__ == "__main__":
    sys.exit(main())
