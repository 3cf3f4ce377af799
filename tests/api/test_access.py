"""Who may call: keys, Host, CORS, the prefix-cache salt (cases E2, E3, E4, E9)."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from aiohttp import web

from api.access import PUBLIC as PUBLIC_ROUTES
from api.access import Access, Caller
from api.app import add_routes
from tests.api.harness import Running, mock_config, receive_all, serving

KEY, OTHER = "sk-first-key", "sk-second-key"
ORIGIN = "https://app.example"
PATHS = [
    ("GET", "/v1/models"), ("GET", "/v1/models/mock"), ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/tokenize"),
    ("POST", "/detokenize"), ("GET", "/metrics"), ("GET", "/version"), ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/nowhere"),
    ("GET", "/health/x"), ("GET", "/health/"), ("GET", "/health/%2e%2e/v1/models"), ("GET", "//health"), ("POST", "/health"),
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    knobs = {"api_keys": (KEY, OTHER), "allow_origins": (ORIGIN,), "allowed_hosts": ("127.0.0.1", "model.example")}
    with serving(mock_config(server=knobs)) as running:
        yield running
        running.settled()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_everything_but_health_needs_a_key(server: Running, method: str, path: str) -> None:
    status, headers, data = server.request(method, path)
    assert status == 401, data
    assert headers["www-authenticate"] == "Bearer"
    assert json.loads(data)["error"]["code"] == "invalid_api_key"
    assert server.request(method, path, headers=bearer(KEY))[0] != 401


def test_every_route_of_the_application_needs_a_key(server: Running) -> None:
    """Also the next one that somebody adds."""
    router = web.UrlDispatcher()
    add_routes(router)
    for route in router.routes():
        path = route.resource.canonical if route.resource is not None else ""
        if route.method in ("GET", "POST", "DELETE") and path not in PUBLIC_ROUTES:
            assert (
                server.request(route.method, path.replace("{", "").replace("}", ""), b"{}" if route.method == "POST" else None)[0] == 401
            ), path


def test_health_needs_none(server: Running) -> None:
    assert {"/", "/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"} == PUBLIC_ROUTES
    for path in PUBLIC_ROUTES:
        assert server.request("GET", path)[0] == 200


def test_each_key_is_accepted(server: Running) -> None:
    for key in (KEY, OTHER):
        assert server.request("GET", "/v1/models", headers=bearer(key))[0] == 200
        assert server.request("GET", "/v1/models", headers={"authorization": f"bearer  {key} "})[0] == 200


@pytest.mark.parametrize(
    "value",
    [
        b"", b"Bearer", b"Bearer ", b"Basic c2s6", b"Bearer sk-first-ke", b"Bearer sk-first-keyy", b"Bearer SK-FIRST-KEY",
        b"Bearer \xff\xfe", "Bearer ключ".encode(), b"Bearer " + b"a" * 8000, b"sk-first-key", b"Bearer sk-first-key sk-second-key",
    ],
)  # fmt: skip
def test_wrong_keys_are_401_never_500(server: Running, value: bytes) -> None:
    with server.connect() as raw:
        raw.sendall(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nAuthorization: " + value + b"\r\n\r\n")
        assert receive_all(raw).startswith(b"HTTP/1.1 401")


def test_two_authorization_headers_are_refused(server: Running) -> None:
    line = f"Authorization: Bearer {KEY}\r\n".encode()
    with server.connect() as raw:
        raw.sendall(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n" + line * 2 + b"\r\n")
        assert receive_all(raw)[9:12] in (b"400", b"401")


@pytest.mark.parametrize("host", ["attacker.test", "localhost", "127.0.0.1.attacker.test", "evil@127.0.0.1", "[::1]"])
def test_hosts_that_are_not_listed(server: Running, host: str) -> None:
    status, _, data = server.request("GET", "/health", headers={"Host": host})
    assert status in (400, 421), data


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:1", "model.example", "MODEL.example:23333"])
def test_hosts_that_are(server: Running, host: str) -> None:
    assert server.request("GET", "/health", headers={"Host": host})[0] == 200


def test_a_loopback_bind_answers_loopback_names_only() -> None:
    with serving(mock_config()) as open_server:
        for host, expected in (("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("rebind.attacker.test", 421)):
            assert open_server.request("GET", "/version", headers={"Host": host})[0] == expected
        _, headers, _ = open_server.request("GET", "/version", headers={"Origin": ORIGIN})
        assert not [name for name in headers if name.startswith("access-control")]
        preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
        assert open_server.request("OPTIONS", "/v1/completions", headers=preflight)[0] == 405


def test_cors_for_a_listed_origin(server: Running) -> None:
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    status, headers, _ = server.request("OPTIONS", "/v1/completions", headers=preflight)
    assert status == 204
    assert headers["access-control-allow-origin"] == ORIGIN
    assert headers["access-control-allow-headers"] == "authorization"
    assert "access-control-allow-credentials" not in headers
    for key in (KEY, "wrong"):  # errors carry the headers too, or a browser could not read them
        _, headers, _ = server.request("GET", "/v1/models", headers={"Origin": ORIGIN, **bearer(key)})
        assert headers["access-control-allow-origin"] == ORIGIN and headers["vary"] == "Origin"


def test_cors_for_another_origin(server: Running) -> None:
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    status, headers, _ = server.request("OPTIONS", "/v1/completions", headers=preflight)
    assert status == 401 and "access-control-allow-origin" not in headers
    _, headers, _ = server.request("GET", "/v1/models", headers={"Origin": "https://evil.example", **bearer(KEY)})
    assert "access-control-allow-origin" not in headers


def test_streams_carry_cors_and_the_request_id(server: Running) -> None:
    sent = {"Origin": ORIGIN, "X-Request-Id": "my-id", **bearer(KEY)}
    _, headers, _ = server.request("POST", "/v1/completions", {"prompt": "hi", "max_tokens": 2, "stream": True}, sent)
    assert headers["access-control-allow-origin"] == ORIGIN and headers["x-request-id"] == "my-id"


def test_keys_do_not_share_cached_prefixes(server: Running) -> None:
    prompt = "a prefix that is longer than a few blocks of sixteen positions, said once and then again"

    def cached(key: str, **fields: str) -> int:
        _, _, data = server.request("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 1, **fields}, bearer(key))
        return json.loads(data)["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(KEY) == 0
    assert cached(KEY) > 0
    assert cached(OTHER) == 0
    assert cached(OTHER) > 0
    assert cached(KEY, cache_salt="x") == 0
    assert cached(KEY, cache_salt="x") > 0


def test_salts() -> None:
    private, shared = Access(mock_config()), Access(mock_config(cache={"share_across_keys": True}))
    one, two = Caller("aa"), Caller("ab")
    assert private.salt(Caller(), "") == b""
    assert (
        len({private.salt(one, ""), private.salt(two, ""), private.salt(one, "s"), private.salt(two, "s"), private.salt(Caller(), "s")})
        == 5
    )
    assert private.salt(Caller("a"), "as") != private.salt(Caller("aa"), "s")
    assert shared.salt(one, "") == shared.salt(two, "") == b""
    assert shared.salt(one, "s") == shared.salt(two, "s") != b""
    assert private.salt(one, "") != Access(mock_config()).salt(one, "")  # of this process only


def test_the_key_is_in_no_log_and_no_metric(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        server.request("POST", "/v1/completions", {"prompt": "hi", "max_tokens": 1}, bearer(KEY))
        server.request("GET", "/v1/models", headers=bearer("sk-wrong-key"))
        _, _, metrics = server.request("GET", "/metrics", headers=bearer(KEY))
    for text in (caplog.text, metrics.decode()):
        assert KEY not in text and "sk-wrong-key" not in text


def test_anthropics_header_is_as_good(server: Running) -> None:
    assert server.request("GET", "/v1/models", headers={"x-api-key": KEY})[0] == 200
    assert server.request("GET", "/v1/models", headers={"x-api-key": "wrong"})[0] == 401
    assert server.request("GET", "/v1/models", headers={"x-api-key": KEY, **bearer("wrong")})[0] == 401  # Authorization decides


def test_a_wrong_key_is_refused_in_each_protocols_shape(server: Running) -> None:
    shapes = {"/v1/completions": {"error"}, "/v1/messages": {"type", "error"}, "/v2/models/mock/infer": {"error"}}
    for path, keys in shapes.items():
        status, body = server.post(path, {})
        assert status == 401 and set(body) == keys
    assert server.post("/v1/messages", {})[1]["error"]["type"] == "authentication_error"
    assert isinstance(server.post("/v2/models/mock/infer", {})[1]["error"], str)
