"""The fidelity benchmark's own arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.fidelity.metrics import Scores, estimate, relative_perplexity
from benchmarks.fidelity.needle import count_hits, needle_texts
from benchmarks.fidelity.outliers import inject
from benchmarks.fidelity.served import diverges_at
from sgl_kvq.fidelity.history import FormatHistory
from sgl_kvq.fidelity.teacher import Teacher, page_attention
from sgl_kvq.formats.base import PAGE_SIZE


@pytest.mark.parametrize("window_pages", [0, 1, 2])
def test_recent_pages_from_rows_and_earlier_pages_as_stored(window_pages: int) -> None:
    """Against one softmax over both, with more queries than one call takes."""
    torch.manual_seed(0)
    q, k, v, read_k, read_v = torch.randn(5, 3, 13 * PAGE_SIZE, 64, dtype=torch.float64)
    position = torch.arange(q.shape[1])
    page = position // PAGE_SIZE
    own = page[:, None] - page <= window_pages
    scores = torch.where(own, q @ k.transpose(1, 2), q @ read_k.transpose(1, 2)) / 8
    scores = scores.masked_fill(position[:, None] < position, -torch.inf)
    weights = scores.softmax(-1)
    expected = (weights * own) @ v + (weights * ~own) @ read_v
    found = page_attention(q, (k, v), (read_k, read_v), 1 / 8, window_pages)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_16_bits_equal_the_model_of_transformers(tiny_model_path: str, text_ids: list[int]) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(text_ids[:200])
    teacher = Teacher(tiny_model_path)
    found = teacher.hidden(ids, FormatHistory("bf16", teacher.model.config))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    with torch.inference_mode():
        expected = model.model(input_ids=ids[None]).last_hidden_state[0]
    assert (found - expected).abs().max() < 0.02  # rows are rounded to bfloat16
    other = teacher.hidden(ids, FormatHistory("hack2", teacher.model.config))
    assert (other[: 2 * PAGE_SIZE] - found[: 2 * PAGE_SIZE]).abs().max() > 0
    assert torch.equal(other[:PAGE_SIZE], found[:PAGE_SIZE])  # nothing is read in codes yet


def test_a_model_whose_configuration_has_no_head_dim(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}
    config = Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, vocab_size=99)
    assert not hasattr(config, "head_dim")
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "plain")
    inject(tmp_path / "plain", tmp_path / "outliers")
    ids = torch.randint(99, (150,))
    hidden = {}
    for name in ("plain", "outliers"):
        teacher = Teacher(tmp_path / name)
        histories = [FormatHistory(x, teacher.model.config) for x in ("bf16", "kvq2")]
        hidden[name], other = (teacher.hidden(ids, history) for history in histories)
        assert (hidden[name] - other).abs().max() > 0
    torch.testing.assert_close(hidden["plain"], hidden["outliers"], rtol=0, atol=0)


def test_injected_outliers_change_keys_and_nothing_else(
    tiny_model_path: str, text_ids: list[int], tmp_path: Path
) -> None:
    inject(Path(tiny_model_path), tmp_path / "outliers")
    ids = torch.tensor(text_ids[:300])
    plain, changed = Teacher(tiny_model_path), Teacher(tmp_path / "outliers")
    weights = [
        teacher.model.model.layers[0].self_attn.k_proj.weight for teacher in (plain, changed)
    ]
    assert (weights[1].abs() > 4 * weights[0].abs()).float().mean() > 0.05

    def difference(name: str) -> float:
        found = [
            teacher.hidden(ids, FormatHistory(name, teacher.model.config))
            for teacher in (plain, changed)
        ]
        return float((found[0] - found[1]).abs().max())

    assert difference("bf16") == 0
    assert difference("int4") > 0.01


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(1)
    held = 0
    for _ in range(100):
        found = estimate(torch.randn(8192, generator=generator) + 1)
        held += found.low < 1 < found.high
        assert found.low < found.value < found.high
    assert 85 <= held <= 100
    nll = torch.full((256,), 2.0)
    same = relative_perplexity(Scores(nll + 0.1, nll, nll, nll))
    assert same.value == pytest.approx(0.10517, abs=1e-4)


def test_needles_ask_for_what_the_text_holds(model_path: str, tiny_model_path: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    (text,) = needle_texts(tokenizer, 1024, 1)
    assert len(text.ids) <= 1024
    decoded = tokenizer.decode(text.ids)
    for answer in text.answers:
        number = tokenizer.decode(text.ids[answer.start : answer.stop]).strip()
        assert decoded.count(f"is {number}.") == 2  # hidden once, answered once
    guessing = Teacher(tiny_model_path)  # random weights find nothing
    assert count_hits(guessing, [text], FormatHistory("bf16", guessing.model.config)) == 0


@pytest.mark.parametrize(
    ("found", "step"), [([1, 2, 3], 3), ([1, 5, 3], 1), ([0, 2, 3], 0)], ids=str
)
def test_divergence_step(found: list[int], step: int) -> None:
    assert diverges_at(found, [1, 2, 3]) == step
