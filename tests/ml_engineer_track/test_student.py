"""A student is its teacher where nothing is cut off, has the promised size where something is, and cannot be too large."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from ml_engineer_track import finetune as ft
from ml_engineer_track import student as st
from ml_engineer_track.finetune import Example
from shared.errors import UserError
from shared.settings import BASE_MODEL, Distill, load_settings, preset_names

SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "eos_token_id": 1, "pad_token_id": 0,
    "bos_token_id": None,
}  # fmt: skip
FAMILIES = [
    LlamaConfig(tie_word_embeddings=True, **SIZES),
    LlamaConfig(tie_word_embeddings=False, **SIZES),
    Qwen2Config(tie_word_embeddings=False, **SIZES),
    Qwen3Config(tie_word_embeddings=True, head_dim=16, **SIZES),
]


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ft, "compute_dtype", lambda target: torch.float32)


def sizes(hidden: int, layers: int, intermediate: int) -> Distill:
    made = load_settings("smoke").distill
    return made.model_copy(update={"hidden": hidden, "layers": layers, "intermediate": intermediate})


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    """Random weights; gains, norms and biases away from 1 and 0, so that a forgotten one shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and not (name == "model.norm.weight" and config.tie_word_embeddings):
                parameter.uniform_(0.5, 1.5)
            if name.endswith("bias"):
                parameter.normal_()
    return model


def some_text(vocab: int, rows: int = 3) -> ft.Batch:
    numbers = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, vocab, (12 + 5 * n,), generator=numbers).tolist() for n in range(rows)]
    return ft.collate([Example(ids, [1.0] * 4) for ids in texts], 0)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: f"{c.model_type}-{'tied' if c.tie_word_embeddings else 'untied'}")
@torch.no_grad()
def test_a_student_from_which_nothing_is_cut_says_what_its_teacher_says(config: PreTrainedConfig) -> None:
    """The stream is turned and every gain moved into a matrix, and none of it may change a logit."""
    teacher, batch = model_of(config), some_text(128)
    student = st.sliced_student(teacher, sizes(32, 3, 48), [batch])
    assert not torch.allclose(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight, atol=1e-2)
    torch.testing.assert_close(ft.reply_logits(student, batch), ft.reply_logits(teacher, batch), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_is_cut_off_is_what_matters_least() -> None:
    """A teacher whose stream uses 8 of 32 dimensions, in some rotation, loses nothing when it is cut to 8."""
    teacher = model_of(FAMILIES[1])
    basis = torch.linalg.qr(torch.randn(32, 32))[0][:, :8]
    teacher.model.embed_tokens.weight.copy_(torch.randn(128, 8) @ basis.T)
    for layer in teacher.model.layers:
        layer.self_attn.o_proj.weight.copy_(basis @ (basis.T @ layer.self_attn.o_proj.weight))
        layer.mlp.down_proj.weight.copy_(basis @ (basis.T @ layer.mlp.down_proj.weight))
        layer.mlp.down_proj.weight[:, 10:] = 0  # and most of its neurons say nothing
    batch = some_text(128)
    student = st.sliced_student(teacher, sizes(8, 3, 10), [batch])
    assert student.model.embed_tokens.weight.shape == (128, 8)
    torch.testing.assert_close(ft.reply_logits(student, batch), ft.reply_logits(teacher, batch), rtol=1e-3, atol=1e-3)


def test_layers_are_kept_at_even_distances() -> None:
    assert st.kept_layers(9, 5) == [0, 2, 4, 6, 8]
    assert st.kept_layers(9, 9) == list(range(9))
    assert st.kept_layers(30, 15)[0] == 0
    assert st.kept_layers(30, 15)[-1] == 29
    assert len(set(st.kept_layers(30, 15))) == 15
    assert st.kept_layers(4, 1) == [0]


def test_shapes_are_those_that_were_asked_for() -> None:
    student = st.sliced_student(model_of(FAMILIES[0]), sizes(16, 2, 24), [some_text(128)])
    shapes = {name: tuple(p.shape) for name, p in student.named_parameters()}
    assert shapes["model.embed_tokens.weight"] == (128, 16)
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (32, 16)  # heads keep their number and size
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (16, 16)
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (16, 24)
    assert "model.layers.2.mlp.down_proj.weight" not in shapes
    assert student.config.head_dim == 8
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_the_students_of_all_presets_of_the_bundled_model_are_at_most_a_third() -> None:
    teacher = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BASE_MODEL))
    for name in ("tiny", "smoke"):
        student = st.blank_student(st.student_config(teacher.config, load_settings(name).distill), 0)
        assert 0 < st.check_size(student, teacher) <= 1 / 3


#: what the presets of public models name, as their config.json on the hub has it
PUBLIC = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "smollm2-360m": LlamaConfig(
        vocab_size=49152, hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
        num_key_value_heads=5, tie_word_embeddings=True,
    ),
    "qwen3-0.6b": Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
}  # fmt: skip


def test_every_preset_of_a_public_model_has_a_student_of_at_most_a_third() -> None:
    assert set(PUBLIC) | {"tiny", "smoke", "loop"} == set(preset_names())
    for name, config in PUBLIC.items():
        with torch.device("meta"):
            teacher = AutoModelForCausalLM.from_config(config)
            student = AutoModelForCausalLM.from_config(st.student_config(config, load_settings(name).distill))
        assert 0.2 < st.check_size(student, teacher) <= 1 / 3, name


def test_a_student_that_is_too_large_is_refused() -> None:
    teacher = model_of(FAMILIES[0])
    student = st.blank_student(st.student_config(teacher.config, sizes(32, 2, 48)), 0)
    with pytest.raises(UserError, match=r"of its teacher's .* at most a third is allowed in distill.hidden"):
        st.check_size(student, teacher)
    with pytest.raises(UserError, match=r"hidden_size 64 is more than the teacher's 32 in distill.hidden"):
        st.student_config(teacher.config, sizes(64, 2, 48))
    with pytest.raises(UserError, match=r"num_hidden_layers 4 .* in distill.layers"):
        st.student_config(teacher.config, sizes(16, 4, 48))


def test_other_families_are_refused() -> None:
    config = LlamaConfig(**SIZES)
    config.model_type = "gpt2"
    with pytest.raises(UserError, match="no student can be cut out of a model of type 'gpt2'"):
        st.student_config(config, sizes(16, 2, 24))


def test_a_blank_student_is_the_same_every_time() -> None:
    config = LlamaForCausalLM(FAMILIES[0]).config
    first, again, other = (st.blank_student(config, seed).model.embed_tokens.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
