"""Methods of ``org.composefs.Oci`` that move layers and images between stores."""

from collections.abc import Sequence
from dataclasses import dataclass

from cfs.client.methods import OciMethod, Result, WithDescriptors

__all__ = [
    "FinalizeImage",
    "Finalized",
    "GetLayer",
    "GetLayerParams",
    "HasLayer",
    "LayerPresence",
    "LayerRef",
    "PutLayer",
    "ReceivedLayer",
    "SentLayer",
    "StorageLocator",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPresence(Result):
    """Reply of :class:`HasLayer`; ``layer_verity`` is a bare digest."""

    present: bool
    layer_verity: str | None = None


@dataclass(frozen=True, slots=True)
class HasLayer(OciMethod[LayerPresence]):
    """Ask whether a layer is in the store."""

    handle: int
    diff_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageLocator:
    """A layer in a containers-storage tree, for services that export such."""

    storage_path: str
    layer_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GetLayerParams:
    """Which layer to send."""

    diff_id: str | None = None
    storage: StorageLocator | None = None
    consumer_has_cap_dac_override: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SentLayer(WithDescriptors):
    """A part of the reply of :class:`GetLayer`.

    The descriptors of all parts, one after the other, are a pipe to read, ``dir_count`` entries
    that the stream in it refers to, and what is to be kept open until the pipe is at its end.
    """

    dir_count: int


@dataclass(frozen=True, slots=True)
class GetLayer(OciMethod[SentLayer]):
    """Have a layer sent; call it as a stream, one reply may not hold all descriptors."""

    handle: int
    params: GetLayerParams


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedLayer(Result):
    """Reply of :class:`PutLayer`; older services do not send the counters."""

    layer_verity: str
    already_present: bool
    objects_reflinked: int = 0
    objects_hardlinked: int = 0
    objects_copied: int = 0
    objects_already_present: int = 0


@dataclass(frozen=True, slots=True)
class PutLayer(OciMethod[ReceivedLayer]):
    """Send a layer; ``fds``: a pipe with the stream, then the directories it refers to."""

    handle: int
    diff_id: str
    zerocopy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRef:
    """A layer of an image, and the id that the store gave it."""

    diff_id: str
    layer_verity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalized(Result):
    """Reply of :class:`FinalizeImage`."""

    manifest_digest: str
    manifest_verity: str
    config_digest: str
    config_verity: str


@dataclass(frozen=True, slots=True)
class FinalizeImage(OciMethod[Finalized]):
    """Store an image whose layers are there, and tag it if it gets a name."""

    handle: int
    manifest_json: str
    config_json: str
    layers: Sequence[LayerRef]
    name: str | None = None
