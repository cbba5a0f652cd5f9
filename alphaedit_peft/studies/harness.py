"""General ability before and after edits, by lm-evaluation-harness on the model in memory.

In: a model (edited or not), its tokenizer, tasks by their names there or as files. Out: for each
task its metrics, and a table of two such findings. Needs ``pip install alphaedit_peft[lm-eval]``;
tasks of the harness download their data, a task file of one's own can name local data.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from alphaedit_peft import hooks
from alphaedit_peft.messages import one_line, sentence
from alphaedit_peft.records import parse_json
from alphaedit_peft.tables import Table
from alphaedit_peft.text_files import DataError, read_text

# AlphaEdit, section 4.3: SST, MRPC, CoLA, RTE, NLI and MMLU
PAPER_TASKS = ("sst2", "mrpc", "cola", "rte", "mnli", "mmlu")

Ability = dict[str, dict[str, float]]


def general_ability(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Path] = PAPER_TASKS,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
) -> Ability:
    """Run tasks of lm-evaluation-harness on a model, which is put back into its mode.

    Args:
        model: from transformers, or edited by this package.
        tokenizer: of the model.
        tasks: names that the harness knows, or files: a task's config as ``.yaml`` or ``.json``,
            in which relative ``data_files`` are looked for beside the file.
        limit: documents of each task.
        num_fewshot: examples before each question; None: the task's own.
        batch_size: requests at once.

    Returns:
        task -> metric -> value; a metric's standard error stands under ``<metric>_stderr``.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
        ValueError: no task, an unknown one, or a file that is no task's config.
        FileNotFoundError: a task file that is not there.
    """
    if isinstance(tasks, (str, Path)) or not tasks:
        raise ValueError(f"tasks={tasks!r} must be a list of names or files, at least one")
    wanted = [_task(task) for task in tasks]
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"lm-evaluation-harness is not installed ({error}); pip install alphaedit_peft[lm-eval]"
        ) from error
    names = [task for task in wanted if isinstance(task, str)]
    manager = TaskManager(include_defaults=bool(names))  # its own are thousands of files
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"tasks {unknown} are unknown to lm-evaluation-harness; see its list")
    with hooks.evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the harness and what it imports
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=wanted,
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    results: Mapping[str, Mapping[str, Any]] = found["results"]
    return {task: _numbers(metrics) for task, metrics in results.items()}


def ability_table(before: Ability, after: Ability) -> str:
    """Two findings on the same tasks side by side, with the standard error of the second.

    ValueError: findings on different tasks.
    """
    if before.keys() != after.keys():
        raise ValueError(f"tasks {list(before)} and {list(after)} differ; run the same ones")
    rows = []
    for task, metrics in after.items():
        for name, value in metrics.items():
            old, error = before[task].get(name), metrics.get(f"{name}_stderr")
            if name.endswith("_stderr") or old is None:
                continue
            shown = "" if error is None else f"{error:.3f}"
            rows.append((task, name, f"{old:.3f}", f"{value:.3f}", f"{value - old:+.3f}", shown))
    return Table(("task", "metric", "before", "after", "change", "std. error"), rows).text(left=2)


def _task(task: str | Path) -> str | dict[str, Any]:
    """A name as it is; a file's config as a dict, its data files found beside it."""
    path = Path(task)
    if path.suffix not in (".yaml", ".yml", ".json"):
        return str(task)
    if not path.is_file():
        raise FileNotFoundError(f"task file {path} does not exist; give a .yaml or .json file")
    config = _read(path)
    if not isinstance(config, dict) or "task" not in config:
        raise ValueError(f"{path} is no task's config; it needs the fields of one, 'task' first")
    options = config.get("dataset_kwargs")
    if isinstance(options, dict) and "data_files" in options:
        options["data_files"] = _beside(path.parent, options["data_files"])
    return config


def _read(path: Path) -> Any:
    try:
        text = read_text(path)
        if path.suffix == ".json":
            return parse_json(text)
        import yaml

        return yaml.safe_load(text)
    except DataError:
        raise
    except Exception as error:  # yaml's errors are no ValueErrors
        wrong = f"it cannot be read as {path.suffix[1:]} ({one_line(error)})"
        raise ValueError(sentence(path, wrong, "give a task's config")) from error


def _beside(folder: Path, files: Any) -> Any:
    if isinstance(files, dict):
        return {split: _beside(folder, names) for split, names in files.items()}
    if isinstance(files, list):
        return [_beside(folder, name) for name in files]
    return files if "://" in str(files) else str((folder / str(files)).resolve())


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """``acc,none`` -> ``acc``: numbers only, without the filter's name where it is none."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "," in name
    }
