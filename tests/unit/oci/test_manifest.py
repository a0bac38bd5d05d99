"""Manifests, indexes and configs: typed values of sound documents, errors of all others."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfs.errors import FormatError
from cfs.oci.manifest import (
    CONFIG_TYPE,
    DOCKER_MANIFEST_TYPE,
    MANIFEST_TYPE,
    MAX_DOCUMENT_SIZE,
    Compression,
    Config,
    Index,
    Manifest,
    Platform,
    convert_docker,
    layer_compression,
    native_platform,
)

Json = dict[str, Any]
Parse = Callable[[bytes], object]

DIGEST = "sha256:" + "0" * 64
TAR = "application/vnd.oci.image.layer.v1.tar"
DOCKER_TAR = "application/vnd.docker.image.rootfs.diff.tar"
DESCRIPTOR: Json = {"mediaType": CONFIG_TYPE, "digest": DIGEST, "size": 3}
MANIFEST: Json = {"schemaVersion": 2, "config": DESCRIPTOR, "layers": [DESCRIPTOR]}
INDEX: Json = {"schemaVersion": 2, "manifests": [DESCRIPTOR]}
CONFIG: Json = {"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": [DIGEST]}}
DOCUMENTS: dict[str, tuple[Parse, Json]] = {
    "manifest": (Manifest.parse, MANIFEST),
    "index": (Index.parse, INDEX),
    "config": (Config.parse, CONFIG),
}


def encode(value: object) -> bytes:
    return json.dumps(value).encode()


def replaced(document: Any, path: list[str | int], value: object) -> Any:
    """Return a document with another value somewhere; ``...`` removes it."""
    copy = json.loads(json.dumps(document))
    *parents, last = path
    inner = copy
    for key in parents:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return copy


def test_a_manifest() -> None:
    subject = {**DESCRIPTOR, "artifactType": "a/b", "annotations": {"k": "v", "": ""}}
    full = {**MANIFEST, "mediaType": "m/t", "subject": subject, "annotations": {"é": "x"}}
    manifest = Manifest.parse(encode({**full, "artifactType": "c/d", "more": [1, {"a": None}]}))
    assert (manifest.media_type, manifest.artifact_type) == ("m/t", "c/d")
    assert manifest.annotations == {"é": "x"}
    assert manifest.config.digest == manifest.layers[0].digest == DIGEST
    assert manifest.config.size == 3
    assert manifest.subject is not None
    assert manifest.subject.annotations == {"k": "v", "": ""}
    assert manifest.subject.artifact_type == "a/b"


def test_what_a_manifest_need_not_have() -> None:
    nothing = dict.fromkeys(("mediaType", "artifactType", "subject", "annotations"))
    for manifest in (Manifest.parse(encode(MANIFEST)), Manifest.parse(encode(MANIFEST | nothing))):
        assert manifest.media_type == MANIFEST_TYPE
        assert manifest.artifact_type is None
        assert manifest.subject is None
        assert manifest.annotations == manifest.config.annotations == {}
    assert not Manifest.parse(encode({**MANIFEST, "layers": []})).layers


@pytest.mark.parametrize(
    ("media_type", "is_container"),
    [
        (CONFIG_TYPE, True),
        ("application/vnd.docker.container.image.v1+json", False),
        ("application/vnd.oci.empty.v1+json", False),
        (CONFIG_TYPE.upper(), False),
    ],
)
def test_the_type_of_the_config_makes_a_container_image(
    media_type: str,
    is_container: bool,  # noqa: FBT001 - of a table
) -> None:
    document = replaced(MANIFEST, ["config", "mediaType"], media_type)
    assert Manifest.parse(encode(document)).is_container is is_container


def test_an_index() -> None:
    platform = {"os": "linux", "architecture": "arm", "variant": "v7", "os.features": ["x"]}
    entries = [{**DESCRIPTOR, "platform": platform}, {**DESCRIPTOR, "platform": None}, DESCRIPTOR]
    found = [
        entry.platform for entry in Index.parse(encode({**INDEX, "manifests": entries})).manifests
    ]
    assert found == [Platform("linux", "arm", "v7"), None, None]


def test_a_config() -> None:
    config = Config.parse(encode(CONFIG))
    assert (config.architecture, config.os) == ("amd64", "linux")
    assert config.variant is config.created is None
    assert config.diff_ids == (DIGEST,)
    assert config.labels == {}
    running = {"Labels": {"a": "b"}, "Cmd": 7}
    config = Config.parse(encode({**CONFIG, "created": "then", "variant": "v8", "config": running}))
    assert (config.created, config.variant, config.labels) == ("then", "v8", {"a": "b"})


@pytest.mark.parametrize(
    ("document", "path", "value", "where"),
    [
        ("manifest", ["schemaVersion"], 1, "manifest: schemaVersion: found 1"),
        ("manifest", ["schemaVersion"], ..., "manifest: schemaVersion: found nothing"),
        ("manifest", ["config"], ..., "manifest: config is missing"),
        ("manifest", ["config"], None, "manifest: config: expected an object"),
        ("manifest", ["layers"], ..., "manifest: layers: expected a list, found nothing"),
        ("manifest", ["layers"], {}, "manifest: layers: expected a list"),
        ("manifest", ["layers", 0], [], "manifest: layer 0: expected an object"),
        ("manifest", ["layers", 0, "digest"], "sha256:0", "manifest: layer 0: invalid digest"),
        ("manifest", ["layers", 0, "digest"], "../../x", "manifest: layer 0: invalid digest"),
        ("manifest", ["layers", 0, "size"], -1, "manifest: layer 0: size: found -1"),
        ("manifest", ["layers", 0, "size"], 1 << 63, "manifest: layer 0: size: found 92233"),
        ("manifest", ["layers", 0, "size"], True, "manifest: layer 0: size: found true"),
        ("manifest", ["layers", 0, "size"], 3.0, "manifest: layer 0: size: found 3.0"),
        ("manifest", ["layers", 0, "mediaType"], ..., "manifest: layer 0: mediaType: "),
        ("manifest", ["mediaType"], 1, "manifest: mediaType: expected a string"),
        ("manifest", ["subject"], 1, "manifest: subject: expected an object"),
        ("manifest", ["annotations"], {"a": 1}, "manifest: annotations: a: expected a string"),
        ("manifest", ["annotations"], {"\ud800": ""}, "manifest: annotations: name: expected"),
        ("index", ["manifests"], ..., "index: manifests: expected a list"),
        ("index", ["manifests", 0, "platform"], {}, "index: manifest 0: platform: os: "),
        ("index", ["manifests", 0, "platform"], [], "index: manifest 0: platform: expected"),
        ("config", ["architecture"], ..., "config: architecture: expected a string"),
        ("config", ["os"], None, "config: os: expected a string"),
        ("config", ["rootfs"], ..., "config: rootfs is missing"),
        ("config", ["rootfs", "diff_ids"], ..., "config: rootfs: diff_ids: expected a list"),
        ("config", ["rootfs", "diff_ids"], [1], "config: rootfs: diff_ids: expected a string"),
        ("config", ["rootfs", "diff_ids"], ["a"], "config: rootfs: invalid digest 'a'"),
        ("config", ["config"], [], "config: config: expected an object"),
        ("config", ["config"], {"Labels": {"a": None}}, "config: config: Labels: a: expected"),
        ("config", ["created"], "\udc00", "config: created: expected a string"),
    ],
)
def test_broken_documents(document: str, path: list[str | int], value: object, where: str) -> None:
    parse, sound = DOCUMENTS[document]
    with pytest.raises(FormatError) as caught:
        parse(encode(replaced(sound, path, value)))
    assert str(caught.value).startswith(where)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_are_bounded(document: str) -> None:
    parse, sound = DOCUMENTS[document]
    data = encode(sound)
    assert parse(data + b" " * (MAX_DOCUMENT_SIZE - len(data))) == parse(data)
    with pytest.raises(FormatError, match="expected at most 4194304"):
        parse(data + b" " * (MAX_DOCUMENT_SIZE - len(data) + 1))
    for hostile in (
        b"[" * 100_000,
        b'{"layers":' * 100_000,
        data[:-1] + b',"schemaVersion":2,"rootfs":{}}',
    ):
        with pytest.raises(FormatError):
            parse(hostile)


KEYS = st.sampled_from(
    [
        *("schemaVersion", "mediaType", "artifactType", "config", "layers", "subject", "digest"),
        *("annotations", "manifests", "platform", "os", "architecture", "variant", "size"),
        *("rootfs", "diff_ids", "created", "Labels", "x"),
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([DIGEST, CONFIG_TYPE, 2, "\ud800", DESCRIPTOR]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


# others use the machine
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(value=st.dictionaries(KEYS, VALUES, max_size=5), data=st.binary(max_size=40))
def test_any_bytes_are_a_document_or_a_format_error(value: Json, data: bytes) -> None:
    for parse, sound in DOCUMENTS.values():
        for candidate in (encode(sound | value), encode(value), data, encode(sound)[:-3] + data):
            try:
                parsed = parse(candidate)
            except FormatError as error:
                assert "\n" not in str(error)  # noqa: PT017 - most are none
                continue
            if isinstance(parsed, Manifest):
                converted = Manifest.parse(convert_docker(candidate))
                assert [layer.digest for layer in converted.layers] == [
                    layer.digest for layer in parsed.layers
                ]


def test_media_types_of_layers() -> None:
    found = {
        media_type: layer_compression(media_type)
        for media_type in (TAR, f"{TAR}+gzip", f"{TAR}+zstd", f"{TAR}+xz", f"{DOCKER_TAR}.gzip", "")
    }
    assert list(found.values()) == [*Compression, None, None, None]
    foreign = TAR.replace("layer", "layer.nondistributable")
    assert layer_compression(f"{foreign}+zstd") is Compression.ZSTD


def test_docker_manifests_become_those_of_oci() -> None:
    foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    types = [f"{DOCKER_TAR}.gzip", DOCKER_TAR, f"{DOCKER_TAR}.zstd", foreign, "x/y"]
    docker = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST_TYPE,
        "config": {**DESCRIPTOR, "mediaType": "application/vnd.docker.container.image.v1+json"},
        "layers": [
            {"mediaType": media_type, "size": number, "digest": DIGEST, "annotations": {"k": "é"}}
            for number, media_type in enumerate(types)
        ],
    }
    data = convert_docker(encode(docker))
    assert convert_docker(json.dumps(docker, indent=3).encode()) == data
    manifest = Manifest.parse(data)
    assert manifest.is_container
    assert manifest.media_type == MANIFEST_TYPE
    assert manifest.config.digest == DIGEST
    assert [layer.media_type for layer in manifest.layers] == [
        *(f"{TAR}+gzip", TAR, f"{TAR}+zstd"),
        *(TAR.replace("layer", "layer.nondistributable") + "+gzip", "x/y"),
    ]
    assert [layer.size for layer in manifest.layers] == list(range(5))
    assert manifest.layers[0].annotations == {"k": "é"}
    assert convert_docker(data) == data


def test_this_machine_has_a_platform() -> None:
    platform = native_platform()
    assert platform.os == "linux"
    assert platform.architecture not in ("", "x86_64", "aarch64")
    assert platform.variant is None
