"""The exceptions of dfs. Each message is one line that a person can act on."""

import signal


def printable(text: str) -> str:
    """``text`` in one line that changes nothing in a terminal: control characters and line ends as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line: its first, or the name of its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is out: libraries say so in exceptions of many classes."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY)


class Stopped(KeyboardInterrupt):
    """A signal asked the program to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = number


class DfsError(Exception):
    """Base of every error that dfs raises on purpose.

    ``exit_code`` is what the command line ends with: 2 for a mistake in the input, 1 for work that was done but
    failed.

    Example:
        >>> import dfs_cli
        >>> try:
        ...     dfs_cli.plan("resnt18")
        ... except dfs_cli.DfsError as error:
        ...     error.exit_code
        2
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # names of files may hold anything


class ConfigError(DfsError, ValueError):
    """A setting is out of range or contradicts another one."""


class UnsupportedModelError(DfsError, ValueError):
    """The model is unknown, or not a residual network that dfs can convert."""


class WeightsError(DfsError):
    """Weights could not be found, read or matched with the architecture."""


class DataError(DfsError):
    """A dataset is missing, empty, inconsistent or mostly unreadable."""


class ArtifactError(DfsError):
    """A file is not a dfs artifact, or not an intact one."""


class OutputError(DfsError):
    """An output file exists already or cannot be written."""


class TakenError(OutputError):
    """The name of an output was taken while the work was done."""

    exit_code = 1


class WriteError(OutputError):
    """Writing an output failed: the disk is full, read-only or broken."""

    exit_code = 1


class MissingDependencyError(DfsError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class DivergedError(DfsError, ArithmeticError):
    """The tuning loss became NaN or infinite."""


class LostProcessError(DfsError):
    """Another process of the same run ended, or does not answer."""

    exit_code = 1


class BudgetMissedError(DfsError):
    """Tuning ended outside the promised interval of the budget."""

    exit_code = 1


class ExportError(DfsError):
    """The exported graph does not do what the network does."""

    exit_code = 1
