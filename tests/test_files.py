"""
Files are there whole or not at all, also through symbolic links and with several writers.
"""

import os

import pytest
from envs import SpaceEnv, tiny_model

from sb3_mrq.persist.files import atomic_file
from sb3_mrq.weights import save_weights


@pytest.fixture(scope="module")
def model():
    return tiny_model(SpaceEnv()).learn(20)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("model.zip", lambda model, path: model.save(path)),
        ("buffer.pkl", lambda model, path: model.save_replay_buffer(path)),
        ("weights.safetensors", save_weights),
    ],
)
@pytest.mark.parametrize("there", ["file", "nothing", "another link"])
def test_saved_through_a_link(model, name, save, there, tmp_path):
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / "data"
    link = tmp_path / name
    if there == "another link":
        (tmp_path / "disk" / "link").symlink_to("data")
        link.symlink_to(os.path.join("disk", "link"))
    else:
        link.symlink_to(target)
    if there == "file":
        target.write_bytes(b"before")
    save(model, link)
    assert link.is_symlink() and not target.is_symlink()
    assert target.stat().st_size > 1000
    assert {path.name for path in (tmp_path / "disk").iterdir()} <= {"data", "link"}
    assert {path.name for path in tmp_path.iterdir()} == {"disk", name}


def test_two_writers(tmp_path):
    path = tmp_path / "table.csv"
    with atomic_file(path) as ours, atomic_file(path) as theirs:
        ours.write(b"ours")
        theirs.write(b"theirs")
    assert path.read_bytes() == b"ours" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"ours" and list(tmp_path.iterdir()) == [path]
