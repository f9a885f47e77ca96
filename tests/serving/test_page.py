"""The page in a real browser, in front of a real engine: `pytest -m browser`, which needs chromium."""

import asyncio
import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import aiohttp
import pytest
import uvicorn

from raymoe.config import ServeConfig
from raymoe.inference import InferenceEngine
from raymoe.inference.text import decoder
from raymoe.serving.answers import Answering
from raymoe.serving.routes import create_api
from tests.serving.test_generation import LocalEngine

pytestmark = pytest.mark.browser

PATIENCE_S = 60
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One tab, spoken to by Chrome's DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket = socket
        self._last_id = 0
        self.requested: list[str] = []
        self.errors: list[str] = []

    async def call(self, method: str, **params):
        self._last_id += 1
        await self._socket.send_json({"id": self._last_id, "method": method, "params": params})
        while True:
            told = json.loads((await self._socket.receive(timeout=PATIENCE_S)).data)
            if told.get("method") == "Network.requestWillBeSent":
                self.requested.append(told["params"]["request"]["url"])
            if told.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(told["params"]))
            if told.get("id") == self._last_id:
                assert "error" not in told, told
                return told["result"]

    async def run(self, script: str):
        found = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not await self.run(script):
                await asyncio.sleep(0.1)

    async def shot(self, width: int, height: int) -> bytes:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        await asyncio.sleep(0.3)
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])


async def browse(url: str, session: aiohttp.ClientSession, profile: str) -> Browser:
    """A browser whose tab shows `url`."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    told = Path(profile) / "DevToolsActivePort"
    async with asyncio.timeout(PATIENCE_S):
        while not (told.exists() and told.read_text().count("\n")):
            assert process.poll() is None, "the browser has ended"
            await asyncio.sleep(0.1)
        port = told.read_text().splitlines()[0]
        while not (tabs := [tab for tab in await targets(session, port) if tab["type"] == "page"]):
            await asyncio.sleep(0.1)
    browser = Browser(await session.ws_connect(tabs[0]["webSocketDebuggerUrl"], max_msg_size=0))
    browser.process = process
    for domain in ("Page", "Network", "Runtime", "Log"):
        await browser.call(f"{domain}.enable")
    await browser.call("Page.navigate", url=url)
    return browser


async def targets(session: aiohttp.ClientSession, port: str) -> list[dict]:
    async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
        return await answer.json()


class OneEngine(LocalEngine):
    async def set_budgets(self, budgets):
        assert self.reconfigure(budgets) is None


def test_the_page_streams_shows_and_sets(model_path, tokenizer):
    if CHROMIUM is None:
        pytest.fail("no chromium here: apt-get install chromium")
    engine = InferenceEngine(
        model_path, expert_memory="40%", max_batch_tokens=64, kv_tokens=2048, predictors=(), decode=decoder(tokenizer)
    )
    config = ServeConfig(model=model_path, max_tokens=200)
    server = uvicorn.Server(
        uvicorn.Config(create_api(Answering(config, tokenizer, OneEngine(engine))), port=0, log_level="error")
    )

    async def use() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            async with aiohttp.ClientSession() as session:
                browser = await browse(f"{url}/", session, profile)
                try:
                    await look_around(browser, engine)
                finally:
                    browser.process.kill()
                    browser.process.wait()
        assert not browser.errors, browser.errors
        assert {request[: len(url)] for request in browser.requested if request.startswith("http")} == {url}
        server.should_exit = True
        await serving

    with engine:
        asyncio.run(use())


async def look_around(browser: Browser, engine: InferenceEngine) -> None:
    await browser.until("document.getElementById('model')?.textContent === 'tiny'")
    await browser.run(
        "document.getElementById('prompt').value = 'def double(x):';"
        "document.getElementById('max-tokens').value = 48; document.getElementById('seed').value = 3;"
        "document.getElementById('send').click()"
    )
    await browser.until("document.getElementById('usage').textContent.includes('48 written')")
    assert await browser.run("document.querySelectorAll('#said button').length") == 48
    # the first token whose experts were not all in memory
    await browser.run(
        "[...document.querySelectorAll('#said button')].find((one) => !one.title.startsWith('0 ')).click()"
    )
    layers = await browser.run(
        "[...document.querySelectorAll('#route div')].map((row) => row.querySelectorAll('.cell').length)"
    )
    assert len(layers) == engine.stats()["moe_layers"]
    assert all(layers)
    assert await browser.run("document.querySelectorAll('#route .fetched').length") > 0

    await browser.until("document.getElementById('load').width > 1")
    await browser.until("document.querySelector('#throughput polyline').getAttribute('points').split(' ').length > 2")
    await browser.until("document.querySelector('#hits polyline')?.getAttribute('points')")
    assert await browser.run("document.querySelectorAll('#engines tr').length") == 2

    folder = os.environ.get("RAYMOE_SCREENSHOTS")
    wide, phone = await browser.shot(1280, 900), await browser.shot(390, 844)
    assert not await browser.run("document.documentElement.scrollWidth > document.documentElement.clientWidth"), "phone"
    if folder is not None:
        (Path(folder) / "page.png").write_bytes(wide)
        (Path(folder) / "page_phone.png").write_bytes(phone)

    slots = engine.stats()["slots"]
    await browser.run(
        "document.getElementById('experts').value = 25; document.getElementById('kv').value = 1024;"
        "document.getElementById('budgets').requestSubmit()"
    )
    await browser.until("document.getElementById('budgets-said').textContent === 'set'")
    assert engine.stats()["slots"] < slots
    assert engine.stats()["kv_tokens"] == 1024
