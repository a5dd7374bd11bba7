"""`python -m kscli`: the command line, and what a signal does to it."""

from __future__ import annotations

import sys

INTERRUPTED = 2  # SIGINT's number, known before `signal` is imported
AGAIN_SECONDS = 0.1  # after which a signal whose exception was swallowed is raised again


class _Stopped(KeyboardInterrupt):
    """A signal; of KeyboardInterrupt itself Python may make a death by SIGINT at exit."""


def main() -> None:
    """Run the command line; the entry point of `kscli`.

    SIGINT and SIGTERM end it with one line on stderr and exit code 128 + number, wherever they
    fall. Everything is imported in here: a signal that comes during an import is answered like
    any other.
    """
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        # Python drops what is raised in a weakref's callback, in __del__, or where C asks no more.
        _raise_again()
        raise _Stopped

    try:
        _on_signals(stop)
        from kscli.cli.app import main as run_app

        run_app()
        if received:
            raise _Stopped
    except BaseException as error:
        _on_signals(None)
        # Where the signal falls, a library may turn it into an error or an exit of its own.
        if not received and not isinstance(error, KeyboardInterrupt):
            raise
        _leave(received[-1] if received else INTERRUPTED)


def _on_signals(handler: object) -> None:
    """Set the handler of SIGINT and SIGTERM; None lets them kill, without a traceback."""
    import signal

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler or signal.SIG_DFL)  # type: ignore[arg-type]


def _raise_again() -> None:
    """Have `_Stopped` raised again, until it arrives in `main`, where nothing else is on its way.

    While an exception is handled, it may be `_Stopped` itself that cleans up after itself.
    """
    import signal

    def again(number: int, frame: object) -> None:
        if sys.exc_info()[1] is None:
            raise _Stopped

    def unraisable(dropped: sys.UnraisableHookArgs) -> None:
        if not isinstance(dropped.exc_value, _Stopped):
            sys.__unraisablehook__(dropped)

    sys.unraisablehook = unraisable
    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS, AGAIN_SECONDS)


def _leave(number: int) -> None:
    import signal

    signal.setitimer(signal.ITIMER_REAL, 0)
    word = "interrupted" if number == INTERRUPTED else "terminated"
    try:
        if sys.stderr:
            sys.stderr.write(f"error: {word}; no half-made file was left behind.\n")
            sys.stderr.flush()
    except OSError:
        pass
    raise SystemExit(128 + number) from None


if __name__ == "__main__":
    main()
