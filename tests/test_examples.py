"""The examples run, and keep the promises of the layer: padding reaches nothing, and so does the future."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM, TrainingArguments

from mixture_of_tokens import GroupedTrainer, MixtureOfTokens, audit_model, calibrate_companions
from mixture_of_tokens.data.groups import GroupedBatches
from mixture_of_tokens.data.prepare import prepare_text

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def llama():
    return runpy.run_path(str(EXAMPLES / "llama.py"))


@pytest.fixture(scope="module")
def plain():
    return runpy.run_path(str(EXAMPLES / "pytorch.py"))


@pytest.fixture
def model(llama):
    torch.manual_seed(0)
    return llama["build"](97).double().eval()


def some_tokens(rows: int = 32, length: int = 12) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(1))


def test_the_loss_falls(llama, small_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path))
    text = prepare_text([str(small_corpus)], context=16)
    torch.manual_seed(0)
    losses = llama["train"](llama["build"](len(text.tokenizer)), text.train, steps=25)
    assert len(losses) == 25
    assert capsys.readouterr().out.count("loss") == 3  # of steps 0, 20 and 24
    assert losses[-1] < losses[0] - 0.5


def test_a_trainer_of_transformers_trains_it_and_it_is_loaded_as_it_was(llama, small_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path / "cache"))
    text = prepare_text([str(small_corpus)], context=16)
    rows = GroupedBatches(text.train, group_size=16, batch_size=32, steps=3, seed=0)
    model = llama["build"](len(text.tokenizer))
    how = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    GroupedTrainer(model, how, train_dataset=rows).train()
    model.eval().save_pretrained(tmp_path / "model")
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *given, **options: empty_like(*given, **options).fill_(7))
    again = llama["MixedLlama"].from_pretrained(tmp_path / "model").eval()
    assert [float(again.model.layers[i].mlp.gate.temperature) for i in (2, 3)] == [0.25, 0.25]
    batch = {name: tensor[:16] for name, tensor in rows.__getitems__(list(range(32))).items()}
    with torch.no_grad():
        plain = F.cross_entropy(model(batch["input_ids"]).logits.flatten(0, 1), batch["shift_labels"].flatten())
        torch.testing.assert_close(model(**batch).loss, plain)
        torch.testing.assert_close(again(**batch).loss, plain, rtol=0, atol=1e-6)


def test_it_is_made_of_a_plain_llama_s_checkpoint_with_layers_that_are_drawn(llama, tmp_path):
    config = llama["build"](97).config
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    mixed = llama["MixedLlama"].from_pretrained(tmp_path)
    drawn = llama["build"](97)
    for name, weight in mixed.named_parameters():
        wanted = drawn.get_parameter(name).std()
        assert torch.allclose(weight.std(), wanted, rtol=0.3, atol=1e-6), name
    layer = mixed.model.layers[2].mlp
    assert not layer.companion.any()
    assert not layer.companion_logit.any()
    kept = LlamaForCausalLM.from_pretrained(tmp_path).model.layers[0].mlp.up_proj.weight
    assert torch.equal(mixed.model.layers[0].mlp.up_proj.weight, kept)


def test_its_audit_finds_it_causal_and_its_groups_shared(model):
    found = audit_model(model, group_size=16, batches=1)
    assert found.causal
    assert not found.private
    assert "causal: yes; private: no" in str(found)
    model.model.layers[2].self_attn.register_forward_hook(lambda _, args, out: (out[0].flip(1), *out[1:]))
    assert not audit_model(model, group_size=16, batches=1).causal
    with pytest.raises(ValueError, match="group_size must be at least 1, not 0"):
        audit_model(model, group_size=0)


def test_a_model_of_plain_torch_is_trained_in_groups_and_served_alone(plain, small_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path))
    text = prepare_text([str(small_corpus)], context=16)
    torch.manual_seed(0)
    model = plain["LanguageModel"](len(text.tokenizer))
    losses = plain["train"](model, text.train, steps=25)
    assert losses[-1] < losses[0] - 0.5
    losses = plain["served"](model, text.train, text.validation)
    assert losses["alone"] < losses["in groups"]
    assert abs(losses["alone, 2 experts"] - losses["alone"]) < 0.05
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    again = plain["LanguageModel"](len(text.tokenizer)).eval()
    again.load_state_dict(torch.load(path))
    again.serve_alone(num_experts_alone=2)
    ids = some_tokens() % len(text.tokenizer)
    assert torch.equal(again(ids), model(ids))  # as `served` left it
    assert audit_model(again, vocab_size=97, length=12, group_size=16, batches=1).private
    again.serve_alone(False)
    found = audit_model(again, vocab_size=97, length=12, group_size=16, batches=1)
    assert (found.causal, found.private) == (True, False)


class Own(torch.nn.Module):
    """A model of nobody's library: it looks back by a mean over the tokens before, and returns a tensor."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(30, 8), torch.nn.Linear(8, 30)
        self.layer = MixtureOfTokens(8, 6, 5, group_size=4)
        self.looks_ahead = False

    def forward(self, ids):
        x = self.embedding(ids)
        x = x.cumsum(1) / torch.arange(1, 1 + ids.shape[1], device=ids.device)[:, None]
        x = x + self.layer(x)
        return self.head(x.flip(1) if self.looks_ahead else x)


def test_a_model_that_is_not_transformers_is_audited_too():
    torch.manual_seed(0)
    model = Own()
    found = audit_model(model, vocab_size=30, length=9, group_size=4)
    assert (found.causal, found.private, found.length) == (True, False, 9)
    model.layer.serve_alone(num_experts_alone=2)
    assert audit_model(model, vocab_size=30, length=9, group_size=4).private
    for length in (2, 3):
        assert audit_model(model, vocab_size=30, length=length, group_size=4).private
    model.looks_ahead = True
    assert not audit_model(model, vocab_size=30, length=2, group_size=4).causal
    assert not audit_model(model, vocab_size=30, length=9, group_size=4).causal
    assert audit_model(model.bfloat16(), vocab_size=30, length=9, group_size=4).leaks.noise < 1e-4  # in float32
    assert (model.head.weight.dtype, model.training) == (torch.bfloat16, True)  # of a copy
    with pytest.raises(ValueError, match="give vocab_size: Own has no config"):
        audit_model(model)
    with pytest.raises(
        ValueError, match=r"Own does not take tokens \(8, 64\) below 99: .*give the length and vocab_size"
    ):
        audit_model(model, vocab_size=99, group_size=4)
    with pytest.raises(ValueError, match="length must be at least 2, not 1"):
        audit_model(model, vocab_size=30, length=1)


@torch.no_grad()
@pytest.mark.parametrize("named", [False, True])
def test_companions_of_a_model_that_is_not_transformers(named):
    torch.manual_seed(0)
    model, ids = Own().train(), torch.randint(30, (8, 3))
    calibrate_companions(model, [{"ids": ids}] if named else [ids])
    assert model.training
    x = model.embedding(ids)
    x = (x.cumsum(1) / torch.arange(1, 4)[:, None]).unflatten(0, (2, 4)).transpose(1, 2).flatten(0, 1)  # six groups
    weights = (x @ model.layer.gate.weight.T).softmax(1)
    torch.testing.assert_close(model.layer.companion, torch.einsum("mge,mgd->ed", weights, x) / 6)


@torch.no_grad()
def test_padding_reaches_nothing(model):
    """Rows of both groups end early; what stands in their padding changes no logit of a token that is real."""
    tokens, mask = some_tokens(), torch.ones(32, 12, dtype=torch.long)
    mask[3, 7:], mask[4, 1:], mask[20, 5:] = 0, 0, 0
    real, other = mask.bool(), torch.where(mask.bool(), tokens, (tokens + 41) % 97)
    before, after = (model(ids, attention_mask=mask).logits for ids in (tokens, other))
    torch.testing.assert_close(after[real], before[real], rtol=0, atol=0)
    unmasked, moved = (model(ids).logits for ids in (tokens, other))  # without the mask it does
    assert (unmasked - moved)[:, 8:][real[:, 8:]].abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
def test_rows_that_are_served_alone_are_written_as_by_themselves(model, cached):
    """Of a batch in which a short prompt is padded on the left, and a row goes on behind its end."""
    for layer in (module for module in model.modules() if isinstance(module, MixtureOfTokens)):
        torch.nn.init.normal_(layer.gate.weight)
        torch.nn.init.normal_(layer.companion)
        layer.serve_alone()
    how: dict = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": cached}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    tokens, mask = some_tokens(rows=2), torch.ones(2, 12, dtype=torch.long)
    tokens[1, :8], mask[1, :8] = 0, 0
    both = model.generate(tokens, attention_mask=mask, **how)
    for row, ids in enumerate((tokens[:1], tokens[1:, 8:])):
        own = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        assert both.sequences[row, 12:].tolist() == own.sequences[0, ids.shape[1] :].tolist()
        for together, by_itself in zip(both.logits, own.logits, strict=True):
            torch.testing.assert_close(together[row], by_itself[0], rtol=0, atol=1e-6)


@torch.no_grad()
def test_no_token_sees_the_future_but_it_sees_its_group(model):
    tokens, k = some_tokens(), 5
    later, mates = tokens.clone(), tokens.clone()
    later[:, k:] = (tokens[:, k:] + 13) % 97  # in all rows
    mates[1] = (tokens[1] + 13) % 97
    before = model(tokens).logits
    torch.testing.assert_close(model(later).logits[:, :k], before[:, :k], rtol=0, atol=0)
    moved = (model(mates).logits - before).abs().amax((1, 2))
    assert moved[2] > 1e-6
    assert moved[16:].max() == 0  # another group
