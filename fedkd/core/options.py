"""What the configs of all commands have in common: how options are declared, read from a file, and validated."""

from __future__ import annotations

import dataclasses
import reprlib
import tomllib
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, TypeAdapter, ValidationError

from fedkd.core.brief import brief
from fedkd.core.errors import ArgumentError, UsageError, unknown
from fedkd.core.values import MAX_INTEGER, Resize, reason


def _is_text(value: str) -> bool:
    """Whether it has no control characters and can be encoded."""
    return not any(letter < " " or "\x7f" <= letter < "\xa0" or "\ud800" <= letter <= "\udfff" for letter in value)


def underscored(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with underscores in the keys.

    Raises:
        UsageError: a key is given with dashes and with underscores.

    """
    named: dict[str, Any] = {}
    for key, value in values.items():
        if (name := key.replace("-", "_")) in named:
            raise UsageError(f"{name} is given twice, once as {name.replace('_', '-')}; remove one.")
        named[name] = value
    return named


def from_file(path: Path | None) -> dict[str, Any]:
    """The keys of a scenario file.

    Raises:
        UsageError: there is no such file, or it is not TOML.

    """
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read the scenario file {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {' '.join(str(error).split())}.") from error
    try:
        return underscored(values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def option(default: Any, group: str, text: str, several: bool = False) -> Any:
    """A field with its group and text in ``--help``; ``several`` values may follow the flag."""
    return Field(default, description=text, json_schema_extra={"group": group, "several": several})


def in_sentences(options: Any) -> Any:
    """Let the constructor of a config refuse its arguments as `Options.parse` does, but by an `ArgumentError`."""
    original = options.__init__

    @wraps(original)
    def construct(self: Options, **values: Any) -> None:
        try:
            original(self, **values)
        except ValidationError:
            try:
                options.parse(values)
            except UsageError as error:
                raise ArgumentError(str(error)) from None
            raise

    options.__init__ = construct
    options.__repr__ = brief
    return options


RESIZE_TEXT = "Images that are not square: crop keeps the center, stretch changes proportions, pad adds black borders."
MAX_PIXELS_TEXT = "The most pixels of an image file; a larger one is an error."
PRECISION_TEXT = "Precision of networks: float32 (IEEE), and on a GPU tf32 or bfloat16; auto: tf32 if the GPU has it."
SKIP_TEXT = "Leave out images that are damaged or too large, and say how many, instead of ending with an error."


class Options:
    """What the configs of all commands have in common."""

    seed: int
    seeds: int
    resize: Resize
    max_pixels: int
    skip_damaged: bool
    out: str
    json: bool
    resume: str
    #: Options that may differ when a run is resumed, since the result of a round does not depend on them.
    RESUMABLE: ClassVar[frozenset[str]] = frozenset()
    #: Why another one may not differ, where that is not obvious.
    REASONS: ClassVar[Mapping[str, str]] = {}

    @property
    def resumable(self) -> frozenset[str]:
        """Those of this run."""
        return self.RESUMABLE

    @classmethod
    def parse(cls, values: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> Self:
        """A config from keys with dashes or underscores; ``sources`` says where a value was read, for messages.

        Raises:
            UsageError: an unknown key or a value out of range, named in one sentence.

        """
        named = underscored(values)
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]

        def refused(key: str, value: object, why: str) -> UsageError:
            place = (sources or {}).get(key, "")
            return UsageError(f"--{key.replace('_', '-')} {reprlib.repr(value)}{place} is not usable: {why}.")

        for key in named:
            if key not in known:
                dashed = [name.replace("_", "-") for name in (key, *known)]
                raise UsageError(unknown(f"key{(sources or {}).get(key, '')}:", dashed[0], dashed[1:]))
        try:
            config = TypeAdapter(cls).validate_python(named)
        except ValidationError as error:
            first = error.errors()[0]
            raise refused(str(first["loc"][0]), first["input"], reason(error)) from error
        for key in named:
            if isinstance(value := getattr(config, key), str) and not _is_text(value):
                raise refused(key, value, "it has characters that neither a path nor a message can have")
        if config.seed + config.seeds - 1 > MAX_INTEGER:
            raise refused("seed", config.seed, f"the last seed is more than {MAX_INTEGER}")
        return config

    def changed(self) -> set[str]:
        """The options whose value is not the default."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name for field in fields if getattr(self, field.name) != field.default.default}  # type: ignore[union-attr]

    def run_config(self) -> dict[str, str | int | float | bool]:
        """The options as Flower's run config holds them: keys with dashes, scalars."""
        return {key.replace("_", "-"): value for key, value in dataclasses.asdict(self).items()}  # type: ignore[call-overload]

    def fixed(self) -> dict[str, str | int | float | bool]:
        """The options that results depend on, which may not differ when a run is resumed."""
        return {key: v for key, v in self.run_config().items() if key.replace("-", "_") not in self.RESUMABLE}
