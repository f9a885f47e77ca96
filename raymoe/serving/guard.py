"""Who may ask: the address that a request arrived at, the page that sent it, and its key."""

import hashlib
import hmac
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from raymoe.serving.answers import Answering
from raymoe.serving.openai_api import ApiError

PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
"""The page: path -> (file, its type). It asks for what it shows, with the key that its reader gives it."""

OPEN_PATHS = frozenset({"/health", *PAGE_FILES})
"""Need no key."""

ADMIN_PATHS = frozenset({"/v1/raymoe/budgets"})
"""Need an administrator's."""


class Guard:
    """ASGI middleware in front of all routes; the rules are those of the configuration at the time."""

    def __init__(self, app: ASGIApp, answering: Answering):
        self._app = app
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            config = self._answering.config
            try:
                headers = Headers(scope=scope)
                check_address(scope["server"] and scope["server"][0], config.host)
                check_origin(headers)
                if scope["path"] in ADMIN_PATHS:
                    check_admin(bearer(headers), config.api_keys, config.admin_keys)
                elif scope["path"] not in OPEN_PATHS:
                    check_key(bearer(headers), config.api_keys + config.admin_keys)
            except ApiError as error:
                await JSONResponse(error.body, status_code=error.status, headers=error.headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def check_address(arrived_at: str | None, host: str) -> None:
    """Refuses what came to an address that nobody opened: a Serve YAML without `http_options.host` listens at all of them.

    Raises: ApiError.
    """
    if arrived_at is None or host in ("0.0.0.0", "::") or arrived_at == host or _is_loopback(arrived_at):
        return
    raise ApiError(
        f"this server is for {host} only; to let it answer at {arrived_at}, set host in the application's arguments "
        "(0.0.0.0 for all addresses)",
        status=403,
        code="address_not_served",
    )


def check_origin(headers: Headers) -> None:
    """Refuses what a browser sends for another site's page: on a machine that serves itself without keys, any page it visits could.

    Raises: ApiError.
    """
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        raise ApiError(f"pages of {origin} may not ask this server", status=403, code="cross_origin")


def bearer(headers: Headers | dict[str, str]) -> str | None:
    """The key of an `Authorization` header."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() or None if kind.lower() == "bearer" else None


def check_key(key: str | None, hashes: tuple[str, ...]) -> None:
    """Raises: ApiError, if there are keys and this is none of them; it takes as long for each."""
    if not hashes or (key is not None and _is_one_of(key, hashes)):
        return
    message = (
        "Incorrect API key provided."
        if key
        else "You didn't provide an API key: send it as 'Authorization: Bearer KEY'."
    )
    code = "invalid_api_key" if key else None
    raise ApiError(message, status=401, code=code, headers={"WWW-Authenticate": "Bearer"})


def check_admin(key: str | None, api_keys: tuple[str, ...], admin_keys: tuple[str, ...]) -> None:
    """Raises: ApiError: 401 for a stranger, 403 for a user."""
    check_key(key, api_keys + admin_keys)
    if (api_keys or admin_keys) and not (key is not None and _is_one_of(key, admin_keys)):
        raise ApiError("this needs one of the server's admin_keys", status=403, code="insufficient_permissions")


def _is_one_of(key: str, hashes: tuple[str, ...]) -> bool:
    found = hashlib.sha256(key.encode()).hexdigest()
    # all of them, whichever it is
    return sum([hmac.compare_digest(found, known) for known in hashes]) > 0


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
