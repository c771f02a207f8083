"""``python -m forgery_eval.demo``."""

import sys

from forgery_eval.demo.command import run

if __name__ == "__main__":
    sys.exit(run())
