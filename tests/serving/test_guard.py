"""Keys and addresses, over real HTTP, in front of an engine that must not be asked."""

import hashlib
import socket
import threading

import httpx
import openai
import psutil
import pytest
import uvicorn

from raymoe.config import ConfigError, ServeConfig, parse_config
from raymoe.serving.answers import Answering
from raymoe.serving.gateway import reconfigured
from raymoe.serving.grpc_service import check_peer
from raymoe.serving.guard import check_admin, check_key
from raymoe.serving.openai_api import ApiError
from raymoe.serving.routes import create_api


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class NoEngine:
    async def status(self, history=False):
        return [{"is_alive": True}]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ServeConfig:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text("{}")
    return ServeConfig(model=path, name="m", api_keys=(sha256("user"),), admin_keys=(sha256("boss"),))


@pytest.fixture(scope="module")
def answering(config, tokenizer) -> Answering:
    return Answering(config, tokenizer, NoEngine())


@pytest.fixture(scope="module")
def port(answering):
    """A server that listens at all addresses, as Serve does without `http_options.host`."""
    server = uvicorn.Server(uvicorn.Config(create_api(answering), log_level="error"))
    with socket.create_server(("0.0.0.0", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


def test_openais_client_is_told_in_its_own_words(port):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key") as error:
        client.models.list()
    assert error.value.code == "invalid_api_key"
    for key in ("user", "boss"):
        assert [model.id for model in client.with_options(api_key=key).models.list()] == ["m"]


def test_paths_that_need_a_key(port):
    base = f"http://127.0.0.1:{port}"
    for path in ("/health", "/", "/page.js", "/page.css"):
        assert httpx.get(base + path).status_code == 200
    for path in ("/v1/models", "/v1/raymoe/status", "/metrics", "/openapi.json", "/nothing"):
        answer = httpx.get(base + path)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
        assert "didn't provide an API key" in answer.json()["error"]["message"]


def test_only_the_address_that_was_opened_is_served(port, answering, config, monkeypatch):
    addresses = [
        one.address for found in psutil.net_if_addrs().values() for one in found if one.family == socket.AF_INET
    ]
    outside = next((address for address in addresses if not address.startswith("127.")), None)
    if outside is None:
        pytest.skip("this machine has no address but the loopback")
    url = f"http://{outside}:{port}/health"
    refused = httpx.get(url)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "address_not_served")
    for host in ("0.0.0.0", outside):
        monkeypatch.setattr(answering, "config", config.model_copy(update={"host": host}))
        assert httpx.get(url).status_code == 200


def test_other_sites_pages_may_not_ask(port):
    url = f"http://127.0.0.1:{port}/v1/models"
    for origin, status in ((f"http://127.0.0.1:{port}", 200), ("https://example.com", 403), ("null", 403)):
        headers = {"Authorization": "Bearer user", "Origin": origin}
        assert httpx.get(url, headers=headers).status_code == status
    refused = httpx.post(
        f"http://127.0.0.1:{port}/v1/raymoe/budgets", headers={"Origin": "http://127.0.0.1"}, content="{}"
    )
    assert refused.json()["error"]["code"] == "cross_origin"


def test_a_user_is_no_administrator():
    keys = (sha256("user"),), (sha256("boss"),)
    check_admin("boss", *keys)
    for key, status in (("user", 403), (None, 401), ("bos", 401)):
        with pytest.raises(ApiError) as error:
            check_admin(key, *keys)
        assert error.value.status == status
    with pytest.raises(ApiError):
        check_admin("user", keys[0], ())
    # nobody has a key: whoever reaches the server may
    check_admin(None, (), ())
    check_key("any", ())


@pytest.mark.parametrize(
    "peer", ["ipv4:127.0.0.1:50000", "ipv6:[::1]:50000", "ipv6:%5B::1%5D:50000", "unix:", "ipv6:[::ffff:127.0.0.1]:1"]
)
def test_grpc_callers_of_this_machine(peer):
    check_peer(peer, "127.0.0.1")


@pytest.mark.parametrize("peer", ["ipv4:10.0.0.7:50000", "ipv6:[2001:db8::1]:50000"])
def test_grpc_callers_from_elsewhere(peer):
    check_peer(peer, "0.0.0.0")
    with pytest.raises(ApiError, match=r"for 127\.0\.0\.1 only"):
        check_peer(peer, "127.0.0.1")


def test_keys_are_given_as_hashes(config):
    with pytest.raises(ConfigError, match=r"api_keys"):
        parse_config(ServeConfig, {"model": str(config.model), "api_keys": ["secret"]})


def test_limits_and_keys_change_live(config):
    changed = reconfigured(config, {"max_tokens": 7, "api_keys": []})
    assert (changed.max_tokens, changed.api_keys, changed.admin_keys) == (7, (), config.admin_keys)
    with pytest.raises(ValueError, match="unknown key 'engines'"):
        reconfigured(config, {"engines": 2})
    with pytest.raises(ValueError, match="max_tokens"):
        reconfigured(config, {"max_tokens": 0})
