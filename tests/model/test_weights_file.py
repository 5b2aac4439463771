"""Files of weights: what is read of them, that no code in them runs, and what is said of damaged and foreign ones."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from retina.model.weights import read_weights
from retina.model.weights_file import WeightsError, read_file, tensors_of

FIXTURES = Path(__file__).parents[1] / "fixtures/parity"


@pytest.mark.parametrize(("name", "key"), [("detectron2", "model"), ("mmdetection", "state_dict")])
def test_checkpoints_of_trainings_elsewhere_are_read(name: str, key: str) -> None:
    """They hold more than weights: the state of an optimizer and, in mmdetection's, objects of its own."""
    path = FIXTURES / f"{name}_training.pth"
    content = read_file(path)
    assert {"optimizer", key} <= content.keys()
    assert sorted(value.shape for value in tensors_of(content, path).values()) == [(1,), (1, 1, 1, 1)]
    if name == "mmdetection":
        assert "style='caffe'" in content["meta"]["cfg"] and content["meta"]["dataset_meta"]["classes"] == (
            "cat",
            "dog",
        )


class RunsCode:
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_code_in_a_file_is_never_run(tmp_path: Path, kind: str) -> None:
    content = {"model": {"w": np.zeros(3, np.float32)}, "more": RunsCode(str(tmp_path / "made"))}
    if kind == "pickle":
        (tmp_path / "file").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / "file")
    expected = r"file: not readable as weights: contains posix.mkdir, which could run code, .* torch.save\(model"
    with pytest.raises(WeightsError, match=expected):
        read_file(tmp_path / "file")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_of_numpy_arrays(tmp_path: Path, protocol: int) -> None:
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "half": np.ones(2, np.float16), "n": np.array(3)}
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, protocol))
    tensors = tensors_of(read_file(tmp_path / "file.pkl"), tmp_path / "file.pkl")
    assert tensors["w"].tolist() == [[0, 1, 2], [3, 4, 5]] and tensors["half"].dtype == torch.float16
    assert tensors["n"].item() == 3


def test_pickles_of_python_2(tmp_path: Path) -> None:
    """They hold the bytes of an array as text; MSRA's ResNets are older than Python 3's pickles."""
    dtype = b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    state = b"(K\x01K\x02\x85" + dtype + b"I00\nU\x08" + np.array([1, -2.5], "<f4").tobytes() + b"tb"
    content = b"\x80\x02}U\x01w" + empty + state + b"s."
    assert pickle.loads(content, encoding="latin1")["w"].tolist() == [1, -2.5]
    (tmp_path / "file.pkl").write_bytes(content)
    assert tensors_of(read_file(tmp_path / "file.pkl"), tmp_path)["w"].tolist() == [1, -2.5]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"model.0.conv.weight": torch.zeros(1)}, "neither a RetinaNet of .* its keys are model.0.conv.weight"),
        (
            {"state_dict": {"bbox_head.retina_cls.bias": torch.zeros(1), "rpn_head.w": torch.zeros(1)}},
            "no rule for key 'r",
        ),
        ({"model": torch.nn.Linear(1, 1).state_dict(), "x": 1}, "neither .* its keys are weight, bias"),
        ({"a": 1, "b": "text"}, "expected a state dict of tensors; it has the keys a, b"),
        ([1, 2], "expected a state dict of tensors, given list"),
        ({}, "expected a state dict of tensors, given dict"),
    ],
    ids=["yolo", "a two-stage detector", "another model", "no tensors", "a list", "nothing"],
)
def test_files_of_other_frameworks(tmp_path: Path, content: Any, expected: str) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(WeightsError, match=rf"file.pth: {expected}"):
        read_weights(str(tmp_path / "file.pth"))


def damaged(content: bytes, random_: random.Random) -> bytes:
    if random_.random() < 0.4:
        return content[: random_.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(random_.choice([1, 4, 40])):
        changed[random_.randrange(len(changed))] = random_.randrange(256)
    return bytes(changed)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # of torch, about damaged files
@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle", "safetensors", "mmdetection_training", "text"])
def test_truncated_and_damaged_files_give_a_clear_error(tmp_path: Path, kind: str) -> None:
    path, state = tmp_path / "file", {"a": torch.arange(50.0), "b": torch.zeros(2, 3)}
    if kind in ("torch", "legacy"):
        torch.save({"model": state}, path, _use_new_zipfile_serialization=kind == "torch")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"model": {key: value.numpy() for key, value in state.items()}}))
    elif kind == "safetensors":
        save_file(state, path)
    else:
        path.write_bytes((FIXTURES / f"{kind}.pth").read_bytes() if kind != "text" else b"base: mine.yaml\n" * 9)
    content, random_, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(60):
        path.write_bytes(damaged(content, random_))
        try:
            tensors_of(read_file(path), path)
        except WeightsError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
    assert refused > 20  # bytes of the weights themselves may change unseen
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=r"file: not readable as weights"):
        read_file(path)
