"""Serves a model on this machine: a page for people, and an API for programs.

Only this machine can reach it unless --host says otherwise. Ctrl-C or SIGTERM stop it after what it accepted is done.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.cli import OptionParser, add_options, log, positive_int, read_options
from llava.errors import OptionError
from llava.files import file_errors
from llava.model_options import add_model_options, open_detector
from llava.serve.limits import Limits

if TYPE_CHECKING:
    from llava.serve.service import Service

_NEEDED = ("fastapi", "uvicorn", "multipart", "prometheus_client")


def build_parser() -> OptionParser:
    """Returns the parser of the command line."""
    parser = OptionParser(description=__doc__)
    where = parser.add_argument_group("server")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    where.add_argument("--port", type=int, default=8080, help="port (default: 8080; 0: any free one)")
    where.add_argument("--name", help="the model's name for programs (default: the name of its folder)")
    where.add_argument(
        "--replicas", type=positive_int, default=1, help="processes behind the port, one a GPU, by Ray (default: 1)"
    )
    where.add_argument(
        "--api-keys", type=Path, metavar="FILE", help="keys, one a line, of which /v1 then asks for one (Bearer)"
    )
    where.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="calibration from forgery eval --calibrate (default: the model's own, if any)",
    )
    where.add_argument("--no-abstain", action="store_true", help="give every verdict, however unsure")
    add_options(parser.add_argument_group("limits"), Limits)
    add_model_options(parser)
    return parser


def read_keys(file: Path | None) -> list[str]:
    """Returns the keys of a file, one a line.

    Raises:
        FileError: It cannot be read.
        OptionError: It holds none.
    """
    if file is None:
        return []
    with file_errors(file, "read"):
        lines = file.read_text(encoding="utf-8").splitlines()
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise OptionError(f"--api-keys: {file} holds no key")
    return keys


def open_service(arguments: argparse.Namespace) -> "Service":
    """Opens the model.

    Raises:
        UserError: It cannot be opened, or an option cannot be met.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise OptionError(f"the server needs {', '.join(missing)}: pip install -c constraints.txt -e '.[serve]'")
    from llava.serve.service import Service

    limits = read_options(Limits, arguments)
    detector = open_detector(arguments, calibration=arguments.calibration, abstain=not arguments.no_abstain)
    name = arguments.name or Path(str(arguments.model_path)).resolve().name
    return Service(detector, limits, name)


def main(arguments: Any = None) -> int:
    """Runs the command; returns when the server was stopped.

    Raises:
        UserError: The model cannot be opened, or the port is taken.
    """
    parsed = build_parser().parse_args(arguments)
    if not 0 <= parsed.port <= 65535:
        raise OptionError(f"--port must be from 0 to 65535, not {parsed.port}")
    keys = read_keys(parsed.api_keys)
    if parsed.replicas > 1:
        from llava.serve.cluster import run_replicas

        run_replicas(parsed, read_options(Limits, parsed), keys)
        return 0
    service = open_service(parsed)
    from llava.serve.app import make_app
    from llava.serve.server import Server

    def announce(address: str) -> None:
        log(f"{service.detector.system.name} answers on {address}")

    server = Server(make_app(service, keys), service, parsed.host, parsed.port, announce)
    server.run(sockets=[server.listen()])
    return 0
