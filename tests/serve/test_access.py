"""Who may ask: keys, names of hosts, pages of other sites; and what one key never learns of another."""

import base64

import pytest

KEYS = {"MAESTRALE_API_KEY": "first-key second-key"}


def test_every_route_but_two_wants_a_key(start):
    server = start(env=KEYS)
    for path in ("/health", "/ready"):
        assert server.get(path).status == 200
    for path in (
        "/",
        "/v1/models",
        "/metrics",
        "/version",
        "/openapi.json",
        "/nothing",
        "//health",
        "/health/",
        "/HEALTH",
    ):
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Bearer"},
            {"authorization": "first-key"},
        ):
            answer = server.get(path, headers | {"host": "evil.example"})
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key"), path
            assert "Basic realm" in answer.headers["www-authenticate"]  # a browser asks for the key
    for key in ("first-key", "second-key"):
        assert server.get("/v1/models", {"authorization": f"Bearer {key}"}).status == 200
        basic = base64.b64encode(f"me:{key}".encode()).decode()
        assert server.get("/v1/models", {"authorization": f"Basic {basic}"}).status == 200
    raw = server.get("/%68ealth")  # the path as it came, not as it reads
    assert raw.status == 401
    assert server.get("/v1/models", {"authorization": "Basic !"}).status == 401


def test_what_one_key_has_computed_is_not_found_by_another(start):
    server = start(env=KEYS)
    first, second = ({"authorization": f"Bearer {key}"} for key in ("first-key", "second-key"))

    def found(headers) -> float:
        def count() -> float:
            for line in server.get("/metrics", headers).content.decode().splitlines():
                if line.startswith("maestrale_prefix_tokens_found_total "):
                    return float(line.split()[1])
            raise AssertionError("no such metric")

        before = count()
        body = {"prompt": "x" * 400, "max_tokens": 2, "temperature": 0}
        usage = server.post("/v1/completions", body, headers).json["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": count() - before}
        return count() - before

    assert found(first) == 0
    assert found(second) == 0
    assert found(first) >= 384
    assert found(second) >= 384


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8", "LOCALHOST:99"])
def test_loopback_names_are_served(bytes_server, host):
    assert bytes_server.get("/version", {"host": host}).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io:80", "", "[::2]", "127.0.0.1:80@x", "[::1", "::1"],
)
def test_another_name_is_refused_on_loopback(bytes_server, host):
    """A page of another site whose name resolves to 127.0.0.1 must not reach us."""
    for path in ("/version", "/", "/v1/models", "//ready", "/health/"):
        answer = bytes_server.get(path, {"host": host})
        assert (answer.status, answer.error["code"]) == (403, "unknown_host"), path


def test_a_probe_may_name_any_address(start):
    """An orchestrator asks a pod by its address, a container itself by loopback's, whatever names are served."""
    server = start("--allowed-host", "api.example")
    for host in ("10.1.2.3:8000", "127.0.0.1:8000", "api.example"):
        for path in ("/health", "/ready"):
            assert server.get(path, {"host": host}).status == 200
    assert server.get("/version", {"host": "10.1.2.3:8000"}).status == 403
    assert server.get("/version", {"host": "api.example"}).status == 200


def test_cors_only_where_it_is_asked_for(bytes_server, start):
    ask = {"origin": "https://site.example"}
    assert "access-control-allow-origin" not in bytes_server.get("/v1/models", ask).headers
    open_to_one = start("--cors-origin", "https://site.example", "--allowed-host", "127.0.0.1")
    assert open_to_one.get("/v1/models", ask).headers["access-control-allow-origin"] == "https://site.example"
    others = open_to_one.get("/v1/models", {"origin": "https://other.example"})
    assert "access-control-allow-origin" not in others.headers
