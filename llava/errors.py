"""What a user can mend. Imports no torch.

Commands turn a ``UserError`` into one line, and nothing else: any other exception is a bug of ours and keeps its
traceback. The children also belong to the built-in family that a caller of the Python API expects.
"""


class UserError(Exception):
    """Something that the user can mend; the message says what was wrong, where, and what to do."""


class OptionError(UserError, ValueError):
    """An option is out of range, unknown, or excluded by another one."""


class CheckpointError(UserError, ValueError):
    """A checkpoint cannot be opened; the message names the files or keys and says what to do."""


class DataError(UserError, ValueError):
    """Data cannot be used; the message names file and row and says what to do."""


class FileError(UserError, OSError):
    """The system refused a file or folder; the message names it."""


class MissingFileError(FileError, FileNotFoundError):
    """There is no such file or folder."""


class ImageReadError(FileError):
    """An image cannot be read; the message names the file and the reason."""


class WorkerError(UserError, RuntimeError):
    """Processes that work for this one were lost; the message says at what."""
