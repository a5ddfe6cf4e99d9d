"""``python -m fastattn demo --train``: the whole Transformer learns a real task, step for step as torch's own does."""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastattn
from fastattn.cli import vowels
from fastattn.cli.console import Console, escape
from fastattn.cli.minilm import INSTALL

WIDTH, HEADS, LAYERS, FEEDFORWARD = 64, 4, 2, 128
BATCH, RATE = 64, 3e-3
# Training is chaotic at a rate that learns something in a minute: torch against torch with one weight off by its last
# bit parts by 1e-4 within 75 steps and by 1e-2 within 150, and a single step near the highest rate may treble a
# difference.  So torch's twin starts a leg of this many steps with equal weights and optimizer state, and runs it by
# itself; at every step of every leg the losses must agree.
LEG = 3
ALLOWED = 1e-4
_SHOWN = 5
_SCORED = 128  # held-out texts


class Restorer(nn.Module):
    """Symbols in, logits of symbols out, around a Transformer of either library; embedding and output are tied.

    Args:
        library: torch.nn or fastattn.nn.
    """

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vowels.SYMBOLS, WIDTH)
        nn.init.normal_(self.embedding.weight, std=WIDTH**-0.5)
        self.place = fastattn.nn.SinusoidalEmbedding(WIDTH)
        self.transformer = library.Transformer(
            WIDTH, HEADS, LAYERS, LAYERS, FEEDFORWARD, dropout=0.0, batch_first=True, norm_first=True
        )  # fmt: skip
        self.output = fastattn.nn.TiedLinear(self.embedding, bias=True)

    def embed(self, ids: Tensor, offset: int = 0) -> Tensor:
        return self.place(self.embedding(ids) * WIDTH**0.5, offset=offset)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (N, T, symbols) of what follows each symbol of target (N, T), given source (N, S)."""
        padding = source == vowels.PADDING
        later = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        out = self.transformer(
            self.embed(source), self.embed(target), tgt_mask=later, tgt_is_causal=True,
            src_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
        return self.output(out)

    @torch.no_grad()
    def restore(self, source: Tensor, longest: int = vowels.LONGEST + 1) -> Tensor:
        """The likeliest symbols (N, longest), one by one through a cache; only with fastattn's Transformer."""
        padding = source == vowels.PADDING
        memory = self.transformer.encoder(self.embed(source), src_key_padding_mask=padding)
        cache = self.transformer.make_cache(len(source), max_length=longest)
        symbol = torch.full((len(source), 1), vowels.BEGIN)
        found = []
        for _ in range(longest):
            out = self.transformer.decoder(
                self.embed(symbol, offset=cache.length), memory, memory_key_padding_mask=padding, cache=cache
            )  # fmt: skip
            symbol = self.output(out).argmax(-1)
            found.append(symbol)
        return torch.cat(found, dim=1)


@dataclass
class Curves:
    """Losses by step, and the seconds each library's steps took."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    our_seconds: float = 0.0
    their_seconds: float = 0.0

    def differences(self) -> list[float]:
        """Relative, by step."""
        return [abs(a - b) / abs(b) for a, b in zip(self.ours, self.theirs, strict=True)]

    def same(self) -> bool:
        return all(difference <= ALLOWED for difference in self.differences())  # False for NaN


class Learner:
    """A model with its optimizer and schedule."""

    def __init__(self, model: Restorer, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), RATE, betas=(0.9, 0.98), eps=1e-6)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, RATE, total_steps=max(steps, 2), pct_start=0.1
        )  # fmt: skip

    def step(self, source: Tensor, target: Tensor) -> tuple[float, float]:
        """One step on the mean cross-entropy of the next symbol: its loss before the step, and the seconds it took."""
        began = time.perf_counter()
        logits = self.model(source, target[:, :-1])
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=vowels.PADDING
        )  # fmt: skip
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return loss.item(), time.perf_counter() - began

    def follow(self, other: Learner) -> None:
        """Take over weights and optimizer state."""
        self.model.load_state_dict(other.model.state_dict())
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))


def learn(pairs: vowels.Pairs, steps: int, step: Callable[[str, int, int], None]) -> tuple[Restorer, Curves]:
    """Train fastattn's model, and torch's beside it in legs, on the same batches; fp32, dropout 0, seed 0."""
    torch.manual_seed(0)
    twin = Learner(Restorer(torch.nn), steps)
    ours = Learner(Restorer(fastattn.nn), steps)
    ours.model.load_state_dict(twin.model.state_dict())
    generator, curves = torch.Generator().manual_seed(0), Curves()
    for number in range(steps):
        if number % LEG == 0:
            twin.follow(ours)
        batch = pairs.batch(torch.randint(len(pairs), (BATCH,), generator=generator))
        for learner, losses in ((twin, curves.theirs), (ours, curves.ours)):
            loss, seconds = learner.step(*batch)
            losses.append(loss)
            if learner is ours:
                curves.our_seconds += seconds
            else:
                curves.their_seconds += seconds
        step(f"training, loss {curves.ours[-1]:.3f}", number + 1, steps)
    return ours.model.eval(), curves


def draw_curves(curves: Curves, path: Path) -> None:
    """Both losses, and below them their relative difference with the bound."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.2), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    steps = range(1, len(curves.ours) + 1)
    above.plot(steps, curves.theirs, color="#e07b39", linewidth=3.2, alpha=0.55, label="torch.nn.Transformer")
    above.plot(steps, curves.ours, color="#1f5fa8", linewidth=1.0, label="fastattn.nn.Transformer")
    above.set_yscale("log")
    above.minorticks_off()
    above.set_yticks(marks := (0.3, 0.5, 1, 2, 5), [f"{mark:g}" for mark in marks])
    above.set_ylabel("loss (nats per letter)")
    above.legend(frameon=False)
    above.set_title("The vowels of Python's documentation", fontsize=10, loc="left")
    # equal losses have no place on a logarithmic axis
    below.plot(steps, [max(d, 1e-9) for d in curves.differences()], ".", color="#1f5fa8", markersize=2.5)
    below.axhline(ALLOWED, color="#b03030", linewidth=0.8, linestyle="--")
    below.annotate(
        "allowed", (1, ALLOWED), xytext=(0, 3), textcoords="offset points", xycoords=("axes fraction", "data"),
        color="#b03030", fontsize=8, ha="right",
    )  # fmt: skip
    below.set_yscale("log")
    below.set_ylim(5e-10, 1e-3)
    below.set_yticks((1e-9, 1e-7, 1e-5, 1e-3), ("equal", "1e-7", "1e-5", "1e-3"))
    below.minorticks_off()
    below.set_ylabel("relative difference")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_attention(model: Restorer, text: str, path: Path) -> None:
    """Where the last decoder layer looks in the source while it writes each letter of the text."""
    pairs = vowels.Pairs.of([text])
    last = f"transformer.decoder.layers.{LAYERS - 1}.multihead_attn"
    with torch.no_grad(), fastattn.inspect(model, layers=last) as record:
        model(pairs.source, pairs.target[:, :-1])
    written, read = [*text, "end"], list(vowels.without_vowels(text))
    figure = fastattn.plot_attention(record, (written, read), title="Reading the source while writing the vowels")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def restored(model: Restorer, pairs: vowels.Pairs, count: int) -> list[tuple[str, str, str]]:
    """Source, what the model makes of it, and the truth, of the first texts."""
    index = torch.arange(min(count, len(pairs)))
    source, _ = pairs.batch(index)
    texts = [vowels.decode(row) for row in model.restore(source).tolist()]
    return [(vowels.without_vowels(truth), text, truth) for text, truth in zip(texts, pairs.texts, strict=False)]


def right_words(rows: list[tuple[str, str, str]]) -> tuple[float, float]:
    """Shares of words that are right: of the model, and of leaving the source as it is."""
    counts = [0, 0, 0]
    for source, text, truth in rows:
        words = truth.split()
        counts[0] += len(words)
        for place, guess in ((1, text.split()), (2, source.split())):
            counts[place] += sum(a == b for a, b in zip(guess, words, strict=False))
    return counts[1] / max(counts[0], 1), counts[2] / max(counts[0], 1)


def main(options: argparse.Namespace) -> int:
    console = Console()
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        console.print(f"[red]error:[/red] matplotlib is not installed; {escape(INSTALL)}")
        return 2
    warnings.filterwarnings("ignore", message=".*enable_nested_tensor is True.*")  # torch, of its own default
    learned, held_out = vowels.load()
    console.heading("A Transformer that gives texts their vowels back")
    console.print(
        f"  {len(learned)} runs of words from Python's language reference, {len(held_out)} from topics held out; "
        f"{LAYERS} + {LAYERS} layers, width {WIDTH}, {HEADS} heads"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # operations this small do not get faster by sharing them, and wait for a busy core
    try:
        with console.progress() as step:
            model, curves = learn(learned, options.steps, step)
    finally:
        torch.set_num_threads(threads)
    right = curves.same()
    console.heading("The same curve from torch.nn.Transformer, same weights, same batches")
    worst = max(curves.differences())
    console.pairs(
        [
            ("loss", f"{curves.ours[0]:.3f} at the first step, {curves.ours[-1]:.3f} at step {options.steps}"),
            ("largest relative difference", f"{worst:.1e} of any step  (allowed {ALLOWED:.0e}; legs of {LEG} steps)"),
            ("seconds", f"{curves.our_seconds:.1f} fastattn, {curves.their_seconds:.1f} torch"),
            ("curves", "[green]the same[/green]" if right else "[bold red]THEY PART[/bold red]"),
        ]
    )
    rows = restored(model, held_out, _SCORED)
    share, untouched = right_words(rows)
    console.heading("Texts it has never seen, written letter by letter through a cache")
    console.table(["source", "restored", "truth"], [list(row) for row in rows[:_SHOWN]], left=3)
    console.print(f"  {share:.0%} of the words are right (the sources as they are: {untouched:.0%})")
    curve, attention = options.out / "training.png", options.out / "attention.png"
    draw_curves(curves, curve)
    draw_attention(model, held_out.texts[0], attention)
    console.heading("Pictures")
    console.pairs([("learning curves", escape(str(curve))), ("attention", escape(str(attention)))])
    return 0 if right else 1
