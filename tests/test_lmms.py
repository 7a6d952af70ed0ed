"""Real lmms-eval, in an environment of its own, gives the same answers and scores as we do."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxyv.eval.__main__ import main
from proxyv.eval.records import read_records
from proxyv.eval.team import Team
from proxyv.synthetic.world import write_world
from tests.small_model import save_small_model

ROOT = Path(__file__).parents[1]
TASKS = {
    "docvqa": ("docvqa/docvqa_val.yaml", "validation"),
    "chartqa": ("chartqa/chartqa.yaml", "test"),
}
OFFLINE = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")


@pytest.fixture(scope="module")
def harness() -> str:
    """A Python with lmms-eval: PROXYV_LMMS_PYTHON, or that of .venv-lmms."""
    python = os.environ.get("PROXYV_LMMS_PYTHON") or str(ROOT / ".venv-lmms/bin/python")
    if not shutil.which(python):
        pytest.skip("no environment with lmms-eval; make one with scripts/lmms_env.sh")
    return python


def make_references_reachable(data: Path, answers: dict[str, list[str]]) -> None:
    """Give a third of the rows the model's own answer and a third nearly that."""
    from datasets import load_dataset

    for name, texts in answers.items():
        path = data / name / f"{TASKS[name][1]}.parquet"
        table = load_dataset("parquet", data_files=str(path), split="train")
        column = "answers" if name == "docvqa" else "answer"

        references = []
        for index, text in enumerate(texts):
            own = text or "nothing"
            near = own[:-1] + ("y" if own[-1] == "x" else "x")
            found = (own, near, "something else")[index % 3]
            references.append([found, "another"] if name == "docvqa" else found)
        changed = table.remove_columns([column]).add_column(column, references)
        changed.cast(table.features).to_parquet(str(path))


def local_tasks(folder: Path, data: Path, python: str) -> None:
    where = "import lmms_eval, pathlib; print(pathlib.Path(lmms_eval.__file__).parent / 'tasks')"
    done = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True)
    tasks = Path(done.stdout.splitlines()[-1])
    folder.mkdir()
    for name, (file, split) in TASKS.items():
        lines = [
            f"include: {tasks / file}",
            f"task: local_{name}",
            "dataset_path: parquet",
            "dataset_name: null",
            "dataset_kwargs:",
            f"  data_files: {{{split}: {data / name / split}.parquet}}",
        ]
        (folder / f"local_{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.slow
def test_lmms_eval_gives_the_same_answers_and_scores(harness: str, tmp_path: Path) -> None:
    model, data = save_small_model(tmp_path / "model"), tmp_path / "data"
    write_world(
        data, seed=9, train_documents=0, train_charts=0, test_documents=5, test_charts=5, workers=1
    )
    command = ["--model", str(model), "--data", str(data), "--tasks", "docvqa,chartqa"]
    command += ["--dtype", "float32", "--device", "cpu", "--output"]
    assert main([*command, str(tmp_path / "first")]) == 0
    answers = {
        name: [record["answer"] for record in read_records(tmp_path / f"first/{name}.jsonl")]
        for name in TASKS
    }
    make_references_reachable(data, answers)
    assert main([*command, str(tmp_path / "ours")]) == 0
    local_tasks(tmp_path / "tasks", data, harness)
    launch = [harness, "-m", "lmms_eval", "--model", "proxyv", "--batch_size", "4"]
    launch += ["--model_args", f"pretrained={model},dtype=float32", "--device", "cpu"]
    launch += ["--tasks", "local_docvqa,local_chartqa", "--include_path", str(tmp_path / "tasks")]
    launch += ["--output_path", str(tmp_path / "theirs"), "--log_samples"]
    environment = {**os.environ, **OFFLINE, "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        launch, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=550
    )
    found = list((tmp_path / "theirs").rglob("*_results.json"))
    assert len(found) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    theirs = json.loads(found[0].read_text("utf-8"))["results"]
    ours = json.loads((tmp_path / "ours/results.json").read_text("utf-8"))["tasks"]
    for name in TASKS:
        for score, entry in ours[name]["scores"].items():
            assert 0 < entry["value"] < 1
            assert theirs[f"local_{name}"][f"{score},none"] == pytest.approx(entry["value"])
        (file,) = (tmp_path / "theirs").rglob(f"*_samples_local_{name}.jsonl")
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        said = {line["doc_id"]: line["filtered_resps"] for line in lines}
        records = read_records(tmp_path / f"ours/{name}.jsonl")
        assert said == {record["index"]: record["answer"] for record in records}


def stand_in(name: str, monkeypatch: pytest.MonkeyPatch, **content: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The adapter on empty stand-ins for the few classes of lmms-eval that it builds on."""
    for package in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
        stand_in(package, monkeypatch, __path__=[])
    stand_in("lmms_eval.api.instance", monkeypatch, Instance=object)
    stand_in("lmms_eval.api.model", monkeypatch, lmms=type("lmms", (), {}))
    stand_in("lmms_eval.models.registry_v2", monkeypatch, ModelManifest=object)
    monkeypatch.delitem(sys.modules, "proxyv.eval.lmms", raising=False)
    yield importlib.import_module("proxyv.eval.lmms")
    sys.modules.pop("proxyv.eval.lmms", None)


@pytest.mark.parametrize(
    ("gpu", "processes", "given", "taken"),
    [
        (False, 2, None, None),
        (False, 2, "cpu", "cpu"),
        (True, 2, None, "cuda:1"),
        (True, 2, "cuda:0", "cuda:1"),
        (True, 2, "cpu", "cpu"),
        (True, 1, "cuda:0", "cuda:0"),
    ],
)
def test_each_of_several_processes_takes_a_gpu_where_there_are_any(
    adapter: Any,
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    processes: int,
    given: str | None,
    taken: str | None,
) -> None:
    loaded: list[str | None] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(adapter, "join_team", lambda _: Team(1, processes, 1))
    monkeypatch.setattr(adapter.Answerer, "load", lambda _, device, **__: loaded.append(device))
    adapter.ProxyV("folder", device=given)
    assert loaded == [taken]


def test_the_package_names_its_model_to_lmms_eval() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib needs Python 3.11")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"proxyv": "proxyv.eval.lmms:manifest"}
