"""Print the table of `patches/README.md` from the plugin's own table of hooks.

Usage: python scripts/hook_table.py
"""

from __future__ import annotations

from tabulate import tabulate


def hook_table() -> str:
    """Every place where this package enters SGLang: how, and what for."""
    from sgl_kvq.host import names, plugin

    rows = [
        [names.SERVER_ARGS, "replaced by a subclass", "the `--kv-quant` options"],
        *([hook.target, "around", hook.purpose] for hook in plugin.HOOKS),
        [names.NAMES["register_attention_backend"], "registered", "the attention backend"],
        [names.NAMES["TransferBackend"], "registered", "the transfer backend of PD"],
        ["entry point `sglang.srt.platforms`", "registered", "a CPU platform without accelerator"],
    ]
    cells = [[_shorten(target), kind, purpose] for target, kind, purpose in rows]
    return str(tabulate(cells, ["hook", "kind", "what for"], tablefmt="github"))


def _shorten(target: str) -> str:
    if target.startswith("entry point"):
        return target
    return f"`{target.removeprefix('sglang.srt.').replace(':', '.')}`"


if __name__ == "__main__":
    print(hook_table())
