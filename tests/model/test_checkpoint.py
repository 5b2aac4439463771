from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from retina.atomic_files import atomic_file
from retina.model import checkpoint
from retina.model.checkpoint import CheckpointError, digest, load, load_newest, save, save_last


def state(step: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(50, 50, generator=generator)
    return {"model": {"w": weights, "half": weights.bfloat16(), "empty": torch.zeros(0)}, "step": step, "name": "é"}


def test_round_trip_is_exact(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", state())
    assert digest(load(tmp_path / "a.pt")) == digest(state())
    assert torch.load(tmp_path / "a.pt", weights_only=True)["sha256"] == digest(state())


def test_digest_depends_on_every_value() -> None:
    base = digest(state())
    for change in (
        lambda s: s["model"]["w"].view(-1)[7].copy_(torch.nextafter(s["model"]["w"].view(-1)[7], torch.tensor(9.0))),
        lambda s: s.update(step=2),
        lambda s: s["model"].update(w=s["model"]["w"].double()),
        lambda s: s["model"].update(w=s["model"]["w"].reshape(25, 100)),
        lambda s: s["model"].pop("empty"),
    ):
        changed = state()
        change(changed)
        assert digest(changed) != base
    assert digest(dict(reversed(state().items()))) == base


def test_anything_but_tensors_and_plain_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\.path: PosixPath"):
        save(tmp_path / "a.pt", {"path": tmp_path})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_files_are_refused_by_name(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "a.pt"
    save(path, state())
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"a\.pt: not readable"):
        load(path)


def test_an_altered_byte_of_a_tensor_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save(path, state())
    content = bytearray(path.read_bytes())
    needle = state()["model"]["w"].numpy().tobytes()
    position = content.find(needle) + len(needle) // 2
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        load(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"no checksum"):
        load(tmp_path / "weights.pt")
    payload = torch.load(_saved(tmp_path), weights_only=True)
    torch.save(payload | {"format": 99}, tmp_path / "new.pt")
    with pytest.raises(CheckpointError, match=r"format 99"):
        load(tmp_path / "new.pt")


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "hacked"),)

    torch.save({"state": Evil(), "sha256": "", "format": 1}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt"):
        load(tmp_path / "evil.pt")
    assert not (tmp_path / "hacked").exists()


def test_previous_replaces_a_damaged_last(tmp_path: Path) -> None:
    assert load_newest(tmp_path) == (None, [])
    save_last(tmp_path, state(1))
    save_last(tmp_path, state(2))
    newest, refused = load_newest(tmp_path)
    assert newest is not None and newest["step"] == 2 and refused == []
    (tmp_path / checkpoint.LAST).write_bytes(b"truncated")
    newest, refused = load_newest(tmp_path)
    assert newest is not None and newest["step"] == 1 and "last.pt" in refused[0]
    save_last(tmp_path, state(3))  # the damaged file was renamed and does not replace the valid one
    assert load(tmp_path / checkpoint.PREVIOUS)["step"] == 1 and (tmp_path / "last.pt.damaged").exists()
    (tmp_path / checkpoint.LAST).unlink()  # killed between the two renames
    newest, refused = load_newest(tmp_path)
    assert newest is not None and newest["step"] == 1 and refused == []


def test_files_that_cannot_be_read_stay(tmp_path: Path) -> None:
    """A run does not start anew over its own files."""
    for name in (checkpoint.LAST, checkpoint.PREVIOUS):
        (tmp_path / name).write_bytes(b"truncated")
    with pytest.raises(CheckpointError, match=r"last\.pt.*previous\.pt.*to start anew, move what is damaged away"):
        load_newest(tmp_path)
    save_last(tmp_path, state(1))
    torch.save({"state": state(2), "sha256": "", "format": 99}, tmp_path / checkpoint.LAST)
    with pytest.raises(CheckpointError, match=r"last\.pt: checkpoint format 99, this version reads 1"):
        load_newest(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.LAST, checkpoint.PREVIOUS}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    save_last(tmp_path, state(1))
    with pytest.raises(OSError, match=r"disk full"), atomic_file(tmp_path / checkpoint.LAST) as temporary:
        temporary.write_bytes(b"half of it")
        raise OSError("disk full")
    assert load(tmp_path / checkpoint.LAST)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def _saved(folder: Path) -> Path:
    save(folder / "ours.pt", state())
    return folder / "ours.pt"
