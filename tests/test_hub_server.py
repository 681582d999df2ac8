"""The test server for the Hub's HTTP API behaves as the Hub where tests rely on it, to the unmodified client."""

import subprocess
import sys
from pathlib import Path

from hub_server import HubServer, serve


PUSH = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo("org/name", exist_ok=True)
print(HfApi().upload_folder(repo_id="org/name", folder_path=sys.argv[1], delete_patterns="*.txt").oid)
"""
LOOK = """
import sys
from pathlib import Path
from huggingface_hub import HfApi, HfFileSystem, errors, hf_hub_download, snapshot_download
first, second = sys.argv[1:]

def refusal(*args, **kwargs):
    try:
        hf_hub_download(*args, **kwargs)
    except Exception as error:
        return type(error)

assert Path(hf_hub_download("org/name", "README.md")).read_text() == "second"
path = Path(hf_hub_download("org/name", "README.md", revision=first))
assert path.read_text() == "first" and path.parent.name == first
assert {p.name for p in Path(snapshot_download("org/name")).iterdir()} == {
    ".gitattributes", "README.md", "weights.safetensors"
}
with HfFileSystem().open(f"org/name@{second}/weights.safetensors", block_size=2**10) as file:
    file.seek(50_000)
    assert file.read(4) == bytes([80, 81, 82, 83])
info = HfApi().model_info("org/name", files_metadata=True)
assert info.sha == second and [file.lfs is not None for file in info.siblings] == [False, False, True]
assert refusal("org/other", "a") is errors.RepositoryNotFoundError
assert issubclass(refusal("org/name", "a"), errors.EntryNotFoundError)
assert refusal("org/name", "README.md", revision="no") is errors.RevisionNotFoundError
"""


def start(hub: HubServer, home: Path, code: str, *args: object) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=hub.environment(home), **pipes)


def run(*args: object, fails: bool = False) -> str:
    process = start(*args)
    output, _ = process.communicate(timeout=120)
    assert (process.returncode != 0) == fails, output
    return output.strip()


def test_pushes_and_downloads(tmp_path):
    folder, home = tmp_path / "folder", tmp_path / "home"
    folder.mkdir()
    (folder / "README.md").write_text("first")
    (folder / "old.txt").touch()
    (folder / "weights.safetensors").write_bytes(bytes(range(256)) * 400)
    with serve() as hub:
        first = run(hub, home, PUSH, folder)
        assert hub.files("org/name").keys() == {".gitattributes", *(path.name for path in folder.iterdir())}
        assert hub.files("org/name")["weights.safetensors"] == (folder / "weights.safetensors").read_bytes()
        assert run(hub, home, PUSH, folder).endswith(first) and len(hub.titles("org/name")) == 1, (
            "nothing new, no commit"
        )

        (folder / "README.md").write_text("second")
        (folder / "old.txt").unlink()
        hub.fail_next_commit = True
        assert "500" in run(hub, home, PUSH, folder, fails=True)
        assert hub.commits("org/name")[0].sha == first
        second = run(hub, home, PUSH, folder)
        assert hub.commits("org/name")[0].sha == second and "old.txt" in hub.files("org/name", first)
        assert len([request for request in hub.requests if request.startswith("PUT")]) == 1, "weights had not changed"
        run(hub, tmp_path / "another home", LOOK, first, second)
        assert any(" /object/" in request and request.endswith(" 206") for request in hub.requests)


def test_a_killed_client_changes_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights.safetensors").write_bytes(bytes(range(256)) * 40_000)
    with serve() as hub:
        hub.on_upload = lambda: process.kill()
        process = start(hub, tmp_path / "home", PUSH, tmp_path / "folder")
        process.communicate(timeout=120)
        assert hub.titles("org/name") == []
        hub.on_upload = None
        run(hub, tmp_path / "home", PUSH, tmp_path / "folder")
        assert "weights.safetensors" in hub.files("org/name")
