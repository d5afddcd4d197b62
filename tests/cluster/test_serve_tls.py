"""HTTPS, keys and CORS by the command line: `ulm serve up`, asked as clients and browsers ask, `ulm serve down`."""

from __future__ import annotations

import json
import ssl
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from tests.certificates import certificate
from tests.processes import ended, nothing_is_left, start
from tests.served import free_port
from tests.small_members import small_member

ORIGIN, OTHER = "https://chat.example.org", "https://evil.example.org"


def ulm(root: Path, *arguments: str) -> dict[str, Any]:
    """The last line of stdout of a verb that succeeds."""
    code, out, err = ended(start(root, *arguments))
    assert code == 0, err
    told: dict[str, Any] = json.loads(out.splitlines()[-1])
    return told


def test_https_keys_and_cors_hold_end_to_end_by_the_command_line(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    recipe, files = tmp_path / "serve.yaml", certificate(tmp_path)
    (folder := tmp_path / "members").mkdir()
    fields = {
        "members": {"a": {"checkpoint": str(small_member(folder))}},
        "engine": {"kind": "echo"},
        "port": free_port(),
        "keys": True,
        "tls": {"certificate": Path(files["certificate"]).name, "key": Path(files["key"]).name},
        "cors": {"origins": [ORIGIN]},
    }
    recipe.write_text(yaml.safe_dump(fields))
    infer = ulm(root, "keys", "create", "--name", "anna")["key"]
    monkeypatch.setenv("ULM_API_KEY", ulm(root, "keys", "create", "--name", "ops", "--scope", "admin")["key"])
    child = start(root, "serve", "up", str(recipe))
    request.addfinalizer(child.kill)
    assert child.stdout is not None
    url = json.loads(child.stdout.readline())["url"]
    assert url == f"https://127.0.0.1:{fields['port']}/v1"

    context = ssl.create_default_context(cafile=files["certificate"])
    with httpx.Client(base_url=url, verify=context, trust_env=False, timeout=30) as browser:
        official = openai.OpenAI(base_url=url, api_key=infer, http_client=browser, max_retries=0)
        assert official.completions.create(model="a", prompt="abc", max_tokens=8).choices[0].text == "abcabcab"
        keyless = browser.get("models")
        assert (keyless.status_code, keyless.json()["error"]["code"]) == (401, "invalid_api_key")
        pages_are_told_who_may_ask(browser, infer)
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.get(f"{url}/models", trust_env=False)
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{url.replace('https', 'http')}/models", trust_env=False)

    told = ulm(root, "status", "--once")["endpoint"]
    assert (told["url"], told["problem"]) == (url, None)
    assert ulm(root, "serve", "down") == {"status": "ended", "url": url}
    assert ended(child)[0] == 0
    nothing_is_left(root)


def pages_are_told_who_may_ask(browser: httpx.Client, key: str) -> None:
    """A preflight needs no key; what a page of another origin is answered, its browser does not show it."""

    def preflight(origin: str) -> httpx.Response:
        wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        return browser.options("completions", headers={"Origin": origin, **wanted})

    allowed, refused = preflight(ORIGIN), preflight(OTHER)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
    for origin, shown in ((ORIGIN, ORIGIN), (OTHER, None)):
        for headers in ({"Authorization": f"Bearer {key}"}, {}):  # a page may read its refusal, too
            answer = browser.get("models", headers={"Origin": origin, **headers})
            assert answer.status_code == (200 if headers else 401)
            assert answer.headers.get("access-control-allow-origin") == shown
