"""The folder is the registry: a file added is a kind added, and a wrong name is answered with a guess."""

from __future__ import annotations

import importlib
import sys

import pytest

import ulm
from ulm import registry
from ulm.errors import ConfigError, UnknownKindError

A_KIND = '''"""Made for a test."""
from ulm.registry import KindConfig, register
class Config(KindConfig):
    """Nothing."""
    eps: float = 0.5
@register("norm", Config)
class {name}:
    """Nothing."""
'''


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """An empty package that stands in for the folder of the slot `norm`."""
    package = tmp_path / "zoo_of_norms"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.PACKAGES, "norm", package.name)
    yield package
    for name in [name for name in sys.modules if name.startswith(package.name)]:
        del sys.modules[name]


def add(package, file, text):
    (package / f"{file}.py").write_text(text, encoding="utf-8")
    importlib.invalidate_caches()


def test_a_file_added_to_the_folder_is_a_kind(zoo):
    assert registry.kinds("norm") == []
    add(zoo, "softnorm", A_KIND.format(name="SoftNorm"))
    add(zoo, "hardnorm", A_KIND.format(name="HardNorm"))
    assert registry.kinds("norm") == ["hardnorm", "softnorm"]
    assert registry.find("norm", "softnorm").__name__ == "SoftNorm"
    assert registry.configure("norm", {"kind": "softnorm"}).eps == 0.5


def test_private_files_and_files_without_a_registered_class_are_no_kinds(zoo):
    add(zoo, "_shared", A_KIND.format(name="Shared"))
    add(zoo, "constants", "EPS = 1e-6\n")
    assert registry.kinds("norm") == []
    for name in ("_shared", "constants"):
        with pytest.raises(UnknownKindError, match=rf"^norm\.kind: no kind '{name}'"):
            registry.find("norm", name)


def test_a_class_imported_from_another_file_is_not_this_files_kind(zoo):
    add(zoo, "softnorm", A_KIND.format(name="SoftNorm"))
    add(zoo, "user", "from zoo_of_norms.softnorm import SoftNorm\n")
    assert registry.kinds("norm") == ["softnorm"]


def test_a_kind_outside_the_tree_is_named_by_module_and_class(zoo):
    add(zoo, "softnorm", A_KIND.format(name="SoftNorm"))
    assert registry.find("norm", "zoo_of_norms.softnorm:SoftNorm").__name__ == "SoftNorm"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("no_such_module:Norm", "no module 'no_such_module'"),
        ("collections:Norm", "no class 'Norm' in 'collections'"),
        ("collections:OrderedDict", "'OrderedDict' is not registered as a kind of norm"),
    ],
)
def test_a_wrong_name_outside_the_tree_is_a_config_error(kind, text):
    with pytest.raises(UnknownKindError) as caught:
        registry.find("norm", kind)
    assert str(caught.value).startswith(f"norm.kind: {text}")


@pytest.mark.parametrize("kind", ["rmsnrom", "../secrets", "os.path", "", "__init__"])
def test_a_name_that_is_no_kind_is_answered_with_what_there_is(kind):
    with pytest.raises(UnknownKindError, match="rmsnorm") as caught:
        registry.find("norm", kind)
    assert str(caught.value).startswith(f"norm.kind: no kind {kind!r} (")


def test_an_unknown_slot_is_guessed():
    with pytest.raises(UnknownKindError, match=r"^slot: no slot 'atention' \(did you mean 'attention'\?\)$"):
        ulm.kinds("atention")


def test_a_config_is_made_from_a_name_a_mapping_or_itself():
    config = registry.configure("norm", {"kind": "rmsnorm", "eps": 1e-5})
    assert registry.configure("norm", config) is config
    assert registry.configure("norm", "rmsnorm").eps == 1e-6
    with pytest.raises(ConfigError, match=r"^norm\.eps: 'small': Input should be a valid number"):
        registry.configure("norm", {"kind": "rmsnorm", "eps": "small"})
