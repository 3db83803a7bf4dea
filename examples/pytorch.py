"""Mixture of Tokens in a model of plain PyTorch: trained in groups, served alone, saved and loaded.

    python examples/pytorch.py    # on a CPU, offline: about a minute, some of it for the text, once

The layer stands where a feed-forward does, behind a norm, and its output is added to the residual stream. It mixes the
rows of a batch, so rows of a group must come from different documents: `GroupedBatches` deals out such rows. Nothing is
padded here; where a row is, the layer takes a mask, as in llama.py.
"""

from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixture_of_tokens import (
    GroupedBatches,
    MixtureOfTokens,
    audit_model,
    calibrate_companions,
    prepare_text,
    score_tokens,
)
from mixture_of_tokens.data.blocks import Blocks

GROUP, WIDTH, HEADS, CONTEXT = 16, 32, 2, 64  # a batch is a multiple of GROUP, the texts that are mixed


class Block(nn.Module):
    """32 experts, each half as wide as a feed-forward of 96: the FLOPs of one, and 16 times its parameters."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mixture = MixtureOfTokens.matched(WIDTH, 96, GROUP, granularity=2, temperature=0.25)

    def forward(self, x_BTD: Tensor) -> Tensor:
        later = nn.Transformer.generate_square_subsequent_mask(x_BTD.shape[1], device=x_BTD.device)
        h = self.norms[0](x_BTD)
        x_BTD = x_BTD + self.attention(h, h, h, attn_mask=later, is_causal=True, need_weights=False)[0]
        return x_BTD + self.mixture(self.norms[1](x_BTD))


class LanguageModel(nn.Module):
    """Without embeddings of positions, which causal attention finds by itself.

    Learned ones, of nn.Embedding's size, do not go well with serving alone: what then stands for other texts is one
    average for all positions.
    """

    def __init__(self, vocab_size: int, blocks: int = 2):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
        self.head = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, vocab_size, bias=False))

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(ids_BT)))

    def serve_alone(self, alone: bool = True, num_experts_alone: int | None = None) -> None:
        for block in self.blocks:
            block.mixture.serve_alone(alone, num_experts_alone)


def loss_of(model: LanguageModel, batch: dict[str, Tensor]) -> Tensor:
    """Nats a token. Labels are shifted already; those that predict nothing are -100, which cross_entropy ignores."""
    return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["shift_labels"].flatten())


def batches(text: Blocks, steps: int) -> GroupedBatches:
    return GroupedBatches(text, group_size=GROUP, batch_size=4 * GROUP, steps=steps, seed=0)


def train(model: LanguageModel, text: Blocks, steps: int) -> list[float]:
    """The loss of every step."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step, batch in enumerate(batches(text, steps)):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4}  loss {losses[-1]:.3f}", flush=True)
    return losses


def served(model: LanguageModel, train_text: Blocks, test_text: Blocks) -> dict[str, float]:
    """Losses over some groups: in groups, each row alone, and alone by 2 of the 32 experts, a dense one's FLOPs."""
    model.eval()
    calibrate_companions(model, [batch["input_ids"] for batch in batches(train_text, steps=4)])
    found = {}
    for way, few in {"in groups": None, "alone": None, "alone, 2 experts": 2}.items():
        model.serve_alone(way != "in groups", few)
        found[way] = score_tokens(model, test_text, group_size=GROUP, groups=16)
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the matrices are so small that threads would wait for each other
    corpus = prepare_text()  # the source text of Python's standard library; kept in a cache, which `mot train` shares
    model = LanguageModel(len(corpus.tokenizer))
    train(model, corpus.train, steps=100)
    for way, loss in served(model, corpus.train, corpus.validation).items():
        print(f"validation text, {way}: loss {loss:.3f}")
    with TemporaryDirectory() as folder:
        torch.save(model.state_dict(), f"{folder}/model.pt")  # companions are in it; how it is served is not
        again = LanguageModel(len(corpus.tokenizer)).eval()
        again.load_state_dict(torch.load(f"{folder}/model.pt"))
    again.serve_alone(num_experts_alone=2)
    print(audit_model(again, vocab_size=len(corpus.tokenizer), length=CONTEXT, group_size=GROUP))
