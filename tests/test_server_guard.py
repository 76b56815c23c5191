"""Who may ask a server: hosts, pages of other origins, and keys."""

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from served import all_of, chat_body, error_in, raw, serving


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),
        ("localhost", 200),
        ("[::1]:8080", 200),
        ("192.168.0.9", 200),
        ("Models.Local:8080", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("a@localhost", 403),
        ("localhost/x", 403),
        ("", 403),
        ("[::1", 403),
    ],
)
def test_the_host_is_one_that_the_server_is_called_by(host, status):
    with serving(hosts=["models.local"]) as served:
        given, _, reply = served.request("GET", "/health", headers={"Host": host})
        assert given == status
        if status == 403:
            assert reply["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize(
    ("origin", "status"),
    [(None, 200), ("same", 200), ("http://evil.example", 403), ("null", 403), ("http://127.0.0.1:1", 403)],
)
def test_pages_of_other_hosts_may_not_ask(origin, status):
    with serving() as served:
        origin = served.url if origin == "same" else origin
        headers = {} if origin is None else {"Origin": origin}
        given, answer, _ = served.request("POST", "/v1/chat/completions", chat_body(), headers)
        assert given == status
        assert "access-control-allow-origin" not in answer
        assert len(served.engine.tickets) == (status == 200)


@pytest.mark.parametrize(
    "lines",
    [
        "Origin: http://[::1",
        "Origin: chrome-extension://127.0.0.1",
        "Origin: http://page.example\r\nOrigin: http://127.0.0.1",
        "Origin: http://127.0.0.1\r\nOrigin: http://page.example",
        "Origin: http://127.0.0.1/../x",
        "Origin: \xe9",
        "Origin:",
    ],
)
def test_an_odd_origin_is_refused_too(lines):
    with serving() as served:
        head = f"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{lines}\r\n\r\n"
        assert error_in(all_of(raw(served, head.encode("latin-1")))) == (403, "origin_not_allowed")


def test_a_key_that_is_given_twice_is_none():
    with serving(key="key") as served:
        lines = "Authorization: Bearer wrong\r\nAuthorization: Bearer key\r\n"
        head = f"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{lines}\r\n"
        assert error_in(all_of(raw(served, head.encode()))) == (401, "invalid_api_key")


def test_pages_that_are_named_may_ask():
    with serving(origins=["https://page.example"], key="k") as served:
        headers = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        headers |= {"Access-Control-Request-Headers": "authorization", "Access-Control-Request-Private-Network": "true"}
        status, answer, _ = served.request("OPTIONS", "/v1/chat/completions", headers=headers)
        assert status == 204
        assert answer["access-control-allow-origin"] == "https://page.example"
        assert answer["access-control-allow-headers"] == "authorization"
        assert answer["access-control-allow-private-network"] == "true"
        given = {"Origin": "https://page.example", "Authorization": "Bearer k"}
        status, answer, _ = served.request("GET", "/v1/models", headers=given)
        assert (status, answer["access-control-allow-origin"]) == (200, "https://page.example")
        given["Authorization"] = "Bearer wrong"
        status, answer, _ = served.request("GET", "/v1/models", headers=given)
        assert (status, answer["access-control-allow-origin"]) == (401, "https://page.example")


@pytest.mark.parametrize("given", [None, "Bearer", "Bearer wrong", "Basic key", "key", "Bearer kéy", "Bearer keykey"])
def test_without_the_key_nothing_is_told_but_whether_the_engine_lives(given):
    with serving(key="key") as served:
        headers = {} if given is None else {"Authorization": given.encode("latin-1")}
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("GET", "/x"),
        ):
            status, answer, reply = served.request(method, path, headers=headers)
            assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
            assert answer["www-authenticate"] == "Bearer"
        assert served.request("GET", "/health", headers=headers)[0] == 200
        assert served.request("GET", "/v1/models", headers={"Authorization": "bearer key"})[0] == 200
