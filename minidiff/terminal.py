"""The terminal around a command: streams that may be closed or narrow, and Ctrl-C.

Files are what a command is run for. So a line that cannot be printed ends nothing.
"""

import os
import signal
import sys
import warnings


def printable(text):
    """Text in one line, with escapes for what would move the cursor or is no character."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode()
                   for c in text)


def say(text):
    """Print one line, whatever it holds: names and metadata are other people's."""
    print(printable(text))


class Stream:
    """A text stream that goes on where nothing can be written; `lost` says why."""

    def __init__(self, stream):
        self.stream = stream
        self.lost = None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Write text, or lose it."""
        self._try(self.stream.write, text)
        return len(text)

    def flush(self):
        """Have it shown, or lose it."""
        self._try(self.stream.flush)

    def _try(self, call, *given):
        try:
            call(*given)
        except OSError as e:
            self.lost = self.lost or e


def open_streams():
    """Make stdout and stderr `Stream`s that take any character.

    Descriptors 0, 1 and 2 that were closed lead nowhere now: the next file to be opened
    would have got their number, and the messages in it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Stream(stream))


def silence():
    """Have stdout and stderr lead nowhere. Returns the stderr that was."""
    before = sys.stderr
    sys.stdout = sys.stderr = Stream(open(os.devnull, "w"))  # noqa: SIM115
    return before


def end_on_interrupt():
    """From here on Ctrl-C ends the process without a word: torch, interrupted while it
    loads, would abort."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_on_interrupt():
    """From here on Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def warned(message, *_):
    """A warning's line. A command has no line of its user's for it to point at."""
    return f"minidiff: {printable(str(message))}\n"


def run(main):
    """The exit code of main(). What it printed and nobody could read is said.

    That a reader left early, as head does, is no fault.
    """
    open_streams()
    warnings.formatwarning = warned
    warnings.simplefilter("once", UserWarning, append=True)
    try:
        code = main() or 0
    except SystemExit as e:
        code = e.code or 0
    except KeyboardInterrupt:  # while main returned
        code = 130
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done
    sys.stdout.flush()
    lost = sys.stdout.lost
    if lost and not isinstance(lost, BrokenPipeError):
        print(f"minidiff: not all could be printed ({lost.strerror})", file=sys.stderr)
        code = code or 2
    sys.stderr.flush()
    for stream in (sys.stdout, sys.stderr):
        if stream.lost:  # or Python tries again at its end, and complains
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code
