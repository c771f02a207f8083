"""The tower stage, by the name that it had first; it is ``llava.demo.towers``."""

import sys

from llava.demo.towers import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
