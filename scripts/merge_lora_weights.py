"""Merges a LoRA folder into its base and saves one model; ``forgery merge`` is the same."""

import argparse
import sys

from llava.merge import build_parser, main


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    return build_parser().parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
