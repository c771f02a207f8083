"""Fetches one image from the web, within limits, and never from inside the user's network. Imports no torch.

Names are looked up once, and the connection goes to the very address that was checked, so that a name server that
answers differently the second time (DNS rebinding) gains nothing. Proxies and cookies are not used.
"""

import http.client
import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit, urlunsplit

from llava.errors import ImageReadError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_CHUNK = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
_BINARY = ("application/octet-stream", "binary/octet-stream", "")
_HEADERS = {
    "Accept": "image/*",
    "Accept-Encoding": "identity",
    "Connection": "close",
    "User-Agent": "fakereasoning",
}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, also where it holds another one (IPv4 in IPv6, tunnels)."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64 or address.ipv4_mapped:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        tunnelled = address.sixtofour or (address.teredo[1] if address.teredo else None)
        if tunnelled is not None and not is_public(tunnelled):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


@dataclass(frozen=True)
class Limits:
    """What is fetched at most.

    Attributes:
        size: Bytes.
        seconds: Time for all of it: names, redirects, content.
        redirects: How many are followed.
        allows: Whether an address may be connected to.
    """

    size: int = 64 << 20
    seconds: float = 30.0
    redirects: int = 5
    allows: Callable[[Address], bool] = is_public


def fetch_image(url: str, limits: Limits | None = None) -> bytes:
    """Returns the content of an http or https address, encoded as it is there.

    Raises:
        ImageReadError: The address is no public one, does not answer in time, or gives no image or too large a one;
            the message names it.
    """
    limits = limits or Limits()
    answers: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def fetch() -> None:
        try:
            answers.put(_follow(url, limits, time.monotonic() + limits.seconds))
        except Exception as error:
            answers.put(error)

    # In a thread of its own, since neither the search for a name nor a header sent byte by byte has a limit.
    threading.Thread(target=fetch, daemon=True).start()
    try:
        answer = answers.get(timeout=limits.seconds)
    except queue.Empty:
        answer = TimeoutError()
    if isinstance(answer, bytes):
        return answer
    if isinstance(answer, TimeoutError):
        raise ImageReadError(f"{url}: it did not answer within {limits.seconds:g} seconds")
    if isinstance(answer, ImageReadError):
        raise ImageReadError(f"{url}: {answer}") from answer.__cause__
    if isinstance(answer, OSError | http.client.HTTPException | ValueError):
        raise ImageReadError(f"{url}: it cannot be fetched: {answer or type(answer).__name__}") from answer
    raise answer


def _follow(url: str, limits: Limits, deadline: float) -> bytes:
    here = url
    for _ in range(limits.redirects + 1):
        connection, target = _connected(here, limits, deadline)
        try:
            connection.request("GET", target, headers=_HEADERS)
            response = connection.getresponse()
            if response.status not in _REDIRECTS:
                return _content(response, limits, deadline)
            there = response.headers.get("Location")
        finally:
            connection.close()
        if not there:
            raise ImageReadError("it redirects to nowhere")
        next_url = urljoin(here, there)
        if here.lower().startswith("https:") and not next_url.lower().startswith("https:"):
            raise ImageReadError(f"it redirects from https to {next_url}")
        here = next_url
    raise ImageReadError(f"it redirects more than {limits.redirects} times")


def _connected(url: str, limits: Limits, deadline: float) -> tuple[http.client.HTTPConnection, str]:
    """Returns a connection to a checked address of a URL's host, and the path to ask it for."""
    parts = urlsplit(url)
    if parts.scheme.lower() not in _PORTS or not parts.hostname:
        raise ImageReadError(f"{url} is no http or https address")
    if parts.username is not None or parts.password is not None:
        raise ImageReadError("addresses with a user or password are not fetched")
    scheme, host = parts.scheme.lower(), parts.hostname
    port = parts.port or _PORTS[scheme]
    plain = _open_socket(_checked_addresses(host, port, limits), port, deadline)
    connection = http.client.HTTPConnection(host, port)
    connection.default_port = _PORTS[scheme]  # which the header Host leaves out
    try:
        secure = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if scheme == "https" else plain
    except BaseException:
        plain.close()
        raise
    connection.sock = secure
    return connection, _target(parts)


def _target(parts: SplitResult) -> str:
    """The path and query of a URL, in ASCII."""
    text = urlunsplit(("", "", parts.path or "/", parts.query, ""))
    return "".join(
        letter if "!" <= letter <= "~" else "".join(f"%{byte:02X}" for byte in letter.encode()) for letter in text
    )


def _open_socket(addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
    """Connects to the first of some addresses that can be reached."""
    for address in addresses[:-1]:
        with suppress(OSError):
            return socket.create_connection((address, port), timeout=_left(deadline))
    return socket.create_connection((addresses[-1], port), timeout=_left(deadline))


def _checked_addresses(host: str, port: int, limits: Limits) -> list[str]:
    """Looks a name up once, and returns its addresses; all of them must be allowed."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise ImageReadError(f"there is no host {host}") from error
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not limits.allows(ipaddress.ip_address(address.partition("%")[0])):
            raise ImageReadError(f"{host} is {address}, which is no public address; such ones are never fetched")
    return addresses


def _content(response: http.client.HTTPResponse, limits: Limits, deadline: float) -> bytes:
    if response.status != 200:
        raise ImageReadError(f"the server answers {response.status} {response.reason}")
    kind = (response.headers.get("Content-Type") or "").partition(";")[0].strip().lower()
    if not kind.startswith("image/") and kind not in _BINARY:
        raise ImageReadError(f"it is {kind}, no image; give the address of the image itself")
    packing = response.headers.get("Content-Encoding", "identity").strip().lower()
    if packing not in ("identity", ""):
        raise ImageReadError(f"it comes packed as {packing}, which was not asked for")
    content = bytearray()
    announced = response.length  # by the header Content-Length, if any
    while len(content) != announced:
        if max(announced or 0, len(content)) > limits.size:
            raise ImageReadError(f"it has more than {limits.size:,} bytes")
        _left(deadline)
        chunk = response.read1(_CHUNK)
        if not chunk and announced is not None:
            raise ImageReadError(f"it broke off after {len(content):,} of {announced:,} bytes")
        if not chunk:
            break
        content += chunk
    return bytes(content)


def _left(deadline: float) -> float:
    """Seconds until a deadline.

    Raises:
        TimeoutError: It has passed.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds
