"""Running a distillation: teachers, baseline, student, evaluation and ``result.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedkd.core import cli, environment, quotes, run_directory, seeds, specs
from fedkd.core.errors import FedkdError, PluginError, ResumeError, StorageError, UsageError, noticing_signals
from fedkd.core.notes import plain
from fedkd.core.report import students as report
from fedkd.core.report.grid import Grid
from fedkd.core.report.screen import Screen
from fedkd.core.report.students import BASELINE, STUDENT
from fedkd.core.report.text import percent, points
from fedkd.core.runtime import settle
from fedkd.data import corruptions
from fedkd.distill import teacher_names, teachers, train
from fedkd.distill.config import CLASSIC
from fedkd.distill.progress import Progress
from fedkd.distill.task import Task, prepare
from fedkd.distill.teachers import Teacher, TeacherEnsemble
from fedkd.training import loop, models, quality
from fedkd.training.models import checkpoint
from fedkd.training.quality import Candidate
from fedkd.training.terms import BornAgain, Logits, Term

if TYPE_CHECKING:
    from fedkd.distill.config import DistillConfig


def run(config: DistillConfig, terms: Sequence[Term]) -> None:
    """Train and evaluate the students of all seeds; ``result.json`` is written last.

    Raises:
        FedkdError: the run failed; ``result.json`` has its code and message.

    """
    settle(config.threads)
    out, screen = Path(config.out), Screen(cli.Console(stderr=config.json))
    result: dict[str, Any] = {"status": "failed", "out": str(out), "dataset": config.dataset, "runs": []}
    progress, has_begun = Progress(config, screen), False
    try:
        with noticing_signals():
            task, fallback = prepare(config)
            result |= {"dataset": task.dataset, "dataset_fallback": fallback}
            progress.restore()
            has_begun = True
            run_directory.write(out / "config.toml", run_directory.toml(config))  # of a resumed run: with other options
            pretrained = models.digests([config.student])  # the weights of teachers are compared themselves
            note = environment.keep(out, task.device, task.precision, task.dataset, fallback, pretrained)
            screen.print(f"run directory: {out}")
            if note:
                screen.print(note)
            _check_training_step(task, config, terms)
            for line in _header(task, config, fallback):
                screen.print(line)
            with _attributing(config):
                obtained, ranking = _obtain_teachers(task, config, terms, progress)
            result |= {"teachers": [teacher.name for teacher in obtained], "ranking": ranking}
            if ranking:
                screen.show(_ranking_table(ranking))
            for seed in range(config.seed, config.seed + config.seeds):
                student = f"{STUDENT}.safetensors" if seed == config.seed else f"{STUDENT}-seed{seed}.safetensors"
                seed_config = dataclasses.replace(config, seed=seed, seeds=1)
                with _attributing(config):
                    evaluation = _run_seed(task, seed_config, terms, obtained, progress, out / student)
                result["runs"].append({"seed": seed, "evaluation": evaluation})
            joined = report.joined([run["evaluation"] for run in result["runs"]])
            for grid in (report.quality_table(joined), report.cost_table(joined), report.epochs_table(joined)):
                screen.show(grid)
            gains = report.gains([run["evaluation"] for run in result["runs"]])
            result["gain"] = {"mean": fmean(gains), "std": stdev(gains) if len(gains) > 1 else None}
            screen.print(f"{STUDENT} - {BASELINE} in percentage points, paired by seed: {points(gains)}")
            report.draw(joined, f"{config.student} on {task.dataset}", out)
            result["status"] = "ok"
    except FedkdError as error:
        result |= {"code": error.code, "message": str(error)}
        has_begun &= not isinstance(error, ResumeError)
        raise
    except OSError as error:  # the disk is full, or the directory cannot be written any more
        failure = StorageError.of(error, out)
        result |= {"code": failure.code, "message": str(failure)}
        raise failure from error
    except (KeyboardInterrupt, SystemExit):
        result["status"] = "interrupted"
        raise
    finally:
        if has_begun or not (out / "result.json").exists():  # a run that could not be resumed keeps its result
            run_directory.write_result(out, result)
    screen.print(f"run directory: {out}")


def _attributing(config: DistillConfig) -> AbstractContextManager[None]:
    """A context in which an error of a user-defined loss or network in training is attributed to it."""
    return specs.attributing(_components(config), "in training")


def _components(config: DistillConfig) -> list[tuple[str, str]]:
    """Option and spec of everything that can be user-defined: losses, and networks that are not files."""
    components = [("loss", text) for text in quotes.split(config.loss)]
    components += [("teacher", text) for text in teacher_names.named(config) if not teacher_names.is_path(text)]
    return [*components, ("student", config.student)]


def _header(task: Task, config: DistillConfig, fallback: str) -> Iterator[str]:
    counts = f"{len(task.train):,} training, {len(task.validation):,} validation and {len(task.test):,} test images"
    yield f"      data  {task.dataset}: {counts}"
    if len(task.validation) < config.validation:
        yield f"            a tenth of the training images for validation, not --validation {config.validation}"
    if fallback:
        yield f"            not CIFAR-10: {fallback}"
    yield f"    device  {task.device}, {task.precision}"
    yield f"   student  {config.student}, {plain(config.epochs, 'epoch')}, {config.loss}"
    if note := checkpoint.initial(config.student, task.classes, config.norm, config.seed)[1]:
        yield f"            {note}"


def _check_training_step(task: Task, config: DistillConfig, terms: Sequence[Term]) -> None:
    """Compute one training step with untrained networks, so that unknown layers are found before teachers are trained.

    On a small batch, and on a single image if a batch has one; some losses and networks cannot be trained on that.

    Raises:
        UsageError, DataError: losses and networks cannot be combined.
        PluginError: a user-defined loss or model failed.

    """
    texts = _teacher_specs(config, terms)
    user_defined = [text for _, text in _components(config) if specs.is_user_defined(text)]
    wrong = PluginError if user_defined else UsageError
    culprit, suffix = " or ".join(user_defined) or f"--loss {config.loss}", ""
    try:
        with seeds.seeded(0):
            _check_logits(task, config)
            student = train.build_untrained(task, config, config.student)
            modules = [teachers.untrained(task, config, text) for text in texts]
            for text, module in [(config.student, student), *zip(texts, modules, strict=True)]:
                if not (teacher_names.is_path(text) or models.pretrained(text)[1]):  # it is trained here
                    loop.check_batch_norm(module, text, config.batch_size, "--batch-size")
                    loop.check_batch_norm(module, text, len(task.train), "the number of training images")
            frozen = [*map(teachers.frozen, modules or [train.build_untrained(task, config, config.student)])]
            objective = train.objective_of(task, config, student, frozen, terms).train()
            sizes = loop.batch_sizes(objective, len(task.train), config.batch_size)
            for count in (min(8, len(task.train)), *([1] if 1 in sizes else [])):
                suffix = " on a last batch of one image, which another --batch-size avoids" if count == 1 else ""
                indices = torch.arange(count)
                outputs = objective(task.scaling(task.train.pixels[indices]))
                loss = objective.loss(outputs, torch.stack([task.train.labels[indices], indices], 1).to(task.device))
                torch.autograd.grad(loss, list(objective.parameters()), allow_unused=True)
                if loss.shape != () or not loss.isfinite():
                    raise wrong(f"{culprit} returned {loss.detach()}{suffix}; the loss must be a finite scalar.")
    except FedkdError:
        raise
    except Exception as error:
        networks = ", ".join([*texts, config.student])
        raise wrong(f"{culprit} cannot be used with these networks{suffix} ({networks}): {error}.") from error


def _check_logits(task: Task, config: DistillConfig) -> None:
    """Refuse networks that are trained here and do not return logits."""
    for option, text in _components(config):
        if option == "loss" or (option == "teacher" and models.pretrained(text)[1]):
            continue
        images = task.scaling(task.train.pixels[:2])
        if misfit := loop.misfit(train.build_untrained(task, config, text), images, task.classes):
            raise (PluginError if specs.is_user_defined(text) else UsageError)(f"--{option} {text} {misfit}.")


def _teacher_specs(config: DistillConfig, terms: Sequence[Term]) -> list[str]:
    """The specs of the teachers, or of the candidates of ``--teachers-from``."""
    if not any(term.needs_teacher for term in terms):
        return []
    if config.teachers_from:
        return teacher_names.candidates(Path(config.teachers_from), config.out)
    return teacher_names.named(config) or [CLASSIC]


def _obtain_teachers(
    task: Task, config: DistillConfig, terms: Sequence[Term], progress: Progress
) -> tuple[list[Teacher], list[dict[str, Any]]]:
    """The teachers; and the ranking of ``--teachers-from``, whose first candidate is the teacher."""
    candidates = teachers.obtain(task, config, _teacher_specs(config, terms), progress)
    if not config.teachers_from:
        return candidates, []
    temperature = next((term.temperature for term in terms if isinstance(term, Logits)), Logits().temperature)
    ranking = teachers.rank(task, config, candidates, temperature)
    return [teacher for teacher in candidates if teacher.name == ranking[0]["teacher"]], ranking


def _ranking_table(ranking: Sequence[dict[str, Any]]) -> Grid:
    """The ranked teachers with their measurements and ranks."""
    titles = ["teacher", "mean rank", "val acc", "ECE", "entropy", "gap"]

    def with_rank(row: dict[str, Any], key: str, value: str) -> str:
        return value + (f" ({row[f'{key}_rank']})" if row["is_competitive"] else "")

    rows = [
        [
            Path(row["teacher"]).name + "*" * (not row["unseen_validation"]),
            f"{row['mean_rank']:.2f}" if row["is_competitive"] else "–",
            with_rank(row, "accuracy", percent(row["accuracy"])),
            with_rank(row, "ece", f"{row['ece']:.3f}"),
            with_rank(row, "entropy", f"{row['entropy']:.2f}"),
            with_rank(row, "gap", f"{row['gap']:.2f}"),
        ]
        for row in ranking
    ]
    caption = (
        "The first one is the teacher. Numbers in parentheses are ranks.\n"
        "Teachers that are significantly less accurate than the best one come last and have no rank.\n"
        "entropy: of the soft labels, in nats; gap: |log(parameters / the student's)|."
    )
    if not all(row["unseen_validation"] for row in ranking):
        caption += "\n*: may have been trained on the validation images, so its values may be too good."
    return Grid(titles, rows, caption)


def _run_seed(
    task: Task,
    config: DistillConfig,
    terms: Sequence[Term],
    obtained: Sequence[Teacher],
    progress: Progress,
    path: Path,
) -> dict[str, quality.Results]:
    """Train the baseline and the student of one seed, save both (the latter to ``path``), and evaluate them."""
    suffix = f"seed{config.seed}"
    modules = teachers_of_run = [teacher.module for teacher in obtained]
    evaluation: dict[str, quality.Results] = progress.evaluation(config.seed, task, modules)
    if evaluation:
        return evaluation
    name = f"{BASELINE} {suffix}"
    baseline = teachers.trained(task, config, config.student, config.epochs, config.seed, name, progress)
    if isinstance(terms[0], BornAgain):
        modules = [baseline]
        for generation in range(1, terms[0].generations - 1):
            modules = [teachers.frozen(_distilled_student(task, config, terms, modules, progress, generation))]
    student = _distilled_student(task, config, terms, modules, progress)
    networks: dict[str, nn.Module] = {}
    if modules:
        networks[quality.TEACHER] = (
            modules[0] if len(modules) == 1 else TeacherEnsemble(modules, config.teacher_weighting)
        )
    networks |= {BASELINE: baseline, STUDENT: student}
    paths = {BASELINE: path.with_name(f"{BASELINE}-{suffix}.safetensors"), STUDENT: path}
    for name, file in paths.items():
        teachers.student_of(task, config, config.student, networks[name]).save(file)
        run_directory.sync(file)
    candidates = {
        name: Candidate(teachers.frozen(module), task.scaling, paths.get(name)) for name, module in networks.items()
    }
    count = config.corrupted_images
    kinds = tuple(corruptions.KINDS) if count else ()
    options: dict[str, Any] = {"seed": config.seed, "kinds": kinds, "count": max(1, count)}
    evaluation = quality.evaluate(candidates, task.test, task.shifted, **options)
    for name in paths:
        evaluation[name] |= progress.best(f"{name} {suffix}")
    progress.keep_evaluation(config.seed, task, teachers_of_run, evaluation)
    return evaluation


def _distilled_student(
    task: Task,
    config: DistillConfig,
    terms: Sequence[Term],
    modules: Sequence[nn.Module],
    progress: Progress,
    generation: int = 0,
) -> nn.Module:
    """A student of these teachers. The intermediate generations of born-again networks have other initial weights."""
    module = train.build_untrained(task, config, config.student, *([generation] if generation else []))
    seed = seeds.derive(config.seed, "generation", generation) if generation else config.seed
    name = f"{STUDENT} seed{config.seed}" + (f" generation {generation + 1}" if generation else "")
    frozen = [teachers.frozen(module) for module in modules]
    progress.train(name, module, task, config, epochs=config.epochs, seed=seed, terms=terms, teachers=frozen)
    return module
