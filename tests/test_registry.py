"""Discovery: a file in the package is all it takes, and names are told apart clearly."""

import sys

import pytest

from trivium.registry import Registry, UserError, nearest


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `plants` on the path with two modules that register one class each."""
    folder = tmp_path / "plants"
    folder.mkdir()
    (folder / "__init__.py").write_text("from trivium.registry import Registry\nPLANTS = Registry('plant', 'plants')\n")
    for name in ("fern", "moss"):
        (folder / f"{name}.py").write_text(
            f"from plants import PLANTS\n\n@PLANTS.register('{name}')\nclass {name.title()}:\n    pass\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for module in [name for name in sys.modules if name.split(".")[0] == "plants"]:
        del sys.modules[module]


def test_a_file_in_the_package_is_found_without_any_list(package):
    import plants  # pyright: ignore[reportMissingImports]

    assert plants.PLANTS.names() == ["fern", "moss"]
    assert plants.PLANTS.get("moss").kind == "moss"


def test_an_unknown_name_is_answered_with_the_nearest(package):
    import plants  # pyright: ignore[reportMissingImports]

    with pytest.raises(UserError, match=r"unknown plant 'mos'; did you mean 'moss'\? allowed: fern, moss"):
        plants.PLANTS.get("mos")


def test_a_name_taken_twice_is_an_error():
    registry = Registry("thing", "trivium.tasks")

    @registry.register("one")
    class First: ...

    with pytest.raises(ValueError, match="registered twice"):

        @registry.register("one")
        class Second: ...

    assert First.kind == "one"  # pyright: ignore[reportAttributeAccessIssue]


def test_registering_the_same_class_again_is_no_error():
    """A module that is imported under two names (as pytest and notebooks do) must not fail."""
    registry = Registry("thing", "trivium.tasks")

    def make() -> type:
        class Same: ...

        return registry.register("same")(Same)

    make()
    assert make().kind == "same"  # pyright: ignore[reportAttributeAccessIssue]


def test_nothing_near_gives_only_the_list():
    assert nearest("zzz", ["alpha", "beta"]) == "allowed: alpha, beta"
