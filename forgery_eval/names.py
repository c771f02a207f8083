"""Names of very many images, kept in a temporary file, so that memory stays flat. Imports no torch."""

import hashlib
import sqlite3

_CACHE_KB = 8192


class NameTable:
    """Names with a short text each; the file ends with the table.

    A name stands there as 16 bytes of its digest.
    """

    def __init__(self) -> None:
        self._base = sqlite3.connect("", check_same_thread=False)  # no path: a file without a name
        for pragma in (f"cache_size = -{_CACHE_KB}", "journal_mode = OFF", "synchronous = OFF", "temp_store = FILE"):
            self._base.execute(f"PRAGMA {pragma}")
        self._base.execute("CREATE TABLE names (name BLOB PRIMARY KEY, text TEXT) WITHOUT ROWID")
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, name: str, text: str = "") -> bool:
        """Adds a name, and returns whether it is new; the text of one that is there stays."""
        added = self._base.execute("INSERT OR IGNORE INTO names VALUES (?, ?)", (_key(name), text)).rowcount == 1
        self._count += added
        return added

    def get(self, name: str) -> str | None:
        """Returns a name's text; None if the name is not there."""
        found = self._base.execute("SELECT text FROM names WHERE name = ?", (_key(name),)).fetchone()
        return None if found is None else str(found[0])

    def close(self) -> None:
        """Removes the table."""
        self._base.close()


def _key(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
