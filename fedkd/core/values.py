"""Types of the values of options: what fits, and how a text becomes one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from fedkd.core.catalog import CATALOG

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_INTEGER = 2**32 - 1  # of any option: PyTorch and Flower have 64 bits, NumPy's seeds 32
MAX_PIXELS = 100_000_000  # of an image that is decoded, by default: 300 MB
MAX_PROCESSES = 1024  # also of threads: PyTorch crashes long before 100,000


def reason(error: ValidationError) -> str:
    """Why the first of the values is refused, as a clause."""
    first = error.errors()[0]
    if first["type"] == "string_type":
        is_component = first["loc"] and first["loc"][0] in CATALOG
        return "it should be a text" + ", or a function or a class that returns it" * bool(is_component)
    if first["type"].startswith("bool"):
        return "it should be true or false"
    is_nan = str(first["input"]).strip("+-").lower() == "nan"  # which is compared with a limit first
    return "it should be a number" if is_nan else first["msg"].removeprefix("Value error, ").lower()


def _joined(value: object) -> object:
    """A list from a scenario file or from several flags, as one string."""
    is_list = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    return " ".join(value) if is_list else value  # type: ignore[arg-type]


def _workers(value: object) -> str:
    """A number of processes, or auto."""
    text = str(value)
    if text != "auto" and not (text.isdecimal() and len(text) < 5 and 0 < int(text) <= MAX_PROCESSES):
        raise ValueError(f"it should be auto or an integer from 1 to {MAX_PROCESSES}")
    return text


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("it should be a number")
    return value


Several = Annotated[str, BeforeValidator(_joined)]
Number = BeforeValidator(_number)  # true is not 1
PositiveInt = Annotated[int, Number, Field(ge=1, le=MAX_INTEGER)]
NonNegativeInt = Annotated[int, Number, Field(ge=0, le=MAX_INTEGER)]
Processes = Annotated[int, Number, Field(ge=1, le=MAX_PROCESSES)]
Repetitions = Annotated[int, Number, Field(ge=1, le=10_000)]
Seed = Annotated[int, Number, Field(ge=0, le=2**63 - 1)]  # also one that is derived
Fraction = Annotated[float, Number, Field(gt=0, le=1, allow_inf_nan=False)]
Rate = Annotated[float, Number, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Number, Field(ge=0, allow_inf_nan=False)]
Resize = Literal["crop", "stretch", "pad"]
Momentum = Annotated[float, Number, Field(ge=0, lt=1)]
Workers = Annotated[str, BeforeValidator(_workers)]
