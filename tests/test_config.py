"""Strict configuration: what is written comes back equal, and every mistake is named with its place."""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.commands.flags import field_docs
from trivium.config import (
    UserError,
    config_hash,
    from_dict,
    knob,
    load_yaml,
    parse_scalar,
    set_path,
    to_dict,
    to_yaml,
)
from trivium.mixers.base import MIXERS
from trivium.model.base import MODELS
from trivium.registry import Registry
from trivium.study.recipe import Recipe, load_recipe
from trivium.tasks.base import TASKS

SHAPES = Registry("shape", "trivium.tasks")


@dataclass(frozen=True)
class Shape:
    registry: ClassVar[Registry] = SHAPES
    kind: ClassVar[str]


@SHAPES.register("circle")
@dataclass(frozen=True)
class Circle(Shape):
    radius: float = 1.0


@SHAPES.register("square")
@dataclass(frozen=True)
class Square(Shape):
    side: int = 1

    def __post_init__(self):
        if self.side < 1:
            raise UserError(f"side: expected a positive whole number, got {self.side}")
        if self.side == 13:
            raise UserError("a square of 13 brings bad luck")


@dataclass(frozen=True)
class Inner:
    count: int
    rate: float = 0.5
    mode: Literal["fast", "slow"] = "fast"


@dataclass(frozen=True)
class Outer:
    shape: Shape = Circle()
    inner: Inner = Inner(3)
    path: Path | None = None
    flag: bool = False
    label: str = ""
    numbers: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "a")
    limit: int | None = None
    table: dict[str, dict[str, Any]] = field(default_factory=dict)
    watch: bool = knob(False, affects_results=False)


# Adding zero makes minus zero, which equals it and prints differently, into zero.
finite = st.floats(allow_nan=False, allow_infinity=False).map(lambda value: value + 0.0)
integers = st.integers(-(2**40), 2**40)
inners = st.builds(Inner, integers, finite, st.sampled_from(["fast", "slow"]))
shapes = st.one_of(st.builds(Circle, finite), st.builds(Square, st.integers(1, 9)))
plain = st.one_of(st.none(), st.booleans(), integers, finite, st.text(max_size=5))
outers = st.builds(
    Outer,
    shape=shapes,
    inner=inners,
    path=st.none() | st.sampled_from([Path("a/b"), Path("x.yaml")]),
    flag=st.booleans(),
    label=st.text(max_size=8),
    numbers=st.lists(integers, max_size=4).map(tuple),
    pair=st.tuples(integers, st.text(max_size=3)),
    limit=st.none() | integers,
    table=st.dictionaries(st.text(min_size=1, max_size=4), st.dictionaries(st.text(max_size=4), plain), max_size=2),
    watch=st.booleans(),
)


@given(outers)
def test_plain_data_rebuilds_an_equal_config(config):
    assert from_dict(Outer, to_dict(config)) == config


@given(outers)
def test_a_config_written_as_yaml_reads_back_equal(config):
    assert from_dict(Outer, _yaml(to_yaml(config))) == config


def _yaml(text: str) -> Any:
    data = parse_scalar(text)
    assert isinstance(data, dict)
    return data


@given(outers, outers)
def test_configs_share_a_hash_exactly_when_they_share_what_changes_results(one, other):
    same = to_yaml(replace(one, watch=False)) == to_yaml(replace(other, watch=False))
    assert (config_hash(one) == config_hash(other)) == same
    assert config_hash(one) == config_hash(replace(one, watch=not one.watch))


@pytest.mark.parametrize("text", ["3e-3", "3E-3", "0.003", "3.0e-3", "+3e-3"])
def test_scientific_notation_is_a_number_in_yaml_and_on_the_command_line(tmp_path, text):
    (tmp_path / "c.yaml").write_text(f"inner: {{count: 1, rate: {text}}}\n")
    assert from_dict(Outer, load_yaml(tmp_path / "c.yaml")).inner.rate == 0.003
    assert from_dict(Inner, {"count": 1, "rate": parse_scalar(text)}).rate == 0.003


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"labell": 1}, "labell: unknown key; did you mean 'label'? allowed: shape, inner,"),
        ({"inner": {"count": 1, "raet": 2}}, "inner.raet: unknown key; did you mean 'rate'?"),
        ({"inner": {"rate": 1}}, "inner.count: missing"),
        ({"inner": {"count": "many"}}, "inner.count: expected a whole number, got 'many'"),
        ({"inner": {"count": 1.5}}, "inner.count: expected a whole number, got 1.5"),
        ({"inner": {"count": True}}, "inner.count: expected a whole number, got True"),
        ({"inner": {"count": 1, "rate": "abc"}}, "inner.rate: expected a number, got 'abc'"),
        ({"inner": {"count": 1, "rate": True}}, "inner.rate: expected a number, got True"),
        ({"inner": {"count": 1, "mode": "fats"}}, "inner.mode: 'fats' is not allowed; did you mean 'fast'?"),
        ({"inner": 3}, "inner: expected a mapping of keys, got 3"),
        ({"inner": None}, "inner: expected a mapping of keys, got nothing"),
        ({"flag": "yes"}, "flag: expected true or false, got 'yes'"),
        ({"flag": 1}, "flag: expected true or false, got 1"),
        ({"label": 5}, "label: expected text, got 5"),
        ({"numbers": 5}, "numbers: expected a list, got 5"),
        ({"numbers": [1, "x"]}, "numbers[1]: expected a whole number, got 'x'"),
        ({"pair": [1]}, "pair: expected a list of 2, got a list of 1"),
        ({"limit": "x"}, "limit: expected a whole number, got 'x' or null"),
        ({"shape": {"kind": "circel"}}, "shape: unknown shape 'circel'; did you mean 'circle'?"),
        ({"shape": {"radius": 2}}, "shape: give its kind: one of"),
        ({"shape": {"kind": "square", "radius": 2}}, "shape.radius: unknown key; allowed: side"),
        ({"shape": {"kind": "square", "side": 0}}, "shape.side: expected a positive whole number, got 0"),
        ({"shape": {"kind": "square", "side": 13}}, "shape: a square of 13 brings bad luck"),
        ({"table": [1]}, "table: expected a mapping of keys, got a list of 1"),
    ],
)
def test_a_mistake_is_named_with_its_key_and_what_is_allowed(data, message):
    with pytest.raises(UserError) as caught:
        from_dict(Outer, data)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinity_is_no_whole_number(value):
    with pytest.raises(UserError, match="expected a whole number"):
        from_dict(Inner, {"count": value})


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "nan", "-inf", 10**400])
def test_a_number_is_finite(value):
    with pytest.raises(UserError, match="rate: expected a number"):
        from_dict(Inner, {"count": 1, "rate": value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "c.yaml:2: not valid YAML: key 'a' is given twice"),
        ("a:\n  b: 1\n  b: 2\n", "c.yaml:3: not valid YAML: key 'b' is given twice"),
        ("a: [1, 2\nb: 3\n", "c.yaml:2: not valid YAML"),
        ("a: \tb: c\n", "c.yaml:1: not valid YAML"),
        ("- 1\n- 2\n", "c.yaml: a recipe is a mapping of sections, this file holds a list of 2"),
        ("", "c.yaml: a recipe is a mapping of sections, this file holds nothing"),
        ("just words\n", "c.yaml: a recipe is a mapping of sections, this file holds 'just words'"),
        ("? [1, 2]\n: 3\n", "c.yaml:1: not valid YAML: a key must be a plain word"),
        ("a: !!python/object:os.system 1\n", "c.yaml:1: not valid YAML"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_yaml(tmp_path / "c.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_binary_file_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="cannot be read"):
        load_yaml(tmp_path / "bytes.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_yaml(tmp_path)


def test_a_path_through_a_value_is_refused():
    with pytest.raises(UserError, match=r"a\.b: 'a' is a value, not a section"):
        set_path({"a": 3}, "a.b", 1)


EVERY_CONFIG = [
    config
    for registry in (TASKS, MODELS, MIXERS)
    for name in registry.names()
    for config in registry.get(name).examples()
]


@pytest.mark.parametrize("config", EVERY_CONFIG, ids=lambda config: config.kind)
def test_every_registered_config_survives_plain_data_and_yaml(config):
    base = next(cls for cls in type(config).__mro__ if "registry" in vars(cls))
    assert from_dict(base, to_dict(config)) == config
    assert from_dict(base, _yaml(to_yaml(config))) == config


def every_class() -> list[type]:
    found = [Recipe, *(registry.get(name) for registry in (TASKS, MODELS, MIXERS) for name in registry.names())]
    for cls in found:
        parts = [part for hint in get_type_hints(cls).values() for part in (hint, *get_args(hint))]
        found += [part for part in parts if isinstance(part, type) and is_dataclass(part) and part not in found]
    return found


@pytest.mark.parametrize("cls", every_class(), ids=lambda cls: cls.__name__)
def test_every_knob_has_one_line_of_help_under_it(cls):
    docs = field_docs(cls)
    missing = [knob.name for knob in fields(cls) if knob.init and not docs.get(knob.name)]
    assert missing == []


TASK = {"kind": "addition"}
recipes = st.fixed_dictionaries(
    {
        "task": st.fixed_dictionaries(
            {"kind": st.just("addition"), "max_digits": st.integers(3, 5), "base": st.integers(5, 36)}
        ),
        "train": st.fixed_dictionaries(
            {
                "steps": st.integers(1, 10**6),
                "batch": st.integers(1, 4096),
                "learning_rate": st.floats(1e-6, 1.0),
                "schedule": st.sampled_from(["cosine", "linear", "constant"]),
                "seed": st.integers(0, 2**23 - 1),
            }
        ),
        "model": st.fixed_dictionaries(
            {"layers": st.sampled_from(["attention*2", "attention*1 + attention(window=4)"])}
        ),
    }
)


@settings(max_examples=40)  # each resolves a whole recipe, which takes its time
@given(recipes)
def test_a_recipe_written_out_resolved_reads_back_equal(data):
    recipe = from_dict(Recipe, data)
    assert from_dict(Recipe, _yaml(to_yaml(recipe))) == recipe
    assert config_hash(recipe) == config_hash(from_dict(Recipe, _yaml(to_yaml(recipe))))


def test_every_recipe_in_the_repository_loads():
    folder = Path(__file__).parent.parent / "recipes"
    paths = sorted(folder.glob("*.yaml"))
    assert "quickstart.yaml" in {path.name for path in paths}
    for path in paths:
        assert load_recipe(path).name == path.stem
