"""``python -m fastattn demo``: one call replaces the attention of a real pretrained encoder.  With ``--train`` see
`fastattn.cli.train`."""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import fastattn
from fastattn.bench.memory import peak_bytes
from fastattn.bench.timing import Sample, Spread, interleave
from fastattn.cli import train
from fastattn.cli.console import Console, escape
from fastattn.cli.minilm import MiniLM, MissingModelError, Tokenizer, load_model
from fastattn.cli.sentences import QUESTIONS, SENTENCES, TOPIC_OF
from fastattn.nn import replace_attention

# Embeddings have unit length and entries around 0.05.  Six float32 layers in another order of summation differ by some
# 1e-7; a wrong scale, mask or head order differs by 1e-2 and more.
MAX_DIFFERENCE = 1e-5
MIN_COSINE = 1 - 1e-6


@dataclass(frozen=True)
class Workload:
    """A batch of texts, each of some of the sentences in a row, so that lengths differ as they do in life."""

    batch: int
    longest: int  # tokens
    training: bool = False

    @property
    def name(self) -> str:
        return f"{'training step' if self.training else 'inference'}, {self.batch} x {self.longest}"


WORKLOADS = (
    Workload(1, 16),
    Workload(32, 64),
    Workload(16, 256),
    Workload(8, 512),
    Workload(8, 256, training=True),
)
QUICK_WORKLOADS = (Workload(1, 16), Workload(4, 64))


@dataclass(frozen=True)
class Measured:
    """One line of the table: stock and replaced, seconds and bytes."""

    workload: Workload
    tokens: int
    before: Spread
    after: Spread
    before_bytes: int
    after_bytes: int
    kernel: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer and smaller batches in the timing part")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of timing per batch shape (default 3)")
    parser.add_argument("--train", action="store_true", help="train an encoder-decoder beside torch's instead")
    parser.add_argument("--steps", type=_steps, default=500, help="of the training (default 500, about a minute)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("fastattn-demo"),
        help="folder of the training's pictures (default %(default)s)",
    )


def _steps(text: str) -> int:
    steps = int(text)
    if steps < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return steps


def texts_for(workload: Workload, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Token ids and padding of the workload: text i is about (i + 1)/batch of the longest."""
    texts = []
    for number in range(workload.batch):
        wanted = workload.longest * (number + 1) // workload.batch
        words: list[str] = []
        turn = number
        while len(words) < wanted:  # every word is at least one token, so this is enough text, cut by the tokenizer
            words += SENTENCES[turn % len(SENTENCES)].split()
            turn += 1
        # a word is about 1.3 tokens, and two tokens open and close the text
        texts.append(" ".join(words[: wanted if number == workload.batch - 1 else max(1, int((wanted - 2) / 1.3))]))
    return tokenizer(texts, max_length=workload.longest)


def runner(model: MiniLM, workload: Workload, ids: Tensor, padding: Tensor) -> Callable[[], object]:
    """One pass of the workload: inference in eval mode, or forward and backward in training mode."""

    def infer() -> Tensor:
        model.eval()
        with torch.no_grad():
            return model(ids, padding)

    def train() -> None:
        model.train()
        embeddings = model(ids, padding)
        (embeddings @ embeddings.T).logsumexp(-1).sum().backward()  # a contrastive loss over the batch
        model.zero_grad(set_to_none=True)

    return train if workload.training else infer


def sample_of(run: Callable[[], object]) -> Sample:
    def sample() -> dict[str, float]:
        began = time.perf_counter()
        run()
        return {"all": time.perf_counter() - began}

    return sample


def measure(workload: Workload, stock: MiniLM, ours: MiniLM, tokenizer: Tokenizer, budget: float) -> Measured:
    """Both models in turn over the same batch, then the peak memory of each."""
    ids, padding = texts_for(workload, tokenizer)
    before, after = runner(stock, workload, ids, padding), runner(ours, workload, ids, padding)
    seconds = interleave({"before": sample_of(before), "after": sample_of(after)}, budget=budget, least=3, most=40)
    after()
    call = fastattn.last_call()
    return Measured(
        workload,
        int((~padding).sum()),
        Spread.of(seconds["before"]["all"]),
        Spread.of(seconds["after"]["all"]),
        peak_bytes(before, "cpu"),
        peak_bytes(after, "cpu"),
        f"{call.backend}: {call.kernel}" if call else "none",
    )


def parity(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and smallest cosine, of two sets of embeddings (N, E)."""
    difference = (before - after).abs().max().item()
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).min().item()
    return difference, cosine


def passed(difference: float, cosine: float) -> bool:
    return difference <= MAX_DIFFERENCE and cosine >= MIN_COSINE  # False for NaN


def show_neighbours(console: Console, sentences: Tensor, questions: Tensor) -> None:
    rows = []
    for question, scores in zip(QUESTIONS, questions @ sentences.T, strict=True):
        values, places = scores.topk(2)
        for rank, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
            rows.append([question if rank == 0 else "", SENTENCES[place], TOPIC_OF[place], f"{value:.3f}"])
    console.table(["question", "nearest sentences", "topic", "cosine"], rows, left=3)


def show_measured(console: Console, measured: list[Measured]) -> None:
    rows = []
    for m in measured:
        ratio = m.before.median / m.after.median
        colour = "green" if ratio >= 1 else "yellow" if ratio >= 0.9 else "red"
        rows.append(
            [
                m.workload.name,
                str(m.tokens),
                f"{m.before.median * 1e3:.1f} ms",
                f"{m.after.median * 1e3:.1f} ms",
                f"[{colour}]{ratio:.2f}x[/{colour}]",
                f"{m.before_bytes / 1e6:.1f} MB",
                f"{m.after_bytes / 1e6:.1f} MB",
                m.kernel,
            ]
        )
    columns = ["batch", "tokens", "time before", "after", "speed", "peak before", "after", "kernel"]
    console.table(columns, rows)


def main(options: argparse.Namespace) -> int:
    if options.train:
        return train.main(options)
    console = Console()
    try:
        model, tokenizer = load_model(), Tokenizer()
    except MissingModelError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}")
        return 2
    # torch announces that its own padded fast path uses prototype nested tensors; not this reader's concern
    warnings.filterwarnings("ignore", message=".*nested tensors is in prototype stage.*")
    stock = copy.deepcopy(model)
    ids, padding = tokenizer(SENTENCES)
    question_ids, question_padding = tokenizer(QUESTIONS)

    console.heading("all-MiniLM-L6-v2 in a stock torch.nn.TransformerEncoder")
    console.print(
        f"  {len(SENTENCES)} sentences, {int((~padding).sum())} tokens in a {ids.shape[0]} x {ids.shape[1]} batch, "
        f"{padding.float().mean():.0%} of it padding"
    )
    with torch.no_grad():
        before = model(ids, padding)
    console.heading("fastattn.replace_attention(model)")
    console.print("  " + escape(str(replace_attention(model))).replace("\n", "\n  "))
    with torch.no_grad():
        after, questions = model(ids, padding), model(question_ids, question_padding)
    call = fastattn.last_call()
    if call is None:
        console.print("[bold red]FAILED[/bold red]: the replaced model ran without one call of fastattn")
        return 1

    console.heading("The kernel that ran")
    heads = model.encoder.layers[0].self_attn.num_heads
    like = torch.empty(ids.shape[0], ids.shape[1], heads, model.words.embedding_dim // heads).transpose(1, 2)
    # the encoder hands its layers the padding as a dense mask
    explanation = fastattn.explain(like, like, like, mask=fastattn.BoolMask(~padding[:, None, None]))
    console.print(f"  last call: {call.backend}: {call.kernel} ({', '.join(call.features) or 'plain'})")
    console.print("  explain:   " + escape(str(explanation)).replace("\n", "\n             "))

    console.heading("Parity of the embeddings")
    difference, cosine = parity(before, after)
    right = passed(difference, cosine)
    verdict = "[green]passed[/green]" if right else "[bold red]FAILED[/bold red]"
    console.pairs(
        [
            ("max abs difference", f"{difference:.2e}  (allowed {MAX_DIFFERENCE:.0e})"),
            ("smallest cosine", f"{cosine:.9f}  (at least {MIN_COSINE:.6f})"),
            ("parity", verdict),
        ]
    )

    console.heading("What the replaced model finds")
    show_neighbours(console, after, questions)

    workloads = QUICK_WORKLOADS if options.quick else WORKLOADS
    measured = []
    with console.progress() as step:
        for number, workload in enumerate(workloads):
            step(f"timing {workload.name}", number, len(workloads))
            measured.append(measure(workload, stock, model, tokenizer, options.budget))
    console.heading(f"Before and after, interleaved medians, {torch.get_num_threads()} threads")
    show_measured(console, measured)
    return 0 if right else 1
