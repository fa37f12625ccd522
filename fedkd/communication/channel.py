"""The wire: what is sent goes coded, and both ends remember what a delta is a delta to.

Neither the methods nor the engines know of it: the round loop packs what a method asks and unpacks
what clients answer, and the ClientApp does the reverse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from fedkd.algorithms.aggregators import probabilities
from fedkd.core.tensors import integer, put, take

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.communication.codecs import Codec
    from fedkd.core.tensors import Shapes, Tensors

    Made = dict[int, tuple[Tensor, "Piece"]]  # by the identity of a tensor, which is kept alive: itself, its piece

FLOOR = 1e-4  # the least probability that is made a logit again, where a codec left none
CODED = "~"  # ends the name of a tensor that is coded
TURN = "wire"  # in a request: the client's last turn that the server counted
LARGEST = 2**28  # numbers in a request that a client unpacks


@dataclass(frozen=True)
class Load:
    """What tensors weigh, in bytes: as they are (raw), coded, and at the entropy of their symbols.

    For floats and integers, which are no symbols of a small alphabet, the bound is their coded size.
    """

    raw: int = 0
    coded: int = 0
    bound: float = 0.0

    def __add__(self, other: Load) -> Load:
        return Load(self.raw + other.raw, self.coded + other.coded, self.bound + other.bound)


@dataclass(frozen=True)
class Piece:
    """A tensor as its codec sees it and as it goes; ``kept`` is what the other end makes of it, for a delta."""

    codec: Codec
    values: Tensor
    coded: Tensor
    last: Tensor | None
    kept: Tensor | None

    @cached_property
    def load(self) -> Load:
        """What it weighs. The bound quantizes once more, so only the server asks for it."""
        bits = self.codec.bound(self.values, self.last)
        bound = self.coded.nbytes if bits is None else bits / 8
        return Load(self.values.nbytes, self.coded.nbytes, bound)


@dataclass(frozen=True)
class Packed:
    """Tensors by the names under which they are wanted, and the pieces of those that are coded."""

    tensors: dict[str, Tensor]
    pieces: dict[str, Piece]
    plain: int  # bytes of those that are not
    added: int = 0  # bytes that coding needs beside them

    @property
    def kept(self) -> dict[str, Tensor]:
        """What a later delta may build on."""
        return {name: piece.kept for name, piece in self.pieces.items() if piece.kept is not None}

    @property
    def load(self) -> Load:
        """What all of it weighs."""
        return sum(
            (piece.load for piece in self.pieces.values()),
            Load(self.plain, self.plain + self.added, self.plain + self.added),
        )


@dataclass(frozen=True)
class Wire:
    """The codecs of a run, up and down.

    Both ends keep what went in the client's last turn that the server counted (``turn``, ``up/NAME``,
    ``down/NAME``). The server says which turn that was; where the client remembers another one, nothing
    is taken for common.
    """

    up: Codec
    down: Codec
    temperature: float = 1.0  # at which logits become probabilities, where a codec is for those

    @property
    def remembers(self) -> bool:
        """Whether anything must be kept."""
        return self.up.delta or self.down.delta

    def ask(self, request: Tensors, held: Tensors, made: Made) -> Packed:
        """The server packs a request; ``made`` holds what was packed already for another client of the round."""
        packed = pack(self.down, request, take("down", held), made, self.temperature)
        if self.remembers:
            turn = packed.tensors[TURN] = held.get("turn", integer(0))
            packed = replace(packed, added=turn.nbytes)
        return packed

    def hear(self, arrays: Tensors, memory: Tensors) -> Packed:
        """The client unpacks a request.

        Raises:
            ValueError: it builds on what this client does not remember; the server then sends the whole.

        """
        content = {name: tensor for name, tensor in arrays.items() if name != TURN}
        return unpack(self.down, content, take("down", _common(arrays, memory)), None, self.temperature)

    def answer(self, tensors: Tensors, arrays: Tensors, memory: Tensors) -> Packed:
        """The client packs its update, in answer to the request ``arrays``."""
        return pack(self.up, tensors, take("up", _common(arrays, memory)), {}, self.temperature)

    def tell(self, arrays: Tensors, shapes: Shapes, held: Tensors) -> Packed:
        """The server unpacks an update of declared shapes.

        Raises:
            ValueError: it cannot be decoded.

        """
        return unpack(self.up, arrays, take("up", held), shapes, self.temperature)

    def memory(self, turn: int, down: Packed, up: Packed) -> dict[str, Tensor]:
        """What either end keeps of a turn; nothing where no codec needs it."""
        if not self.remembers:
            return {}
        return {"turn": integer(turn), **put("down", down.kept), **put("up", up.kept)}


def _common(arrays: Tensors, memory: Tensors) -> Tensors:
    """What the client remembers, if it is what the server counted."""
    return memory if TURN in arrays and "turn" in memory and bool(arrays[TURN] == memory["turn"]) else {}


def pack(codec: Codec, tensors: Tensors, reference: Tensors, made: Made, temperature: float = 1.0) -> Packed:
    """Code what the codec is for; the rest stays as it is."""
    coded: dict[str, Tensor] = {}
    pieces: dict[str, Piece] = {}
    plain = 0
    for name, tensor in tensors.items():
        if not _is_for(codec, name, tensor):
            coded[name] = tensor
            plain += tensor.nbytes
            continue
        last = reference.get(name)
        if last is None and id(tensor) in made:
            _, piece = made[id(tensor)]
        else:
            values = _values(codec, name, tensor, temperature)
            packed = codec.encode(values, last)
            kept = codec.decode(packed, last, values.numel()) if codec.delta else None
            piece = Piece(codec, values, packed, last, kept)
            if last is None:
                made[id(tensor)] = tensor, piece
        pieces[name] = piece
        coded[name if piece.coded is piece.values else name + CODED] = piece.coded
    return Packed(coded, pieces, plain)


def unpack(
    codec: Codec, arrays: Tensors, reference: Tensors, shapes: Shapes | None = None, temperature: float = 1.0
) -> Packed:
    """Decode what is coded.

    Raises:
        ValueError: it cannot be, or holds more numbers than the declared shapes have.

    """
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, Piece] = {}
    plain = 0
    for name, array in arrays.items():
        if not name.endswith(CODED):
            tensors[name] = array
            plain += array.nbytes
            continue
        name = name.removesuffix(CODED)
        last = reference.get(name)
        limit = LARGEST if shapes is None else prod(abs(extent) for extent in shapes.get(name, (0,)))
        values = codec.decode(array, last, limit)
        tensors[name] = _tensor(codec, name, values, temperature)
        pieces[name] = Piece(codec, values, array, last, values if codec.delta else None)
    return Packed(tensors, pieces, plain)


def break_even(weights: int, weight_bits: float, classes: int, label_bits: float) -> float:
    """The number of public samples at which soft labels cost as much as the weights: |theta| b_w / (C b_l)."""
    return weights * weight_bits / (classes * label_bits)


def is_soft_label(name: str) -> bool:
    """Whether a tensor holds soft labels: its name ends in ``probs`` or ``logits``."""
    return name.rpartition("/")[2] in ("probs", "logits")


def _is_for(codec: Codec, name: str, tensor: Tensor) -> bool:
    return is_soft_label(name) if codec.labels else tensor.is_floating_point()


def _values(codec: Codec, name: str, tensor: Tensor, temperature: float) -> Tensor:
    """What a codec codes: probabilities at the run's temperature, where it is one for soft labels."""
    if codec.labels and name.endswith("logits"):
        return probabilities(tensor, temperature)
    return tensor


def _tensor(codec: Codec, name: str, values: Tensor, temperature: float) -> Tensor:
    return temperature * values.clamp_min(FLOOR).log() if codec.labels and name.endswith("logits") else values
