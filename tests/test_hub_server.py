"""The test server for the Hub's HTTP API, as the unmodified client sees it, each time from a process of its own."""

import subprocess
import sys
import textwrap
from hashlib import sha256
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from hub_server import HubServer, serve


ROOT = Path(__file__).parent.parent
PRELUDE = """
import os
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub import errors
api = HfApi()
def refusal(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error)
"""


@pytest.fixture
def hub(tmp_path):
    with serve(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def client(hub, tmp_path):
    """Run code in a new process with an empty cache; return what it printed."""
    homes = iter(range(100))

    def run(code: str, *args: object, token: str | None = "hf_token", fails: bool = False) -> str:
        done = start(hub, tmp_path / f"home{next(homes)}", code, *args, token=token)
        output, errors = done.communicate(timeout=120)
        assert (done.returncode != 0) == fails, errors
        return errors if fails else output.strip()

    return run


def start(hub: HubServer, home: Path, code: str, *args: object, token: str | None = "hf_token") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *map(str, args)],
        env={**hub.environment(home, token), "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """A text, a large binary file and small weights in a folder."""
    folder = tmp_path / "folder"
    (folder / "weights").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nWords\n")
    (folder / "big.data").write_bytes(bytes(range(256)) * 45_000)
    (folder / "weights" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    return folder


PUSH = """
import sys
api.create_repo("org/name", exist_ok=True)
print(api.upload_folder(repo_id="org/name", folder_path=sys.argv[1], commit_message="Push").oid)
"""


@pytest.fixture
def pushed(client, folder) -> str:
    """The id of a pushed folder's commit."""
    return client(PUSH, folder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def without_attributes(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if path != ".gitattributes"}


def test_push_is_one_commit(hub, pushed, folder):
    assert without_attributes(hub.files("org/name")) == content(folder)
    assert hub.commits("org/name")[0].sha == pushed
    assert [commit.title for commit in hub.commits("org/name")] == ["Push", "initial commit"]
    assert hub.files("org/name", hub.commits("org/name")[1].sha).keys() == {".gitattributes"}
    assert b"\nbig.data filter=lfs" in hub.files("org/name")[".gitattributes"]
    uploads = [request for request in hub.requests if request.startswith("PUT /upload/")]
    assert len(uploads) == 2  # over 10 MB, and .safetensors; the card is in the commit's request


def test_push_again(hub, pushed, folder, client):
    before = len(hub.requests)
    assert client(PUSH, folder) == pushed
    assert not [request for request in hub.requests[before:] if request.startswith("PUT") or "/commit/" in request]
    (folder / "README.md").write_text("---\nlicense: mit\n---\nOther words\n")
    second = client(PUSH, folder)
    assert second != pushed and len(hub.commits("org/name")) == 3
    assert len([request for request in hub.requests if request.startswith("PUT")]) == 2
    card = 'print(open(hf_hub_download("org/name", "README.md", revision={})).read())'
    assert client(card.format(repr(pushed))).endswith("---\nWords")
    assert client(card.format("None")).endswith("Other words")


def test_downloads(hub, pushed, folder, client):
    """By name and as a snapshot, without a token."""
    path = Path(client('print(hf_hub_download("org/name", "big.data"))', token=None))
    assert path.read_bytes() == (folder / "big.data").read_bytes()
    assert path.parent.name == pushed
    assert any("/resolve/main/big.data 302" in request for request in hub.requests)
    path = Path(client('print(snapshot_download("org/name"))', token=None))
    assert path.name == pushed and without_attributes(content(path)) == content(folder)


def test_listings(pushed, client):
    client(
        """
        import sys
        info = api.model_info("org/name", files_metadata=True)
        names = [".gitattributes", "README.md", "big.data", "weights/model.safetensors"]
        assert info.sha == sys.argv[1] and [sibling.rfilename for sibling in info.siblings] == names
        assert [sibling.lfs is not None for sibling in info.siblings] == [False, False, True, True]
        assert info.siblings[2].size == info.siblings[2].lfs.size == 256 * 45_000
        from hashlib import sha256
        assert info.siblings[2].lfs.sha256 == sha256(bytes(range(256)) * 45_000).hexdigest()
        paths = lambda entries: [entry.path for entry in entries]
        assert paths(api.list_repo_tree("org/name")) == [*names[:3], "weights"]
        assert paths(api.list_repo_tree("org/name", "weights")) == names[3:]
        assert paths(api.list_repo_tree("org/name", recursive=True)) == [*names[:3], "weights", names[3]]
        assert paths(api.get_paths_info("org/name", ["big.data", "weights", "no"])) == ["big.data", "weights"]
        assert [commit.title for commit in api.list_repo_commits("org/name")] == ["Push", "initial commit"]
        assert api.file_exists("org/name", "big.data") and not api.file_exists("org/name", "other")
        assert api.repo_exists("org/name") and not api.repo_exists("org/other")
        assert api.revision_exists("org/name", sys.argv[1]) and not api.revision_exists("org/name", "0" * 40)
        assert api.whoami()["name"] == "user"
        if hasattr(api, "resolve_revision"):
            assert api.resolve_revision("org/name").resolved == sys.argv[1]
        """,
        pushed,
    )


def test_ranges(hub, pushed, client):
    client(
        """
        files, data = HfFileSystem(), bytes(range(256)) * 45_000
        with files.open("org/name/big.data", block_size=2**16) as file:
            for start in (0, 5_000_001, len(data) - 100):
                file.seek(start)
                assert file.read(1000) == data[start : start + 1000]
        assert files.cat_file("org/name/README.md", start=4, end=11) == b"license"
        assert files.info("org/name/big.data")["size"] == len(data)
        names = [".gitattributes", "README.md", "big.data", "weights"]
        assert files.ls("org/name", detail=False) == [f"org/name/{name}" for name in names]
        """
    )
    assert any(request.startswith("GET /object/") and request.endswith(" 206") for request in hub.requests)


def test_deletions(hub, pushed, tmp_path, client):
    """As a folder's upload deletes, what is not in it, and as files and folders by name."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    client(
        """
        import sys
        api.upload_folder(repo_id="org/name", folder_path=sys.argv[1], delete_patterns=["*.data", "*.md"])
        """,
        tmp_path / "other",
    )
    assert hub.files("org/name").keys() == {".gitattributes", "config.json", "weights/model.safetensors"}
    client('api.delete_folder("weights", "org/name"); api.delete_file("config.json", "org/name")')
    assert hub.files("org/name").keys() == {".gitattributes"}
    assert "big.data" in hub.files("org/name", pushed)
    client('assert refusal(api.delete_file, "no", "org/name") is errors.RemoteEntryNotFoundError')


def test_what_is_missing(pushed, client):
    client(
        """
        assert refusal(hf_hub_download, "org/other", "a") is errors.RepositoryNotFoundError
        assert refusal(hf_hub_download, "name", "a") is errors.RepositoryNotFoundError
        assert issubclass(refusal(hf_hub_download, "org/name", "a"), errors.EntryNotFoundError)
        assert refusal(hf_hub_download, "org/name", "README.md", revision="no") is errors.RevisionNotFoundError
        assert refusal(api.model_info, "org/other") is errors.RepositoryNotFoundError
        assert refusal(api.model_info, "org/name", revision="0" * 40) is errors.RevisionNotFoundError
        assert refusal(snapshot_download, "org/other") is errors.RepositoryNotFoundError
        assert refusal(lambda: list(api.list_repo_tree("org/name", "no"))) is errors.RemoteEntryNotFoundError
        assert refusal(HfFileSystem().open, "org/name/no") is FileNotFoundError
        assert refusal(api.upload_file, path_or_fileobj=b"a", path_in_repo="a", repo_id="org/other") is (
            errors.RepositoryNotFoundError
        )
        """
    )


def test_writing_needs_a_token(hub, pushed, folder, client):
    before = len(hub.commits("org/name"))
    assert "401" in client('api.create_repo("org/other")', token=None, fails=True)
    assert "401" in client(PUSH.replace("api.create_repo", "#"), folder, token=None, fails=True)
    assert len(hub.commits("org/name")) == before


def test_branches_and_tags(hub, pushed, client):
    client(
        """
        api.create_branch("org/name", branch="dev/one")
        api.create_branch("org/name", branch="dev/one", exist_ok=True)
        api.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="org/name", revision="dev/one")
        api.create_tag("org/name", tag="v1", revision="dev/one")
        assert refusal(api.create_tag, "org/name", tag="v1") is errors.HfHubHTTPError
        hf_hub_download("org/name", "a.txt", revision="v1")
        """
    )
    assert "a.txt" in hub.files("org/name", "dev/one") and "a.txt" not in hub.files("org/name")


def test_parent_commit(pushed, client):
    client(
        """
        import sys
        new = dict(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="org/name")
        assert refusal(api.upload_file, **new, parent_commit="0" * 40) is errors.HfHubHTTPError
        api.upload_file(**new, parent_commit=sys.argv[1])
        """,
        pushed,
    )


def test_failed_commit(hub, pushed, folder, client):
    before = hub.files("org/name")
    (folder / "README.md").write_text("New words")
    (folder / "weights" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{ }     ")
    hub.fail_next_commit = True
    assert "500" in client(PUSH, folder, fails=True)
    uploaded = sha256((folder / "weights" / "model.safetensors").read_bytes()).hexdigest()
    assert (hub.objects / uploaded).exists()
    with pytest.raises(HTTPError, match="403"):
        urlopen(f"{hub.storage}/object/{uploaded}")
    assert hub.files("org/name") == before and hub.commits("org/name")[0].sha == pushed
    assert client(PUSH, folder) == hub.commits("org/name")[0].sha != pushed
    assert without_attributes(hub.files("org/name")) == content(folder)


def test_dropped_upload(hub, folder, client):
    """The client tries again."""
    hub.drop_uploads = 1
    client(PUSH, folder)
    uploads = [request.split(" ", 2)[2] for request in hub.requests if request.startswith("PUT")]
    assert sorted(uploads) == ["200", "200", "broken off"]
    assert without_attributes(hub.files("org/name")) == content(folder)


def test_killed_client(hub, folder, tmp_path, client):
    processes = []
    hub.on_upload = lambda: processes[0].kill()
    processes.append(start(hub, tmp_path / "home", PUSH, folder))
    processes[0].communicate(timeout=120)
    assert [commit.title for commit in hub.commits("org/name")] == ["initial commit"]
    client('assert issubclass(refusal(hf_hub_download, "org/name", "big.data"), errors.EntryNotFoundError)')
    hub.on_upload = None
    client(PUSH, folder)
    assert without_attributes(hub.files("org/name")) == content(folder)


def test_transformers(hub, client):
    """A stock model, pushed by its own method and loaded by name."""
    printed = client(
        """
        import pvm  # makes torchvision importable where its compiled operators are missing
        from transformers import BertConfig, BertModel
        config = BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        model = BertModel(config)
        model.push_to_hub("org/bert-tiny")
        print(sum(p.double().sum().item() for p in model.parameters()))
        """
    )
    assert {"config.json", "model.safetensors"} <= hub.files("org/bert-tiny").keys()
    loaded = client(
        """
        import pvm  # makes torchvision importable where its compiled operators are missing
        from transformers import AutoConfig, AutoModel
        assert AutoConfig.from_pretrained("org/bert-tiny").hidden_size == 16
        model = AutoModel.from_pretrained("org/bert-tiny")
        print(sum(p.double().sum().item() for p in model.parameters()))
        """
    )
    assert printed == loaded
    assert len(hub.commits("org/bert-tiny")) == 2
