"""Any text is a config or a component, or a mistake in one sentence; never anything else."""

from __future__ import annotations

import string
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.core import cli, specs
from fedkd.core.catalog import CATALOG
from fedkd.core.config import Config
from fedkd.core.errors import PluginError, UsageError
from fedkd.core.options import Options
from fedkd.data import proxies
from fedkd.distill.config import DistillConfig
from fedkd.training import models

NAMES = sorted({name for names in CATALOG.values() for name in names})
KEYS = sorted(set(Config.__dataclass_fields__) | set(DistillConfig.__dataclass_fields__))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)  # can be encoded
numbers = st.one_of(st.integers(), st.floats(), st.integers().map(lambda power: 10 ** (power % 4000)))
values = st.one_of(
    texts, numbers.map(lambda number: f"{number:.6g}" if isinstance(number, float) else str(number)[:4000])
)
keys = st.one_of(st.sampled_from(["temperature", "alpha", "size", "classes", "width", "k", "downlink"]), texts)
options = st.lists(st.tuples(keys, values).map("=".join), max_size=3).map(",".join)
spec_texts = st.one_of(
    texts,
    st.tuples(st.sampled_from([*NAMES, "holdout"]), options).map(":".join),
    # No module has a digit at its start, so nothing is imported.
    st.text(alphabet=f"{string.digits}./:=,-\0é", max_size=20).map("0.{}".format),
)
scenario_values = st.recursive(
    st.one_of(spec_texts, numbers, st.booleans(), st.none(), st.dates()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=2)),
    max_leaves=5,
)


def read(function: Callable[..., Any], *given: object) -> Any:
    """What a function returns; None if it names a mistake. Any other exception fails the test."""
    with suppress(UsageError, PluginError):
        return function(*given)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(CATALOG)), spec_texts)
def test_any_spec_is_a_component_or_a_mistake(kind, text):
    called = kind in ("algorithm", "codec", "dataset", "distillation")
    read(specs.call if called else specs.bind, kind, text, models.RESERVED)


@settings(max_examples=300, deadline=None)
@given(spec_texts)
def test_any_proxy_and_any_list_of_models_can_be_read(text):
    read(proxies.parse, text)
    for each in read(models.split, text) or ():
        read(specs.bind, "model", each, models.RESERVED)


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from([Config, DistillConfig]),
    st.one_of(
        st.dictionaries(st.one_of(st.sampled_from(KEYS), texts), scenario_values, max_size=3),
        st.dictionaries(st.sampled_from(["rounds", "batch_size", "clients", "epochs", "seeds"]), numbers, max_size=1),
    ),
)
def test_any_values_are_a_config_or_a_mistake(options: type[Options], values):
    if config := read(options.parse, values):
        assert options.parse(config.run_config()) == config
        assert all(value < 2**63 for value in config.run_config().values() if isinstance(value, int))


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.tuples(st.sampled_from(KEYS), values).map(" = ".join).map(str.encode)))
def test_any_file_is_a_scenario_or_a_mistake(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(content)
    read(lambda: Config.parse(cli.from_file(file)))
