"""Playing what a DistillConfig asks for, from the first byte to ``result.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn

from fedkd.core import run_directory, seeds, specs
from fedkd.core.errors import FedkdError, PluginError, UsageError
from fedkd.core.runtime import settle
from fedkd.data import corruptions
from fedkd.distill import teacher_names, teachers, train
from fedkd.distill.config import CLASSIC
from fedkd.distill.task import Task, prepare
from fedkd.distill.teachers import Teacher, TeacherEnsemble
from fedkd.evaluation import quality
from fedkd.evaluation.quality import Candidate
from fedkd.evaluation.report import students as report
from fedkd.evaluation.report.screen import Screen
from fedkd.evaluation.report.students import BASELINE, STUDENT
from fedkd.evaluation.report.table import Grid
from fedkd.evaluation.report.text import percent, plain, seconds, spread
from fedkd.training.terms import BornAgain, Logits, Term

if TYPE_CHECKING:
    from fedkd.distill.config import DistillConfig
    from fedkd.distill.train import Epoch


def run(config: DistillConfig, terms: Sequence[Term]) -> None:
    """Train and judge every student of ``config``; ``result.json`` comes last.

    Raises:
        FedkdError: what stopped it; the result then says so too.

    """
    settle(config.threads)
    out, screen = Path(config.out), Screen(Console(stderr=config.json))
    screen.say(f"run directory: {out}")
    held: dict[str, Any] = {"status": "failed", "out": str(out), "dataset": config.dataset, "runs": []}
    try:
        task, fallback = prepare(config)
        held |= {"dataset": task.dataset, "dataset_fallback": fallback}
        run_directory.write_json(out / "env.json", run_directory.environment(task.device, task.dataset, fallback))
        for line in _header(task, config, fallback):
            screen.say(line)
        _check_training_step(task, config, terms)
        watch = partial(_report_epoch, out, screen)
        with _attributing(config):
            taught_by, ranking = _obtain_teachers(task, config, terms, watch)
        held |= {"teachers": [teacher.name for teacher in taught_by], "ranking": ranking}
        if ranking:
            screen.show(_table(ranking).rich())
        for seed in range(config.seed, config.seed + config.seeds):
            one = dataclasses.replace(config, seed=seed, seeds=1)
            with _attributing(config):
                judged = _run_seed(task, one, terms, taught_by, watch, out)
            held["runs"].append({"seed": seed, "judged": judged})
        judged = report.joined([run["judged"] for run in held["runs"]])
        for grid in (report.quality_table(judged), report.cost_table(judged)):
            screen.show(grid.rich())
        held["gain"] = _gain(held["runs"])
        screen.say(f"{STUDENT} - {BASELINE}, paired by seed: {spread(held['gain']['mean'], held['gain']['std'])}")
        report.draw(judged, f"{config.student} on {task.dataset}", out)
        held["status"] = "ok"
    except FedkdError as error:
        held |= {"code": error.code, "message": str(error)}
        raise
    except (KeyboardInterrupt, SystemExit):
        held["status"] = "interrupted"
        raise
    finally:
        run_directory.write_json(out / "result.json", held)
    screen.say(f"run directory: {out}")


def _attributing(config: DistillConfig) -> AbstractContextManager[None]:
    """Whatever somebody's own loss or network raises in training is called by its name."""
    return specs.attributing(_components(config), "in training")


def _components(config: DistillConfig) -> list[tuple[str, str]]:
    """Option and spec of whatever may be somebody's own code: losses, and networks that are no files."""
    texts = [("loss", text) for text in config.loss.split()]
    texts += [("teacher", text) for text in teacher_names.named(config) if not teacher_names.is_path(text)]
    return [*texts, ("student", config.student)]


def _header(task: Task, config: DistillConfig, fallback: str) -> Iterator[str]:
    counts = f"{len(task.train):,} to train on, {len(task.validation):,} to choose by, {len(task.test):,} to test"
    yield f"      data  {task.dataset}: {counts}"
    if fallback:
        yield f"            not CIFAR-10: {fallback}"
    yield f"   student  {config.student}, {plain(config.epochs, 'epoch')}, {config.loss}"


def _report_epoch(out: Path, screen: Screen, name: str, epoch: Epoch) -> None:
    """Say and keep what an epoch gave."""
    run_directory.append(out / "epochs.jsonl", {"network": name, **dataclasses.asdict(epoch)})
    screen.say(
        f"{name:>24}  epoch {epoch.number:>3}  validation {percent(epoch.accuracy):>6}  "
        f"loss {epoch.loss:6.3f}  {seconds(epoch.seconds):>8}"
    )


def _gain(played: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Mean and standard deviation over seeds of the accuracy that teaching adds, in [-1, 1]."""
    gains = report.gains([run["judged"] for run in played])
    return {"mean": fmean(gains), "std": stdev(gains) if len(gains) > 1 else None}


def _check_training_step(task: Task, config: DistillConfig, terms: Sequence[Term]) -> None:
    """Steps with everybody untrained, so that a layer that is not there is told before a teacher is trained.

    A batch of few, and one of one image if the last one will be such, which some networks cannot be trained on.

    Raises:
        UsageError, DataError: what does not fit.
        PluginError: what somebody's own loss or model did.

    """
    texts = _teacher_specs(config, terms)
    own = [text for _, text in _components(config) if specs.is_user_defined(text)]
    counts = {min(8, len(task.train))} | ({1} if len(task.train) % config.batch_size == 1 else set())
    blamed = " or ".join(own) or f"--loss {config.loss}"
    for count in sorted(counts, reverse=True):
        rows = torch.arange(count)
        where = " on a last batch of one image, which another --batch-size avoids" if count == 1 else ""
        try:
            with seeds.seeded(0):
                student = train.fresh(task, config, config.student)
                modules = [teachers.frozen(teachers.untrained(task, config, text)) for text in texts]
                modules = modules or [teachers.frozen(train.fresh(task, config, config.student))]
                lesson = train.objective_of(task, config, student, modules, terms).train()
                seen = lesson(task.scaling(task.train.pixels[rows]))
                loss = lesson.loss(seen, torch.stack([task.train.labels[rows], rows], 1).to(task.device))
                torch.autograd.grad(loss, list(lesson.parameters()), allow_unused=True)
        except FedkdError:
            raise
        except Exception as error:
            raise (PluginError if own else UsageError)(
                f"{blamed} cannot be used with these networks{where} ({', '.join([*texts, config.student])}): {error}."
            ) from error
        if loss.shape != () or not loss.isfinite():
            raise (PluginError if own else UsageError)(f"{blamed} gives {loss.detach()}{where}, not one finite number.")


def _teacher_specs(config: DistillConfig, terms: Sequence[Term]) -> list[str]:
    """The specs of those who teach, or may."""
    if not any(term.needs_teacher for term in terms):
        return []
    if config.teachers_from:
        return teacher_names.candidates(Path(config.teachers_from))
    return teacher_names.named(config) or [CLASSIC]


def _obtain_teachers(
    task: Task, config: DistillConfig, terms: Sequence[Term], watch: teachers.Watch
) -> tuple[list[Teacher], list[dict[str, Any]]]:
    """Who teaches; and how those of ``--teachers-from`` are ranked, of whom the first one does."""
    known = teachers.obtain(task, config, _teacher_specs(config, terms), watch)
    if not config.teachers_from:
        return known, []
    temperature = next((term.temperature for term in terms if isinstance(term, Logits)), Logits().temperature)
    ranking = teachers.rank(task, config, known, temperature)
    return [teacher for teacher in known if teacher.name == ranking[0]["teacher"]], ranking


def _table(ranking: Sequence[dict[str, Any]]) -> Grid:
    """The teachers in their order, with what speaks for and against each, and its place by that."""
    titles = ["teacher", "mean place", "val acc", "ECE", "entropy", "gap"]

    def measured(row: dict[str, Any], key: str, said: str) -> str:
        return said + (f" ({row[f'{key}_rank']})" if row["is_competitive"] else "")

    rows = [
        [
            Path(row["teacher"]).name + "*" * (not row["unseen_validation"]),
            f"{row['mean_rank']:.2f}" if row["is_competitive"] else "–",
            measured(row, "accuracy", percent(row["accuracy"])),
            measured(row, "ece", f"{row['ece']:.3f}"),
            measured(row, "entropy", f"{row['entropy']:.2f}"),
            measured(row, "gap", f"{row['gap']:.2f}"),
        ]
        for row in ranking
    ]
    said = (
        "The first one teaches; in brackets its place by each measure.\n"
        "Who is less accurate than the best, beyond chance, comes after the others and has no place.\n"
        "entropy: of its soft labels, in nats; gap: |log(parameters / the student's)|."
    )
    if not all(row["unseen_validation"] for row in ranking):
        said += "\n*: may have been trained on the validation images, which flatters it."
    return Grid(titles, rows, said)


def _run_seed(
    task: Task,
    config: DistillConfig,
    terms: Sequence[Term],
    taught_by: Sequence[Teacher],
    watch: teachers.Watch,
    out: Path,
) -> dict[str, quality.Verdict]:
    """One seed: the student alone and with its teachers, kept and judged beside them."""
    named = f"seed{config.seed}"
    alone = teachers.trained(
        task, config, config.student, config.epochs, config.seed, partial(watch, f"{BASELINE} {named}")
    )
    modules = [teacher.module for teacher in taught_by]
    if isinstance(terms[0], BornAgain):
        modules = [alone]
        for generation in range(1, terms[0].generations - 1):
            modules = [teachers.frozen(_distilled_student(task, config, terms, modules, watch, generation))]
    student = _distilled_student(task, config, terms, modules, watch)
    found: dict[str, nn.Module] = {}
    if modules:
        found[quality.TEACHER] = modules[0] if len(modules) == 1 else TeacherEnsemble(modules, config.teacher_weighting)
    found |= {BASELINE: alone, STUDENT: student}
    paths = {BASELINE: out / f"{BASELINE}-{named}.safetensors", STUDENT: out / _student_file(config.seed, out)}
    for name, path in paths.items():
        teachers.student_of(task, config, config.student, found[name]).save(path)
    candidates = {
        name: Candidate(teachers.frozen(module), task.scaling, paths.get(name)) for name, module in found.items()
    }
    kinds = tuple(corruptions.KINDS) if config.judge else ()
    return quality.judge(candidates, task.test, task.shifted, seed=config.seed, kinds=kinds, count=max(1, config.judge))


def _distilled_student(
    task: Task,
    config: DistillConfig,
    terms: Sequence[Term],
    modules: Sequence[nn.Module],
    watch: teachers.Watch,
    generation: int = 0,
) -> nn.Module:
    """A student of these teachers. Those that are born again between the first and the last start elsewhere."""
    module = train.fresh(task, config, config.student, *([generation] if generation else []))
    seed = seeds.derive(config.seed, "generation", generation) if generation else config.seed
    name = f"{STUDENT} seed{config.seed}" + (f" generation {generation + 1}" if generation else "")
    known = [teachers.frozen(module) for module in modules]
    for epoch in train.train(module, task, config, epochs=config.epochs, seed=seed, terms=terms, teachers=known):
        watch(name, epoch)
    return module


def _student_file(seed: int, out: Path) -> str:
    """The first student has the plain name; the others say whose they are."""
    return (
        f"{STUDENT}-seed{seed}.safetensors" if (out / f"{STUDENT}.safetensors").exists() else f"{STUDENT}.safetensors"
    )
