"""API keys: what they look like, what is kept of them, and `ulm keys`."""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serve.accounts import check_state
from serve.keys import hash_of, is_secret, new_key, parse
from ulm.cli import cluster
from ulm.cli.main import app
from ulm.errors import ConfigError, InvalidKeyError
from ulm.recipes.base import validate
from ulm.recipes.serve import ServeRecipe


def test_a_key_has_its_id_and_190_bits_that_are_never_the_same() -> None:
    made = [new_key() for _ in range(100)]
    assert all(re.fullmatch(r"ulm-[A-Za-z0-9]{12}-[A-Za-z0-9]{32}", key.text) for key in made)
    assert all(key.text.startswith(f"ulm-{key.id}-") for key in made)
    for part in ("id", "text", "salt", "hash"):
        assert len({getattr(key, part) for key in made}) == 100


def test_a_secret_is_known_by_its_hash_alone() -> None:
    key, other = new_key(), new_key()
    given = parse(f"Bearer {key.text}")
    assert given[0] == key.id
    assert is_secret(given[1], (key.salt, key.hash))
    assert not is_secret(given[1][:-1] + "_", (key.salt, key.hash))
    assert not is_secret(given[1], (other.salt, key.hash)), "the salt is part of it"
    assert given[1].encode() not in key.hash + key.salt
    assert not is_secret(given[1], None)


def test_nothing_that_shows_a_key_shows_its_secret() -> None:
    key = new_key()
    assert repr(key) == str(key) == f"NewKey(id={key.id!r})"


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (None, "This endpoint wants an API key"),
        ("", "This endpoint wants an API key"),
        ("Bearer", "has no key after the word Bearer"),
        ("Bearer  ", "has no key after the word Bearer"),
        ("Bearer none", "has a key that is not of this endpoint, whose keys begin with ulm-"),
        ("Bearer sk-geheim-{secret}", "has a key that is not of this endpoint"),
        ("Bearer ULM{rest}", "has a key that is not of this endpoint"),
        ('Bearer "{key}"', "has a key that is not of this endpoint"),
        ("Bearer " + "a" * 1_000_000, "has a key that is not of this endpoint"),
        ("{key}", "has a key without the word Bearer before it"),
        ("Basic {key}", "is of another kind than Bearer"),
        ("Bearer{key}", "is of another kind than Bearer"),
        ("Bearer {key}x", "was not copied as it is: it has 50 characters, and keys have 49"),
        ("Bearer ulm-{secret}", "was not copied as it is: it has 36 characters, and keys have 49"),
        ("Bearer {key} {key}", "was not copied as it is: it has 99 characters, and keys have 49"),
        ("Bearer {key}\x00", "was not copied as it is: it has 50 characters, and keys have 49"),
        ("Bearer ulm-aaaaaaaaaaaé-" + "b" * 32, "was not copied as it is: it is not of the form ulm-<id>-<secret>"),
    ],
)
def test_what_is_no_key_is_refused_with_what_is_wrong_and_no_word_of_it(header: str | None, problem: str) -> None:
    key = new_key()
    secret = key.text[-32:]
    with pytest.raises(InvalidKeyError) as error:
        parse(header and header.format(key=key.text, rest=key.text[3:], secret=secret))
    said = str(error.value)
    assert problem in said and "Authorization: Bearer ulm-…" in said and len(said) < 200
    assert not any(word in said for word in (key.id, secret, "geheim", "none", "aaaa", "bbbb"))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
def test_the_scheme_is_written_in_any_case(scheme: str) -> None:
    key = new_key()
    assert parse(f"{scheme} {key.text} ") == (key.id, key.text[-32:])


def test_an_unknown_id_takes_as_long_as_a_wrong_secret() -> None:
    key = new_key()
    kept = (key.salt, key.hash)

    def median_s(known: tuple[bytes, bytes] | None) -> float:
        times = []
        for _ in range(2_000):
            started_s = time.perf_counter()
            is_secret("a" * 32, known)
            times.append(time.perf_counter() - started_s)
        return statistics.median(times)

    ratios = sorted(median_s(None) / median_s(kept) for _ in range(5))
    assert 0.7 < ratios[2] < 1.4
    assert hash_of("a", b"") != hash_of("b", b"")


# ---- ulm keys


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["keys", *arguments])
    if code:
        assert isinstance(result.exception, ConfigError), result.exception
        return result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


LIMITS = ("--requests-per-minute", "60", "--tokens-per-minute", "5000", "--quota", "1000000")


def test_a_key_is_shown_once_and_its_secret_is_nowhere_on_disk(root: Path) -> None:
    made = run("create", "--name", "Änna", "--model", "swarm", "--model", "e00", *LIMITS, "--expires", "30d")
    secret = made["key"].rpartition("-")[2]
    (listed,) = run("list")["keys"]
    assert listed == run("show", made["id"]) == {name: value for name, value in made.items() if name != "key"}
    assert (listed["models"], listed["quota_tokens"], listed["status"]) == (["e00", "swarm"], 1_000_000, "valid")
    assert secret not in CliRunner().invoke(app, ["keys", "list"]).output
    assert not any(secret.encode() in file.read_bytes() for file in root.iterdir() if file.is_file())
    with sqlite3.connect(root / "state.db") as database:
        (salt, hash_) = database.execute("SELECT salt, hash FROM keys").fetchone()
    database.close()
    assert is_secret(secret, (salt, hash_))


def test_a_revoked_key_stays_so_and_is_still_listed(root: Path) -> None:
    key_id = run("create", "--name", "a")["id"]
    first = run("revoke", key_id)
    assert first["status"] == "revoked" and first["revoked"] is not None
    assert run("revoke", key_id) == first == run("show", key_id)


def test_an_expired_key_is_listed_as_such(root: Path) -> None:
    key_id = run("create", "--name", "a", "--expires", "1m")["id"]
    with sqlite3.connect(root / "state.db") as database:
        database.execute("UPDATE keys SET expires_s = expires_s - 61")
    database.close()
    assert run("show", key_id)["status"] == "expired"


def test_an_update_changes_what_it_names_and_nothing_else(root: Path) -> None:
    made = run("create", "--name", "a", "--model", "swarm", *LIMITS, "--expires", "30d")
    key_id, secret = made["id"], made.pop("key")[-32:]
    changed = run("update", key_id, "--name", "b", "--requests-per-minute", "5", "--scope", "admin", "--scope", "infer")
    assert changed == {**made, "name": "b", "requests_per_minute": 5, "scopes": ["infer", "admin"]}
    none = [f"--{limit}=none" for limit in ("requests-per-minute", "tokens-per-minute", "quota", "expires", "model")]
    nothing = dict.fromkeys(("requests_per_minute", "tokens_per_minute", "quota_tokens", "expires", "models"))
    assert run("update", key_id, *none) == run("show", key_id) == {**changed, **nothing}
    again = run("update", key_id, "--tokens-per-minute", "7", "--quota", "9", "--model", "e01", "--model", "e00")
    assert again == {**changed, **nothing, "tokens_per_minute": 7, "quota_tokens": 9, "models": ["e00", "e01"]}
    with sqlite3.connect(root / "state.db") as database:
        (salt, hash_) = database.execute("SELECT salt, hash FROM keys").fetchone()
    database.close()
    assert is_secret(secret, (salt, hash_)), "the key itself is the same"


def test_an_update_gives_an_expired_key_more_time_and_not_a_revoked_one(root: Path) -> None:
    key_id = run("create", "--name", "a", "--expires", "1m")["id"]
    with sqlite3.connect(root / "state.db") as database:
        database.execute("UPDATE keys SET expires_s = expires_s - 61")
    database.close()
    assert run("update", key_id, "--name", "b")["status"] == "expired"
    assert run("update", key_id, "--expires", "1h")["status"] == "valid"
    revoked = run("revoke", key_id)
    assert f"KEY_ID: {key_id} is revoked, for good (make another" in str(run("update", key_id, "--quota", "5", code=2))
    assert run("show", key_id) == revoked


def test_the_help_of_update_has_examples_that_work(root: Path) -> None:
    text = CliRunner().invoke(app, ["keys", "update", "--help"], env={"COLUMNS": "200"}).stdout
    examples = re.findall(r"ulm keys update Zx3kT0aYb91q (.+?)[ │]*\n", text)
    key_id = run("create", "--name", "a")["id"]
    assert len(examples) == 2
    for example in examples:
        assert run("update", key_id, *example.split())["id"] == key_id


def test_where_there_is_no_key_the_list_says_how_to_make_one(root: Path) -> None:
    told = CliRunner().invoke(app, ["keys", "list"])
    assert told.stderr.strip() == "no keys yet: ulm keys create --name me" and json.loads(told.stdout) == {"keys": []}
    run("create", "--name", "me")
    assert "no keys yet" not in CliRunner().invoke(app, ["keys", "list"]).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("update", "a" * 12, "--name", "b"), "KEY_ID: there is no key aaaaaaaaaaaa"),
        (("update", "a" * 12), "keys update: nothing is to be changed"),
        (("update", "a" * 12, "--quota", "0"), "--quota: '0' is no number from 1 to"),
        (("update", "a" * 12, "--quota", "1e6"), "--quota: '1e6' is no number from 1 to"),
        (("update", "a" * 12, "--tokens-per-minute", "9" * 30), "is no number from 1 to 1,099,511,627,776 (none takes"),
        (("update", "a" * 12, "--requests-per-minute", "100001"), "--requests-per-minute: '100001' is no number from"),
        (("update", "a" * 12, "--expires", "never"), "--expires: 'never' is no duration"),
        (("update", "a" * 12, "--scope", "none"), "--scope: there is no scope 'none'"),
        (("create", "--name", "a", "--scope", "root"), "--scope: there is no scope 'root' (one of infer, data, tr"),
        (("create", "--name", "a\x1b[2J"), "--name: is no name"),
        (("create", "--name", ""), "--name: is no name"),
        (("create", "--name", "a", "--expires", "tomorrow"), "--expires: 'tomorrow' is no duration"),
        (("create", "--name", "a", "--model", "x" * 201), "--model: is no name of a model"),
        (("revoke", "a" * 12), "KEY_ID: there is no key aaaaaaaaaaaa"),
        (("list", "--database", "mysql://a:geheim@b/c"), "database: is of a kind of database that is not supported"),
        (("list", "--database", "geheim"), "database: is not a database's URL"),
        (("list", "--database", "sqlite:///state.db"), "database: is SQLite without an absolute path"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(root: Path, arguments: tuple[str, ...], message: str) -> None:
    error = run(*arguments, code=2)
    assert message in str(error) and error.remedy and "geheim" not in str(error)


def test_a_whole_key_given_for_its_id_is_not_shown_again(root: Path) -> None:
    key = run("create", "--name", "a")["key"]
    assert key.rpartition("-")[2] not in str(run("revoke", key, code=2))
    assert key.rpartition("-")[2] not in str(run("update", key, "--quota", "5", code=2))


def test_keys_reads_the_database_of_the_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULM_DATABASE_URL", f"sqlite:///{root / 'elsewhere.db'}")
    run("create", "--name", "a")
    assert (root / "elsewhere.db").is_file() and not (root / "state.db").exists()


# ---- what a recipe says of keys


def recipe(**fields: Any) -> ServeRecipe:
    return validate(ServeRecipe, {"name": "x", "swarm": "demo", **fields})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org", ""])
def test_an_address_that_others_reach_needs_a_word_on_keys(host: str) -> None:
    with pytest.raises(ConfigError, match=r"keys: .* can be reached from other machines, where everybody could ask"):
        recipe(host=host)
    assert recipe(host=host, keys=True).keys and recipe(host=host, keys=False).keys is False


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machines_own_address_needs_none(host: str) -> None:
    assert recipe(host=host).keys is None and recipe(host=host).is_local


WITH_PASSWORD = (
    *("x://a:geheim@b/c", "x://:geheim@b", "x://a:geh/eim@b/c", "x://a:geheim/@b"),
    *("postgresql://b/c?password=geheim", "postgresql://b/c?pass%77ord=geheim"),
)


@pytest.mark.parametrize("name", ["database", "counters"])
@pytest.mark.parametrize("url", WITH_PASSWORD)
def test_a_password_in_a_recipe_is_refused_and_not_shown(name: str, url: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: holds a password, which recipes do not") as error:
        recipe(keys=True, **{name: url})
    assert f"set ULM_{name.upper()}_URL instead" in str(error.value) and "geheim" not in str(error.value)
    assert recipe(keys=True, database="postgresql://me@host/db").database


def test_state_without_keys_has_no_effect_and_is_refused() -> None:
    with pytest.raises(ConfigError, match="database: has no effect without keys"):
        recipe(database="sqlite:////tmp/a.db")


def test_an_endpoint_that_wants_keys_does_not_start_before_there_is_one(root: Path) -> None:
    wanted = recipe(keys=True)
    with pytest.raises(ConfigError, match=r"keys: there is none yet, .* \(make one: ulm keys create --name me"):
        check_state(wanted, root)
    key_id = run("create", "--name", "me")["id"]
    check_state(wanted, root)
    run("revoke", key_id)
    with pytest.raises(ConfigError, match="there is none yet"):
        check_state(wanted, root)


def test_counters_that_nobody_keeps_are_noticed_before_the_start(root: Path) -> None:
    run("create", "--name", "me")
    with socket.socket() as taken:  # a port that nobody listens on
        taken.bind(("127.0.0.1", 0))
        wanted = recipe(keys=True, counters=f"redis://127.0.0.1:{taken.getsockname()[1]}/0")
        with pytest.raises(ConfigError, match="counters: no Redis answers there"):
            check_state(wanted, root)


@pytest.mark.parametrize("origin", ["chat.example.org", "https://a.org/", "https://A.org", "https://a.org/chat", ""])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match=r"cors\.origins: '.*' is no origin \(such as https://chat.example.org"):
        recipe(cors={"origins": [origin]})


@pytest.mark.parametrize("origin", ["*", "null", "https://a.org", "http://localhost:5173", "chrome-extension://abc"])
def test_an_origin_that_browsers_send_is_taken(origin: str) -> None:
    assert recipe(cors={"origins": [origin]}).cors is not None


def test_a_key_for_a_model_that_is_not_served_is_made_and_told(root: Path) -> None:
    told = CliRunner().invoke(app, ["keys", "create", "--name", "a", "--model", "e0O"])
    assert "not served now" not in told.stderr, "nothing is served"
    cluster.remember(root, {"url": "http://127.0.0.1:1/v1", "pid": os.getpid(), "models": ["swarm", "e00"]})
    key_id = run("create", "--name", "b")["id"]
    for model, is_told in (("e00", False), ("e0O", True), ("none", False)):
        for verb in (["update", key_id], ["create", "--name", "a"])[: 1 + (model != "none")]:
            told = CliRunner().invoke(app, ["keys", *verb, "--model", model])
            assert told.exit_code == 0 and ("not served now: e0O" in told.stderr) == is_told
