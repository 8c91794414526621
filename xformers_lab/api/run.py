"""A stored run from Python: its config, record, curve and model, its scores elsewhere, and what it writes."""

import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from xformers_lab import config as configs
from xformers_lab.api import supervised
from xformers_lab.api.shown import Shown
from xformers_lab.errors import UsageError
from xformers_lab.report import stored
from xformers_lab.terminal import visible
from xformers_lab.train import records

if TYPE_CHECKING:
    import pandas
    from rich.console import Console

    from xformers_lab.attention_maps.maps import AttentionMaps, Part
    from xformers_lab.model import Model
    from xformers_lab.tasks import Split, Task


Prompt = TypeVar("Prompt", str, list[str])
Value = str | int | float | bool | None
"""One value of an option."""


class Run(Shown):
    """A run in its folder, as `xl.train` and `xl.load` give it.

    folder: where it lives. id: the hash of its config. status: "ok", "unfinished", "running", or how it failed. record:
    what it measured, as result.json has it; empty before the end. Whatever needs the model loads it in this process,
    once, from the newest checkpoint.
    """

    def __init__(self, folder: pathlib.Path | str, *, trust: bool = False):
        """trust: run code outside the package that its config names, though it is not what the run was trained with.
        Raises UsageError where there is no run."""
        self.stored, self.trust = stored.at(pathlib.Path(folder)), trust
        self.folder, self.id, self.status = self.stored.folder, self.stored.id, self.stored.status

    @property
    def record(self) -> dict[str, Any]:
        """What it measured: status, metric, loss, parameters, seconds, bytes and more; see docs/comparing.md."""
        return dict(self.stored.record)

    @functools.cached_property
    def config(self) -> configs.Config:
        """Every key with its value: run.config.seq_len, run.config.model.attention, run.config.train.lr."""
        return configs.stored(self.folder / "config.json", trust=self.trust)

    @property
    def metrics(self) -> "pandas.DataFrame":
        """A row for every step so far: step, loss, seconds, grad_norm, and where it validated, validation_loss and
        validation_metric."""
        import pandas

        return pandas.DataFrame(records.read(self.folder))

    @property
    def model(self) -> "Model":
        """The trained model: `logits, aux = run.model(inputs)` of (B, T) tokens, numpy's or jax's."""
        return self._loaded[1]

    @property
    def task(self) -> "Task":
        """Its data: `run.task.batch("test", 0).inputs`, `run.task.encode("text")`, `run.task.decode(tokens)`."""
        return self._loaded[0]

    @functools.cached_property
    def _loaded(self) -> "tuple[Task, Model]":
        from xformers_lab.train import trained

        _, task, model = trained.load(self.folder, trust=self.trust)
        return task, model

    @overload
    def evaluate(
        self,
        *,
        seq_len: int | None = None,
        options: Mapping[str, Value] | None = None,
        split: "Split | None" = None,
        batches: int | str | None = None,
        beams: int | None = None,
        texts: int | None = None,
    ) -> dict[str, Any]: ...

    @overload
    def evaluate(
        self,
        *,
        seq_len: Sequence[int],
        options: Mapping[str, Value | Sequence[Value]] | None = None,
        split: "Split | None" = None,
        batches: int | str | None = None,
    ) -> list[dict[str, Any]]: ...

    @overload
    def evaluate(
        self,
        *,
        seq_len: int | Sequence[int] | None = None,
        options: Mapping[str, Value | Sequence[Value]],
        split: "Split | None" = None,
        batches: int | str | None = None,
    ) -> list[dict[str, Any]]: ...

    def evaluate(
        self,
        *,
        seq_len: int | Sequence[int] | None = None,
        options: Mapping[str, Value | Sequence[Value]] | None = None,
        split: "Split | None" = None,
        batches: int | str | None = None,
        beams: int | None = None,
        texts: int | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Score it, as `xlab eval` does.

            run.evaluate(seq_len=256)["metric"]
            rows = run.evaluate(options={"depth.threshold": [0.5, 0.9]})

        Args:
            seq_len: Tokens per sequence, by default those of training.
            options: What the trained parameters are used with in place of the run's own: options of its choices, by
                choice and option, and keys of its model that are no choice, such as "layers". Text is one value.
            split: "train", "validation" or "test", by default the one that the run was scored on.
            batches: "all" of the split, or so many times 32 examples; by default the run's own eval_batches.
            beams: Of a translation: score what is generated too, by a search with so many beams.
            texts: With beams: of how many examples (default: 100).

        Returns:
            A record: metric, metric_interval, loss and more; seq_len and each of the options where they were given, and
            under changed what is otherwise than in training, {name: [as trained, as scored]}. Of a list of lengths, or
            of values of an option, a list of records: every combination, the lengths varying fastest.

        Raises:
            xformers_lab.errors.UsageError: It has no checkpoint yet, its choices have no such option, its model cannot
                be so, or its parameters would be others.
        """
        from xformers_lab.train import trained

        how: dict[str, Any] = {"split": split, "trust": self.trust, "beams": beams}
        how["batches"] = None if batches is None else configs.typed("eval_batches", batches, f"batches={batches}")
        if texts is not None and beams is None:
            raise UsageError(f"texts={texts}: it is of texts that are generated; give beams, or leave it out")
        how |= {} if texts is None else {"texts": texts}
        one = lambda value: isinstance(value, str) or not isinstance(value, Iterable)
        listed = lambda value: [value] if one(value) else list(value)
        lengths = [] if seq_len is None else [configs.typed("seq_len", length) for length in listed(seq_len)]
        if seq_len is not None and not lengths:
            raise UsageError("seq_len: an empty list")
        asked = {name: listed(value) for name, value in (options or {}).items()}
        rows = trained.evaluate_at(self.folder, lengths, asked, **how)
        return rows[0] if all(map(one, (seq_len, *(options or {}).values()))) else rows

    def generate(
        self,
        prompt: Prompt,
        *,
        new: int = 64,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        beams: int | None = None,
        length_penalty: float | None = None,
        stop: Sequence[str] | None = None,
        draft: int | None = None,
        ahead: int | None = None,
    ) -> Prompt:
        """What it writes behind a prompt, as `xlab generate` does.

            run.generate("def ", new=32, top_p=0.9)

        Args:
            prompt: Text, or numbers with spaces between where the task has no letters; of a list, which shares a batch,
                a list comes back. A translation's is the source.
            new: Tokens to add.
            temperature: 0: always the likeliest token (default: 1).
            top_k: Draw among the k likeliest tokens.
            top_p: Draw among the likeliest that add up to p.
            min_p: Draw among those with p times the best's probability.
            seed: Of what is drawn (default: 0).
            beams: Beam search with so many hypotheses; nothing is drawn.
            length_penalty: Of beam search (default: 0.6).
            stop: Tokens at which to stop in place of the task's, spelled as prompts are.
            draft: With temperature=0: so many first layers propose tokens, which the others verify together.
            ahead: With draft: how many tokens they propose (default: 4).

        Returns:
            The text that follows the prompt, without it.

        Raises:
            xformers_lab.errors.UsageError: A prompt that the task cannot read, or a model that cannot decode.
        """
        from xformers_lab.api import generating

        how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
        how |= {"length_penalty": length_penalty, "draft": draft, "ahead": ahead}
        asked = {name: value for name, value in how.items() if value is not None}
        prompts = prompt if isinstance(prompt, list) else [prompt]
        rows = generating.texts(
            self.config.seq_len, self.task, self.model, prompts, new=new, beams=beams, stop=stop, **asked
        )
        written = [row["text"] for row in rows]
        return written if isinstance(prompt, list) else written[0]  # pyright: ignore[reportReturnType]

    def attention(self, text: str, *, part: "Part | None" = None) -> "AttentionMaps":
        """Where its heads look in a text, as `xlab maps` shows it.

            maps = run.attention("To be, or not to be")
            maps.weights, maps.tokens, maps.entropy, maps.dead, maps.page("maps.html")

        Args:
            text: As a prompt of `generate`. An encoder-decoder's is the source, and it writes the target itself.
            part: Of an encoder-decoder: "encoder", "decoder" or "cross" (default).

        Returns:
            Weights (L, N, T, S) with the tokens and figures of every head; a notebook shows the page.

        Raises:
            xformers_lab.errors.UsageError: The text does not fit, or its layers take no weighted mean of positions.
        """
        from xformers_lab.attention_maps import reading

        return reading.of_text(self.model, self.task, text, name=self.id, part=part)

    def resume(
        self,
        *,
        stall: float | None = None,
        from_scratch: bool = False,
        track: Sequence[str] = (),
        quiet: bool = False,
        **keys: Any,
    ) -> "Run":
        """Go on from its newest checkpoint to the end, as `xlab resume` does; -> the run as it is then.

            longer = run.resume(steps=2000)

        Args:
            keys: steps (with warmup) of a longer run, which goes on from this one in a folder of its own; name, tags;
                coordinator, processes, process and wait, as `xl.train` takes them.
            stall: Seconds without a step that end it, in place of its own stall.
            from_scratch: Begin at step 1 again where checkpoints or lines of metrics are lost.
            track: Where else every step is shown: "tensorboard", "wandb".
            quiet: No progress on stderr.

        Raises:
            As `xl.train`, and xformers_lab.errors.IntegrityError where what it left cannot be trusted.
        """
        with supervised.interruptible():
            how = {"stall": stall, "from_scratch": from_scratch, "track": track, "trust": self.trust, "quiet": quiet}
            folder, _ = supervised.resume(self.folder, [keys] if keys else [], where=f"stall={stall}", **how)
        return Run(folder, trust=self.trust)

    def tag(self, add: str | None = None, *, remove: str | None = None) -> "Run":
        """Give it more tags, or take some from it, as `xlab runs tag` does; -> the run as it is then.

            run.tag("paper+final", remove="draft")

        Raises:
            xformers_lab.errors.UsageError: A word can be no tag, it has no tag to remove, or a process works in it.
        """
        from xformers_lab.train import labels

        labels.retag([self.folder], add, remove)
        return Run(self.folder, trust=self.trust)

    def draw(self, console: "Console") -> None:
        from rich.text import Text

        from xformers_lab.report import pages

        title = f"{self.folder}: {self.stored.progress}"
        console.print(Text(visible(title), "bold"), soft_wrap=not console.is_terminal)
        if self.record:
            pages.print_record(self.record, console)
