"""The tokenizer builder, by the name that it had first; it is ``llava.demo.tokenizer``."""

import sys

from llava.demo.tokenizer import build_parser, main, run

__all__ = ["build_parser", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
