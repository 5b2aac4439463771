"""tools/ablate.py from the command line, and what it does before and around the runs."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_helpers import run_main
from study_helpers import TOOL, MakeStudy, run_ablate_process

from retina.config_file import load_config
from retina.study import outcome
from retina.study.cells import StudyError
from retina.study.estimate import check_disk_space
from retina.study.launch import Machine
from retina.study.outcome import error_line, is_trained
from retina.study.report import write_report
from retina.study.study_file import load_study
from retina.study.trial_storage import TrialStorage
from retina.train.loop import train

pytestmark = pytest.mark.slow
STUDIES = TOOL.parents[1] / "configs/ablations"


LOST = "error: process 1 of the run lost the connection to another one: Connection closed by peer"


def test_error_line_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    for text, expected in [
        ("step 1\nerror: no such file\n", "no such file"),
        (
            "Traceback\n  File x\ntorch.OutOfMemoryError: CUDA out of memory\nbye\n",
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        ("ValueError: this\nx.ChildFailedError: \n=====\n", "ValueError: this"),
        (f"error: the disk\nAfter\n{LOST}\nThat\nx.ChildFailedError: \n", "the disk"),
        (f"{LOST}\nThat\n", LOST.removeprefix("error: ")),
        ("step 1\nstep 2\n", "step 2"),
        ("", "no output"),
    ]:
        log.write_text(text)
        assert error_line(log) == expected
    assert error_line(tmp_path / "none.txt") == "no output"


def test_a_full_disk_is_reported_before_the_start(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study([0, 1])
    study.folder.mkdir(parents=True)
    check_disk_space(study, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**31))
    check_disk_space(study, 2**28)
    with pytest.raises(StudyError, match=r"2\.0 GiB are free, .* about 6\.0; free some"):
        check_disk_space(study, 2**30)


def test_each_worker_has_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert Machine.detect(None, 1, Path()).workers == 4 and Machine.detect(None, 2, Path()).workers == 2
    machine = Machine.detect(3, 2, Path())
    assert [machine.environment(worker)["CUDA_VISIBLE_DEVICES"] for worker in range(3)] == ["4,5", "6,7", "4,5"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):  # many runs on one GPU share the cores
        monkeypatch.delenv(name, raising=False)
        assert machine.environment(0)[name] == "2"
    with pytest.raises(StudyError, match=r"devices: 8 for a cell, but 4 GPUs are visible \(4, 5, 6, 7\)"):
        Machine.detect(None, 8, Path())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Machine.detect(3, 2, Path()).environment(0)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    for name in ("WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID"):  # this program was started by torchrun
        monkeypatch.setenv(name, "1")
    environment = Machine.detect(3, 2, Path()).environment(0)
    assert environment["OMP_NUM_THREADS"] == "5", "the value of the user counts"
    assert not {"WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID"} & environment.keys()


def test_dry_run_lists_the_cells_and_measures_the_time(make_study: MakeStudy) -> None:
    study = make_study([0, 2])
    done = run_main("ablate.py", study.file, "--dry-run", "--output", study.folder.parent, "train.steps=1000")
    assert done.returncode == 0, done.stderr
    assert "gamma 0, seed 0" in done.stdout and "gamma 2, seed 0" in done.stdout
    assert "a cell of 1000 steps" in done.stdout and "for 2 cells" in done.stdout
    assert [path.name for path in study.folder.parent.rglob("*")] == [study.folder.name], "no temporary folder remains"


def test_dry_run_needs_no_data(make_study: MakeStudy) -> None:
    study = make_study([0, 2])
    missing = ["data.train_annotations=no/annotations/train.json", "--output", study.folder.parent]
    done = run_main("ablate.py", study.file, "--dry-run", *missing)
    assert done.returncode == 0, done.stderr
    assert "gamma 0, seed 0" in done.stdout and "data.train_annotations: no no/annotations" in done.stdout
    assert "the study needs this data to start" in done.stdout
    settings = study.file.with_name("settings.yaml")
    settings.write_text("{train: 4, val: 2, size: 64}")
    generated = run_main("ablate.py", study.file, "--dry-run", f"data.shapes={settings}", *missing)
    assert "the data is made when the study starts" in generated.stdout
    wrong = run_main("ablate.py", study.file, "--dry-run", "data.shapes=no.yaml", *missing)
    assert wrong.returncode == 2 and "no.yaml: no such settings file" in wrong.stderr


def test_generated_data_is_made_and_identifies_the_cells(make_study: MakeStudy, tmp_path: Path) -> None:
    study, settings, root = make_study([2]), tmp_path / "settings.yaml", tmp_path / "shapes"
    settings.write_text("{train: 4, val: 2, size: 64}")
    overrides = [
        f"data.shapes={settings}", "train.steps=2", "train.keep=weights", f"data.cache={tmp_path / 'cache'}",
        *(f"data.{split}_annotations={root}/annotations/{split}.json" for split in ("train", "val")),
        *(f"data.{split}_images={root}/{split}" for split in ("train", "val")),
    ]  # fmt: skip
    done = run_main("ablate.py", study.file, *overrides, "--output", study.folder.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{root}: writing 4 + 2 images" in done.stdout and ": AP " in done.stdout
    (first,) = load_study(study.file, None, overrides, study.folder.parent).cells
    assert first.result() is not None and [path.name for path in first.folder.glob("*.pt")] == ["last.pt"]
    manifest = root / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"sha256"', '"SHA256"'))
    (second,) = load_study(study.file, None, overrides, study.folder.parent).cells
    assert second.key != first.key
    settings.write_text("{train: 5, val: 2, size: 64}")
    refused = run_main("ablate.py", study.file, *overrides, "--output", study.folder.parent)
    assert refused.returncode == 2 and "train is 4, requested 5" in refused.stderr


def test_what_cannot_train_is_reported_before_the_start(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study([0])
    output = ["--output", tmp_path / "out"]
    for arguments, message in [
        (["data.val_images=nowhere"], "data.val_images: no nowhere"),
        (["train.steps=1000", "model.norm=frozen"], "does not train: model.norm=frozen keeps the statistics"),
        (["--workers", "0"], "--workers 0: expected 1 or more"),
        (["loss.gama=1"], "did you mean loss.gamma?"),
        (["seed=3"], "seed is not a setting of a cell"),
        (["loss.gamma=3"], "study.yaml varies loss.gamma"),
        (["--storage", "sqlite:///x.db", "train.precision=auto"], "with --storage give train.precision"),
    ]:
        done = run_main("ablate.py", study.file, *arguments, *output)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out/cells").exists()


def test_a_copied_study_on_other_data(tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real runs, from the copied file to the report. Then the code changes."""
    text = (STUDIES / "gamma_alpha.yaml").read_text().replace("base: base/shapes.yaml", f"base: {tiny_yaml}")
    text = text.replace("[0, 0.1, 0.2, 0.5, 1, 2, 5]", "[0, 2]")
    text = text.replace("[0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999]", "[0.25]")
    (tmp_path / "mine.yaml").write_text(text)
    done = run_ablate_process(tmp_path / "mine.yaml", "--output", tmp_path / "out", "train.steps=3", "--workers", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "out/mine-tiny"
    for name in ("report.html", "report.md", "results.csv", "trainings.csv"):
        assert str(folder / name) in done.stdout and (folder / name).is_file()
    lines = done.stdout.splitlines()
    assert any(line.split()[:3] == ["2", "0.25", "1/1"] and "34.0" in line for line in lines), "the paper's AP is 34.0"
    csv = (folder / "trainings.csv").read_text().splitlines()
    assert len(csv) == 3 and all(",finished," in line for line in csv[1:])
    again = run_main("ablate.py", tmp_path / "mine.yaml", "--output", tmp_path / "out", "train.steps=3", "--report")
    assert again.returncode == 0 and again.stdout.splitlines()[-3:] == lines[-3:]
    page = (folder / "report.html").read_bytes()
    forgotten = run_main("ablate.py", tmp_path / "mine.yaml", "--output", tmp_path / "out", "--report")
    assert forgotten.returncode == 2 and "train.steps was 3, is 6" in forgotten.stderr, forgotten.stderr
    assert (folder / "report.html").read_bytes() == page
    dry_run = ("ablate.py", tmp_path / "mine.yaml", "--output", tmp_path / "out", "train.steps=3", "--dry-run")
    assert "other code" not in run_main(*dry_run).stdout
    monkeypatch.setattr("retina.study.cells.code_digest", lambda: "0" * 12)
    said = run_main(*dry_run).stdout
    assert "2 of them were finished by other or unknown code" in said and said.count("(finished by other code)") == 2
    monkeypatch.undo()
    assert f"and delete {folder / 'ledger.jsonl'}, or" in said
    study = load_study(tmp_path / "mine.yaml", overrides=["train.steps=3"], output=tmp_path / "out")
    assert all(map(study.is_done, study.cells)) and TrialStorage(study, None, 10).claim(study.cells[0]) is None
    for path in (tmp_path / "out/cells").iterdir():
        shutil.rmtree(path)
    (folder / "ledger.jsonl").unlink()
    assert not any(map(study.is_done, study.cells))
    done = run_ablate_process(tmp_path / "mine.yaml", "--output", tmp_path / "out", "train.steps=3", "--workers", 2)
    assert done.returncode == 0 and done.stdout.count(": started (") == 2, done.stdout


def test_a_cell_on_two_processes(tiny_yaml: Path, tmp_path: Path) -> None:
    """Real runs under torchrun: the measurement of the step time, and the cell."""
    (tmp_path / "two.yaml").write_text(f"base: {tiny_yaml}\naxes: {{loss.gamma: [2]}}\ndevices: 2\n")
    output = ["--output", tmp_path / "out"]
    dry = run_main("ablate.py", tmp_path / "two.yaml", "--dry-run", "train.steps=1000", *output)
    assert dry.returncode == 0 and "a cell of 1000 steps" in dry.stdout, dry.stderr
    done = run_main("ablate.py", tmp_path / "two.yaml", "train.steps=3", *output)
    assert done.returncode == 0 and ": AP " in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_trains(path: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    """One step of its last cell, with the settings of its base on tiny data, and its report."""
    tiny = load_config(tiny_yaml).data
    data = [
        f"data.{name}={getattr(tiny, name)}" for name in tiny.model_dump() if name.split("_")[0] in ("train", "val")
    ] + ["data.shapes=null", "data.cache=null"]
    small = ["train.batch_size=2", "train.precision=fp32", "data.zoom=[1,1]"]
    study = load_study(path, overrides=[*data, *small], output=tmp_path)
    cell = study.cells[-1]
    one_step = cell.config.model_copy(update={"train": cell.config.train.model_copy(update={"steps": 1})})
    cell = dataclasses.replace(cell, config=one_step)
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.yaml").write_text(cell.config.to_yaml())
    metrics = train(load_config(cell.folder / "config.yaml"), resume=True)
    assert metrics["step"] == 1 and is_trained(cell) and not study.is_done(cell)
    outcome.write_result(cell, None, 1.0, "")
    write_report(study)
    assert study.is_done(cell) and (study.folder / "report.html").is_file()
