"""What both instances must have in common, and the message when they do not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack  # type: ignore[import-untyped]
import xxhash

from sgl_kvq.errors import TransferError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.transfer.protocol.messages import Fingerprint

if TYPE_CHECKING:
    from sgl_kvq.config import KVQuantConfig
    from sgl_kvq.formats.page_layout import PageLayout

DIGESTS = ("weights", "config", "tokenizer")
"""Values that say nothing to a person, and that are nobody else's business."""
_SAMPLE_BYTES = 1024


def make_fingerprint(
    config: KVQuantConfig,
    layouts: tuple[PageLayout, ...],
    num_kv_heads: int,
    weights: str,
    calibration: str = "unset",
    identity: Fingerprint | None = None,
) -> Fingerprint:
    """Everything that decides what a page's bytes mean, and whether they are of the same model.

    Args:
        config: The options of `--kv-quant`.
        layouts: Layout of a page row of this rank, by layer.
        num_kv_heads: KV heads of the model, over all ranks.
        weights: What `weights_digest` returned.
        calibration: Digest of the file that `--kv-quant-config` names, "unset" without one.
        identity: What else of the model decides its KV, such as its configuration.
    """
    layout = layouts[0]
    return {
        "format": config.format,
        "K coding": _by_layer([repr(layout.format.k) for layout in layouts]),
        "V coding": _by_layer([repr(layout.format.v) for layout in layouts]),
        "head bytes": _by_layer([str(layout.head_bytes) for layout in layouts]),
        "page fields": _by_layer([_fields(layout) for layout in layouts]),
        "page size": PAGE_SIZE,
        "prefill mode": config.prefill,
        "sink tokens": config.sink_tokens,
        "Hadamard order": layout.rotation_order,
        "head_dim": layout.head_dim,
        "KV heads": num_kv_heads,
        "row type": str(layout.row_dtype),
        "layers": len(layouts),
        "weights": weights,
        "--kv-quant-config": calibration,
        **(identity or {}),
    }


def _fields(layout: PageLayout) -> str:
    return ",".join(f"{name}@{field.offset_bytes}" for name, field in layout.fields.items())


def _by_layer(values: list[str]) -> str:
    """What all layers have, or a digest of what each has: texts on the wire are bounded."""
    if len(set(values)) == 1:
        return values[0]
    return f"by layer, digest {xxhash.xxh3_64_hexdigest(';'.join(values).encode())}"


def digest(fingerprint: Fingerprint) -> int:
    """uint64 of a fingerprint; every block header carries it."""
    return xxhash.xxh3_64_intdigest(msgpack.packb(sorted(fingerprint.items())))


def check_fingerprint(prefill: Fingerprint, decode: Fingerprint) -> None:
    """Refuse two instances that do not fit together.

    Raises:
        TransferError: every differing field, with both sides' values unless they are digests.
    """
    names = [*prefill, *(name for name in decode if name not in prefill)]
    differences = [
        name
        if name in DIGESTS
        else f"{name}: prefill {prefill.get(name, 'unset')}, decode {decode.get(name, 'unset')}"
        for name in names
        if prefill.get(name) != decode.get(name)
    ]
    if differences:
        raise TransferError(
            f"prefill and decode instances differ in {'; '.join(differences)}; start both with the "
            f"same model and --kv-quant options"
        )


def check_codec(codec: str, package: str | None, decodable: list[str]) -> None:
    """Refuse a decode instance that cannot undo the codec of the prefill instance.

    Args:
        codec: Name of the codec that the prefill instance sends with.
        package: What pip installs for it; None if it needs nothing.
        decodable: Names of the codecs that the decode instance can undo.

    Raises:
        TransferError: the codec is not among them; the message says what to install.
    """
    if codec not in decodable:
        install = f"pip install {package}" if package else "install the same sgl_kvq on both"
        raise TransferError(
            f"--kv-quant-transfer-codec {codec}: the decode instance can undo "
            f"{', '.join(decodable) or 'none'}; on its machine: {install}"
        )


def weights_digest(model_path: str) -> str:
    """Digest of a model's weights, from three samples of every tensor.

    Reads 3 KiB a tensor instead of the whole file: retrained weights differ everywhere.

    Args:
        model_path: `--model-path`, a folder or a name in the local Hugging Face cache.

    Returns:
        16 hexadecimal digits; of the path itself when no weight file is found.
    """
    folder = local_folder(model_path)
    state = xxhash.xxh3_64()
    files = sorted(folder.glob("*.safetensors")) if folder else []
    files = files or (sorted(folder.glob("*.bin")) if folder else [])
    if not files:
        return xxhash.xxh3_64_hexdigest(model_path.encode())
    for path in files:
        for sample in _samples(path):
            state.update(sample)
    return state.hexdigest()


def local_folder(model_path: str) -> Path | None:
    """Folder of a model that is given by its path, or by its name in the Hugging Face cache."""
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model_path, local_files_only=True))
    except (OSError, ValueError):
        return None


def _samples(path: Path) -> list[bytes]:
    """Header of a weight file and the first, middle and last bytes of each tensor."""
    with path.open("rb") as file:
        size = path.stat().st_size
        header_bytes = int.from_bytes(file.read(8), "little") if path.suffix != ".bin" else 0
        header = file.read(header_bytes)
        samples = [size.to_bytes(8, "little"), header]
        for begin, end in _tensor_ranges(header) or [(0, size - 8 - header_bytes)]:
            for offset in (begin, (begin + end) // 2, max(begin, end - _SAMPLE_BYTES)):
                file.seek(8 + header_bytes + offset)
                samples.append(file.read(min(_SAMPLE_BYTES, end - offset)))
        return samples


def _tensor_ranges(header: bytes) -> list[tuple[int, int]]:
    """Byte ranges of the tensors of a safetensors header, in order."""
    if not header:
        return []
    import json

    tensors: dict[str, Any] = json.loads(header)
    return sorted(
        (int(tensor["data_offsets"][0]), int(tensor["data_offsets"][1]))
        for name, tensor in tensors.items()
        if name != "__metadata__"
    )
