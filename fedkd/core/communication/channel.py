"""The channel between the server and its clients: tensors are encoded by a codec, as a delta where one is possible.

Neither algorithms nor engines know of it: the round loop encodes what an algorithm broadcasts and decodes what
clients upload; the ClientApp does the reverse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from fedkd.core.communication.ledger import Traffic, is_soft_label
from fedkd.core.soft_labels import probabilities
from fedkd.core.tensors import Int64, UInt8, integer, itemsize, put, take

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.communication.codecs import Codec
    from fedkd.core.tensors import Shapes, Tensors

    Cache = dict[int, tuple[Tensor, "EncodedTensor"]]  # by id() of a tensor, which is kept alive: it, and its encoding

MIN_PROBABILITY = 1e-4  # of a decoded class that is turned into a logit
ENCODED = "~"  # ends the name of a tensor that is encoded
LAST_ROUND = "last"  # in a message to a client: the last round in which the server accepted its update
MAX_NUMBERS = 2**28  # in a message that a client decodes
ENCODING, ENCODING_HEAD = 8, 4096  # bytes per number, and of one encoding, that no codec exceeds


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor as its codec sees it, and its encoding; ``decoded`` is what the receiver decodes, if deltas need it."""

    codec: Codec
    values: Tensor
    encoding: Tensor
    reference: Tensor | None
    decoded: Tensor | None

    @cached_property
    def traffic(self) -> Traffic:
        """Its bytes. The bound quantizes once more, so only the server computes it."""
        bits = self.codec.bound(self.values, self.reference)
        bound = self.encoding.nbytes if bits is None else bits / 8
        return Traffic(self.values.nbytes, self.encoding.nbytes, bound)


@dataclass(frozen=True)
class Encoded:
    """Tensors under the names in which the receiver or the sender wants them, and the encoded ones among them."""

    tensors: dict[str, Tensor]
    encoded: dict[str, EncodedTensor]
    plain_bytes: int  # of the tensors that are not encoded
    added_bytes: int = 0  # that encoding needs in addition

    @property
    def decoded(self) -> dict[str, Tensor]:
        """What a later delta may refer to."""
        return {name: part.decoded for name, part in self.encoded.items() if part.decoded is not None}

    @property
    def traffic(self) -> Traffic:
        """The bytes of all tensors."""
        plain = self.plain_bytes + self.added_bytes
        return sum((part.traffic for part in self.encoded.values()), Traffic(self.plain_bytes, plain, plain))


@dataclass(frozen=True)
class Channel:
    """The codecs of a run for both directions.

    For deltas, both ends keep what was transmitted in the last round in which the server accepted the client's update
    (``round``, ``uplink/NAME``, ``downlink/NAME``). The server sends the number of that round; if the client remembers
    another one, nothing is taken as common.
    """

    uplink: Codec
    downlink: Codec
    temperature: float = 1.0  # at which logits become probabilities, for a codec of probabilities

    @property
    def has_memory(self) -> bool:
        """Whether anything must be kept between rounds."""
        return self.uplink.delta or self.downlink.delta

    def encode_message(self, message: Tensors, memory: Tensors, cache: Cache) -> Encoded:
        """The server encodes a message; ``cache`` holds what is encoded already for other clients of the round."""
        encoded = encode(self.downlink, message, take("downlink", memory), cache, self.temperature)
        if self.has_memory:
            last = encoded.tensors[LAST_ROUND] = memory.get("round", integer(0))
            encoded = replace(encoded, added_bytes=last.nbytes)
        return encoded

    def decode_message(self, arrays: Tensors, memory: Tensors) -> Encoded:
        """The client decodes a message.

        Raises:
            ValueError: it refers to something that this client does not remember; the server then sends all of it.

        """
        content = {name: tensor for name, tensor in arrays.items() if name != LAST_ROUND}
        return decode(self.downlink, content, take("downlink", _common(arrays, memory)), None, self.temperature)

    def encode_update(self, tensors: Tensors, arrays: Tensors, memory: Tensors) -> Encoded:
        """The client encodes its update; ``arrays`` is the message that it received."""
        return encode(self.uplink, tensors, take("uplink", _common(arrays, memory)), {}, self.temperature)

    def upload_sizes(self, shapes: Shapes) -> dict[str, int]:
        """The most bytes that each tensor of an update can take, by the declared shapes."""
        numbers = {name: prod(abs(extent) for extent in shape) for name, shape in shapes.items()}
        return {
            name: ENCODING * numbers[name] + ENCODING_HEAD
            if _applies(self.uplink, name, not isinstance(shape, Int64 | UInt8))
            else itemsize(shape) * numbers[name]
            for name, shape in shapes.items()
        }

    def decode_update(self, arrays: Tensors, shapes: Shapes, memory: Tensors) -> Encoded:
        """The server decodes an update of declared shapes.

        Raises:
            ValueError: it cannot be decoded.

        """
        return decode(self.uplink, arrays, take("uplink", memory), shapes, self.temperature)

    def new_memory(self, number: int, downlink: Encoded, uplink: Encoded) -> dict[str, Tensor]:
        """What both ends keep of a round; empty if no codec needs it."""
        if not self.has_memory:
            return {}
        return {"round": integer(number), **put("downlink", downlink.decoded), **put("uplink", uplink.decoded)}


def _common(arrays: Tensors, memory: Tensors) -> Tensors:
    """The client's memory, if it is of the last round in which the server accepted its update."""
    is_common = LAST_ROUND in arrays and "round" in memory and bool(arrays[LAST_ROUND] == memory["round"])
    return memory if is_common else {}


def encode(codec: Codec, tensors: Tensors, references: Tensors, cache: Cache, temperature: float = 1.0) -> Encoded:
    """Encode the tensors that the codec applies to; the others stay as they are."""
    sent: dict[str, Tensor] = {}
    encoded: dict[str, EncodedTensor] = {}
    plain_bytes = 0
    for name, tensor in tensors.items():
        if not _applies(codec, name, tensor.is_floating_point()):
            sent[name] = tensor
            plain_bytes += tensor.nbytes
            continue
        reference = references.get(name)
        if reference is None and id(tensor) in cache:
            _, part = cache[id(tensor)]
        else:
            values = _to_values(codec, name, tensor, temperature)
            encoding = codec.encode(values, reference)
            decoded = codec.decode(encoding, reference, values.numel()) if codec.delta else None
            part = EncodedTensor(codec, values, encoding, reference, decoded)
            if reference is None:
                cache[id(tensor)] = tensor, part
        encoded[name] = part
        sent[name if part.encoding is part.values else name + ENCODED] = part.encoding
    return Encoded(sent, encoded, plain_bytes)


def decode(
    codec: Codec, arrays: Tensors, references: Tensors, shapes: Shapes | None = None, temperature: float = 1.0
) -> Encoded:
    """Decode the tensors that are encoded.

    Raises:
        ValueError: one cannot be decoded, or holds more numbers than the declared shapes have.

    """
    tensors: dict[str, Tensor] = {}
    encoded: dict[str, EncodedTensor] = {}
    plain_bytes = 0
    for name, array in arrays.items():
        if not name.endswith(ENCODED):
            tensors[name] = array
            plain_bytes += array.nbytes
            continue
        name = name.removesuffix(ENCODED)
        reference = references.get(name)
        limit = MAX_NUMBERS if shapes is None else prod(abs(extent) for extent in shapes.get(name, (0,)))
        values = codec.decode(array, reference, limit)
        tensors[name] = _from_values(codec, name, values, temperature)
        encoded[name] = EncodedTensor(codec, values, array, reference, values if codec.delta else None)
    return Encoded(tensors, encoded, plain_bytes)


def _applies(codec: Codec, name: str, is_float: bool) -> bool:
    return is_soft_label(name) if codec.labels else is_float


def _to_values(codec: Codec, name: str, tensor: Tensor, temperature: float) -> Tensor:
    """What the codec encodes: probabilities at the run's temperature, if it is a codec of soft labels."""
    if codec.labels and name.endswith("logits"):
        return probabilities(tensor, temperature)
    return tensor


def _from_values(codec: Codec, name: str, values: Tensor, temperature: float) -> Tensor:
    is_logits = codec.labels and name.endswith("logits")
    return temperature * values.clamp_min(MIN_PROBABILITY).log() if is_logits else values
