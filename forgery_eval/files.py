"""Writing files so that a kill leaves the old one or the new one."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a text; the file takes its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    # Half a character, which UTF-8 cannot hold, becomes an escape.
    partial.write_bytes(text.encode("utf-8", "backslashreplace"))
    partial.replace(path)
