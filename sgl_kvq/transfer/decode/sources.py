"""Which prefill ranks a transfer comes from, and whether they hold all its KV heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from sgl_kvq.errors import TransferError
from sgl_kvq.memory_pool.page_io.span import HeadRange


class Source(NamedTuple):
    """A prefill rank that passed the handshake.

    Args:
        endpoint: tcp:// address.
        instance: Random number of its process, uint64.
        heads: Those of the decode rank's KV heads that it holds.
    """

    endpoint: str
    instance: int
    heads: HeadRange


def check_sources(sources: Sequence[Source], wanted: HeadRange) -> None:
    """Refuse prefill ranks that do not hold exactly the heads of a decode rank.

    SGLang gives a head to several ranks when there are more ranks than heads. Each of them then
    holds one head, and each head is held by equally many; otherwise every head has one source.

    Args:
        sources: All prefill ranks of a transfer.
        wanted: KV heads of the decode rank.

    Raises:
        TransferError: two addresses lead to one process, or a head is missing or held too often.
    """
    by_instance: dict[int, str] = {}
    for source in sources:
        other = by_instance.setdefault(source.instance, source.endpoint)
        if other != source.endpoint:
            raise TransferError(
                f"expected one address for each prefill rank, but {other} and {source.endpoint} "
                f"are the same process; check what the bootstrap server was told"
            )
    holders = Counter(head for source in sources for head in _range(source.heads))
    missing = [head for head in _range(wanted) if not holders[head]]
    replicas = min(holders.values(), default=0) if _single_heads(sources) else 1
    doubled = [head for head in _range(wanted) if holders[head] > replicas]
    if missing or doubled:
        faults = [f"no rank holds {_list(missing)}"] if missing else []
        faults += [f"several hold {_list(doubled)}"] if doubled else []
        held = ", ".join(f"{s.endpoint} {s.heads.first} to {s.heads.end - 1}" for s in sources)
        raise TransferError(
            f"KV heads {wanted.first} to {wanted.end - 1}: expected each at one prefill rank, but "
            f"{' and '.join(faults)} ({held}); check what the bootstrap server was told"
        )


def _range(heads: HeadRange) -> range:
    return range(heads.first, heads.end)


def _single_heads(sources: Sequence[Source]) -> bool:
    return all(source.heads.count == 1 for source in sources)


def _list(heads: list[int]) -> str:
    return f"head{'s' if len(heads) > 1 else ''} {', '.join(map(str, heads))}"
