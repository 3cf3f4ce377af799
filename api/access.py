"""Who may call: Host allow-list, API keys, CORS. Deny by default, decided on the resolved route and never on a URL.

Keys are kept as SHA-256 digests; a presented key is hashed and compared with every one in constant time. What leaves
this module towards the engine is a digest (for quotas) and a salt (for the prefix cache), never a key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from aiohttp import web

from api.errors import ApiError
from config.checks import is_loopback
from config.schema import Config

PUBLIC = frozenset({  # canonical routes that need no key; the page at / is the same for every server and holds no data
    "/", "/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready",
})  # fmt: skip
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
EXPOSED = "X-Request-Id, Retry-After"
PREFLIGHT_AGE_S = 600


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request: "" without keys, else the hexadecimal digest of the key."""

    key: str = ""


class Access:
    def __init__(self, config: Config) -> None:
        server = config.server
        self._digests = [hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() for key in server.api_keys]
        self._share = config.cache.share_across_keys
        self._salt_key = secrets.token_bytes(32)
        self._origins = frozenset(origin.rstrip("/").lower() for origin in server.allow_origins)
        self._credentials = server.allow_credentials
        self._methods = ", ".join(server.allow_methods)
        self._headers = ", ".join(server.allow_headers)
        self._hosts = frozenset(host.strip("[]").lower() for host in server.allowed_hosts)
        if not self._hosts and is_loopback(server.server_name):
            self._hosts = LOOPBACK_NAMES | {server.server_name.strip("[]").lower()}

    def check_host(self, request: web.BaseRequest) -> None:
        """One well-formed Host that is allowed; 421 otherwise (DNS rebinding ends here)."""
        hosts = request.headers.getall("Host", [])
        if request.version == (1, 0) and not hosts and not self._hosts:
            return
        match = HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None:
            raise ApiError(400, "The request needs exactly one Host header with a host name.", headers={"Connection": "close"})
        if self._hosts and match[1].strip("[]").lower() not in self._hosts:
            message = "This server does not answer for that Host; add it to server.allowed_hosts."
            raise ApiError(421, message, code="misdirected_request")

    def check_key(self, request: web.Request, route: str) -> Caller:
        """The caller, or 401. `route` is the canonical path of the route that was resolved."""
        if not self._digests or route in PUBLIC:
            return Caller()
        scheme, key = _credential(request)
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        known = 0
        for expected in self._digests:  # every key is compared, whichever matches
            known |= hmac.compare_digest(digest, expected)
        if not known or scheme.lower() != "bearer":
            message = "Incorrect API key; send 'Authorization: Bearer <key>' (or 'x-api-key: <key>')."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return Caller(digest.hex())

    def salt(self, caller: Caller, cache_salt: str) -> bytes:
        """Of the prefix cache: callers with different keys share nothing unless cache.share_across_keys."""
        key = "" if self._share else caller.key
        if not key and not cache_salt:
            return b""
        message = f"{len(key)}:{key}{cache_salt}".encode("utf-8", "surrogatepass")
        return hmac.digest(self._salt_key, message, "sha256")

    def check_origin(self, request: web.BaseRequest) -> None:
        """For what a browser would send without asking first (no JSON body): 403 to pages of other origins."""
        origin = request.headers.get("Origin", "").lower()
        own = request.headers.get("Host", "").lower()
        if origin and origin.partition("://")[2] != own and not self.cors_headers(request):
            message = "Pages of this origin may not do that; add it to server.allow_origins."
            raise ApiError(403, message, code="origin_not_allowed")

    def preflight(self, request: web.BaseRequest) -> web.Response | None:
        """The answer to a CORS preflight from an allowed origin, else None."""
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        headers = self.cors_headers(request)
        if not headers:
            return None
        wanted = request.headers.get("Access-Control-Request-Headers", "")
        headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE" if self._methods == "*" else self._methods
        headers["Access-Control-Allow-Headers"] = wanted if self._headers == "*" else self._headers
        headers["Access-Control-Max-Age"] = str(PREFLIGHT_AGE_S)
        return web.Response(status=204, headers=headers)

    def cors_headers(self, request: web.BaseRequest) -> dict[str, str]:
        """What a response to this request carries: nothing for origins that are not configured."""
        origin = request.headers.get("Origin", "")
        if not origin or not self._origins:
            return {}
        if "*" in self._origins:
            return {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": EXPOSED}
        if origin.lower() not in self._origins:
            return {}
        headers = {"Access-Control-Allow-Origin": origin, "Vary": "Origin", "Access-Control-Expose-Headers": EXPOSED}
        if self._credentials:
            headers["Access-Control-Allow-Credentials"] = "true"
        return headers


def _credential(request: web.BaseRequest) -> tuple[str, str]:
    """(scheme, key): of Authorization, or where there is none of x-api-key, which is Anthropic's."""
    values = request.headers.getall("Authorization", [])
    if not values:
        keys = request.headers.getall("x-api-key", [])
        return ("bearer", keys[0]) if len(keys) == 1 else ("", "")
    scheme, _, key = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    return scheme, key


def request_id(request: web.BaseRequest) -> str:
    """The caller's own X-Request-Id where it is harmless, else a new one."""
    given = request.headers.get("X-Request-Id", "")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
