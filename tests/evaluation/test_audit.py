"""`mot audit`: what it passes, and the faults that it has to find."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mixture_of_tokens import ExpertChoice
from mixture_of_tokens.data.blocks import Blocks
from mixture_of_tokens.evaluation import audit
from mixture_of_tokens.evaluation.audit import Audit, audit_model
from mixture_of_tokens.runs.loading import group_size_of, text_of
from mixture_of_tokens.settings.routings import TABLE
from processes import mot
from routings import randomized, small_model, tiny


def build(kind: str):
    return small_model(kind, max_position_embeddings=40)


def audited(model) -> Audit:
    return audit_model(model, group_size=group_size_of(model))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.kind)
def test_every_routing_keeps_the_promises_of_its_row(row):
    found = audited(build(row.kind))
    assert found.causal == row.causal
    assert found.private == row.private
    assert found.leaks.noise < 1e-4 < found.leaks.moved
    if not row.causal:
        assert found.leaks.future["its own"] > 100 * found.leaks.allowed
        assert found.leaks.mates <= found.leaks.allowed


def test_influence_is_measured_by_position_and_by_block():
    found = audited(build("mixture_of_tokens"))
    assert all(value > 0 for value in found.leaks.kl_mean)
    assert all(a >= b for a, b in zip(found.leaks.kl_largest, found.leaks.kl_mean, strict=True))
    assert found.leaks.layers[0] == 0  # the first block is dense
    assert found.leaks.layers[1] > 0.01
    assert audited(build("dense")).leaks.top1_flips == [0, 0, 0, 0]


def test_the_last_block_is_looked_at_before_the_final_norm():
    model = build("mixture_of_tokens")
    before = audited(model).leaks.layers
    with torch.no_grad():
        model.model.norm.weight[1:] = 0  # of what comes out of it, one number is left
    assert audited(model).leaks.layers == before


class InFloat32(nn.Module):
    """Casts by itself, so that a copy in float64 does not run."""

    def __init__(self, leaks: bool):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(50, 16), nn.LayerNorm(16), nn.Linear(16, 50)
        self.mix = nn.GRU(16, 16, batch_first=True)
        self.leaks = leaks

    def forward(self, ids):
        x = self.norm(self.embed(ids).float())
        return self.head(self.mix(x.flip(1) if self.leaks else x)[0])


def test_a_model_that_does_not_run_in_float64_is_audited():
    with pytest.raises(RuntimeError):
        InFloat32(leaks=False).double()(torch.zeros(1, 2, dtype=torch.long))
    sound, leaking = (audit_model(InFloat32(leaks), vocab_size=50, length=9) for leaks in (False, True))
    assert sound.causal
    assert sound.private
    assert 1e-8 < sound.leaks.noise < 1e-5
    assert not leaking.causal


class AlongTheSequence(nn.Module):
    """Expert Choice with the positions of a text for a group."""

    def __init__(self, config):
        super().__init__()
        sizes = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.layer = ExpertChoice(*sizes, group_size=12)

    def forward(self, x, token_mask=None):
        return self.layer(x.transpose(0, 1), token_mask.T).transpose(0, 1)


class Peeks(nn.Module):
    """Adds a little of the next position, or of the next position of the next text in the batch."""

    def __init__(self, mate: bool):
        super().__init__()
        self.mate = mate

    def forward(self, x, token_mask=None):
        later = x.roll(-1, dims=1) * torch.arange(1, x.shape[1] + 1).ne(x.shape[1])[:, None]
        return 1e-2 * (later.roll(1, dims=0) if self.mate else later)


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (AlongTheSequence, "its own"),
        (lambda config: Peeks(mate=False), "its own"),
        (lambda config: Peeks(mate=True), "the other rows'"),
    ],
    ids=["Expert Choice along the sequence", "next position", "next position of a mate"],
)
def test_planted_leaks_are_found(fault, where):
    model = build("dense")
    model.model.layers[1].mlp = randomized(fault(model.config))
    found = audited(model)
    assert not found.causal
    assert not found.private
    assert found.leaks.future[where] > 100 * found.leaks.allowed


class ReadsWhere(nn.Module):
    """Random logits of tokens, to which some positions of some rows add others' tokens."""

    def __init__(self, leak):
        super().__init__()
        self.leak, self.head = leak, nn.Embedding(50, 50)

    def forward(self, ids):
        own = self.head(ids)
        return own + 0.01 * self.leak(own)


def at(*positions: int):
    """A leak from the next token, at these positions alone."""

    def leak(own):
        where = torch.zeros(own.shape[1], 1)
        where[list(positions)] = 1
        return where * own.roll(-1, dims=1)

    return leak


@pytest.mark.parametrize("position", range(15))
def test_a_leak_at_a_single_position_is_found(position):
    torch.manual_seed(0)
    for seed in range(3):
        assert not audit_model(ReadsWhere(at(position)), vocab_size=50, length=16, seed=seed).causal
    assert audit_model(ReadsWhere(at()), vocab_size=50, length=16).private


def test_texts_of_one_token_are_refused():
    with pytest.raises(ValueError, match="texts of one token have no later ones"):
        audit_model(tiny("dense", max_position_embeddings=1))


def test_a_model_of_ones_own_is_looked_at_as_far_as_is_asked():
    for length in (None, 128):
        found = audit_model(ReadsWhere(at(80) if length else at()), vocab_size=50, length=length, batches=1)
        assert (found.length, found.causal) == ((64, True), (128, False))[length is not None]


@pytest.mark.parametrize("one", [0, 3, 7])
@pytest.mark.parametrize("reads", [True, False])
def test_a_leak_of_a_single_row_is_found(reads, one):
    """One row reads all others, or is read by all others."""

    def leak(own):
        where = (torch.arange(len(own)) == one)[:, None, None]
        return torch.where(where, own.mean(0), 0) if reads else torch.where(where, 0, own[one])

    torch.manual_seed(0)
    for seed in range(6):
        found = audit_model(ReadsWhere(leak), vocab_size=50, length=16, seed=seed)
        assert found.causal
        assert not found.private


def test_what_is_no_module_is_told():
    with pytest.raises(ValueError, match="audit_model takes a module, not str; audit takes a run"):
        audit_model("runs/mine")  # pyright: ignore[reportArgumentType]


def test_logits_that_a_later_token_makes_no_numbers_are_a_leak():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Embedding(50, 50)

        def forward(self, ids):
            return torch.where((ids[:, 2:] == 7).any(1)[:, None, None], torch.nan, self.head(ids))

    torch.manual_seed(0)
    for seed in range(6):
        assert not audit_model(Breaks(), vocab_size=50, length=16, seed=seed).causal


def test_a_model_that_looks_at_nothing_passes_as_nothing(tmp_path, capsys):
    model = build("dense")
    nn.init.zeros_(model.lm_head.weight)
    model.lm_head.register_forward_hook(lambda module, x, y: y + torch.arange(37.0))
    found = audited(model)
    assert not found.causal
    assert not found.private
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        mot("audit", tmp_path, "--expect", "causal", "--batches", 1)
    shown, told = capsys.readouterr(), "not tested: its logits do not move with its input"
    assert shown.out.endswith(f"\n{told}\n")
    assert shown.err.endswith(f"mot: {tmp_path} is {told}\n")


def test_batch_mates_of_a_dense_model_that_reads_its_neighbour_are_found():
    class Neighbour(nn.Module):
        def forward(self, x, token_mask=None):
            return 1e-3 * x.roll(1, dims=0)

    model = build("dense")
    model.model.layers[0].mlp = Neighbour()
    found = audited(model)
    assert found.causal
    assert not found.private


@pytest.mark.usefixtures("tiny_cache")
@pytest.mark.parametrize(
    ("name", "private"),
    [pytest.param("Transformer-Nano", True, marks=pytest.mark.slow), ("MoT-Nano/4E/2", False), ("TC-Nano/4E", True)],
)
def test_the_command_s_exit_status_is_the_verdict(tiny_runs, name, private, capsys):
    run = str(tiny_runs[name])
    mot("audit", run, "--expect", "causal", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["causal"]
    assert found["private"] == private
    assert found["collisions"] == (None if private else 0)
    if private:
        mot("audit", run, "--expect", "private", "--batches", 1)
        assert "\ncausal: yes; private: yes" in capsys.readouterr().out
        assert (found["alone"], found["experts"]) == (False, None)
    else:
        with pytest.raises(SystemExit, match="1"):
            mot("audit", run, "--expect", "private", "--batches", 1)
        shown = capsys.readouterr().out
        assert "\ncausal: yes; private: no" in shown
        assert "--alone" in shown.splitlines()[-2]
        mot("audit", run, "--expect", "private", "--alone", "--experts", 2, "--batches", 1)
        assert "\nserved alone, by 2 experts: causal: yes; private: yes" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_cache")
def test_documents_that_meet_themselves_are_a_leak(tiny_runs, monkeypatch, capsys):
    run = tiny_runs["MoT-Nano/4E/2"]
    text = text_of(str(run))
    one = dataclasses.replace(text.train, ends=text.train.ends[-1:])  # all of it one document, not divided
    monkeypatch.setattr("mixture_of_tokens.evaluation.audit.text_of", lambda run: dataclasses.replace(text, train=one))
    with pytest.raises(SystemExit, match="1"):
        mot("audit", run, "--expect", "causal", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["collisions"] > 0
    assert not found["causal"]


def test_groups_are_those_of_the_training(monkeypatch):
    """Of 32 rows, though the model mixes 4 of them: a document of 16 of 640 blocks may be in two, of 4 rows in one."""
    tokens = np.zeros(640 * 4 + 1, dtype=np.int64)
    blocks = Blocks(tokens, np.append(np.arange(64, len(tokens) - 1, 64), len(tokens)), context=4)
    text = SimpleNamespace(train=blocks, validation=blocks)
    for size, meet in ((4, False), (32, True)):
        config = SimpleNamespace(group_size=size, seed=3, model_config=SimpleNamespace(group_size=4))
        monkeypatch.setattr(audit, "config_of", lambda run, config=config: config)
        found, share = audit.collisions_in("run", text)
        assert (found > 0) == (share > 0) == meet


@pytest.mark.parametrize(("flags", "looked"), [((), 64), (("--length", "8"), 8)])
@pytest.mark.usefixtures("tiny_cache")
def test_it_says_how_many_positions_it_has_looked_at(flags, looked, tiny_runs, capsys):
    mot("audit", tiny_runs["MoT-Nano/4E/2"], "--batches", 1, *flags)
    shown = capsys.readouterr().out
    assert ("Of the 64 positions the first 8 were looked at." in shown) == (looked == 8)
    with pytest.raises(SystemExit, match="2"):
        mot("audit", tiny_runs["MoT-Nano/4E/2"], "--length", 65)
    assert "length 65 is more than the 64 tokens that the model takes" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_cache")
def test_a_run_with_too_little_text_to_look_at_is_looked_at_with_random_tokens(tiny_runs, monkeypatch, capsys):
    run = tiny_runs["MoT-Nano/4E/2"]
    text = text_of(str(run))
    few = dataclasses.replace(text.validation, tokens=text.validation.tokens[np.arange(200)], ends=np.array([200]))
    monkeypatch.setattr(
        "mixture_of_tokens.evaluation.audit.text_of", lambda run: dataclasses.replace(text, validation=few)
    )
    mot("audit", run, "--expect", "causal")
    shown = capsys.readouterr()
    assert "looking at random tokens" in shown.err
    assert "in a group with another of their segment: 0" in shown.out
    assert "another part of their document, at least 64 tokens apart." in shown.out


def test_a_model_without_its_text_is_looked_at_with_random_tokens(tmp_path, capsys):
    build("token_choice").save_pretrained(tmp_path)
    mot("audit", tmp_path, "--expect", "private")
    assert "looking at random tokens" in capsys.readouterr().err


def test_bad_use_is_one_line(tmp_path, capsys):
    for words in (["./missing"], [str(tmp_path), "--batches", "0"], [str(tmp_path), "--expect", "secret"]):
        with pytest.raises(SystemExit, match="2"):
            mot("audit", *words)
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits[:, -1],
        lambda logits: logits.argmax(-1),
        lambda logits: logits.flatten(0, 1),
        lambda logits: logits.mean(),
        lambda logits: logits.mT,
        lambda logits: logits.transpose(0, 1),
        lambda logits: logits.argmax(-1, keepdim=True),
    ],
)
def test_a_model_whose_output_is_no_logits_is_refused(change):
    class Changed(nn.Sequential):
        def forward(self, ids):
            return change(super().forward(ids))

    with pytest.raises(ValueError, match=r"Changed gives .* logits are \(B, T, V\), floating point"):
        audit_model(Changed(nn.Embedding(50, 16), nn.Linear(16, 50)), vocab_size=50, length=9, batches=1)
