import hashlib
import json

import pytest

from infinite_jax import manifest


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "12"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "abc.bin").write_bytes(b"abc")
    (root / "deep" / "er" / "empty").touch()
    manifest.write(root, step=12, score=None)
    return root


def test_holds_facts_paths_sizes_and_the_digests_of_fips_180(folder):
    content = manifest.read(folder)
    assert (content["step"], content["score"]) == (12, None)
    assert content["files"] == [
        {"path": "abc.bin", "size": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"path": "deep/er/empty", "size": 0, "sha256": hashlib.sha256(b"").hexdigest()},
    ]
    assert manifest.fault(folder) is None
    assert {path.name for path in folder.iterdir()} == {"abc.bin", "deep", "manifest.json"}


def test_flipped_bytes_and_cuts_anywhere_are_faults_and_never_an_exception(folder):
    for path in (folder / "abc.bin", folder / manifest.NAME):
        content = path.read_bytes()
        for at in range(0, len(content), 3):
            for damaged in (content[:at], content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]):
                path.write_bytes(damaged)
                fault = manifest.fault(folder)
                assert fault is not None and str(path) in fault, (path, at)
        path.write_bytes(content)
    assert manifest.fault(folder) is None


def test_missing_files(folder):
    (folder / "extra").touch()
    assert manifest.fault(folder) is None  # what was not there when it was written is not its business
    (folder / "deep" / "er" / "empty").write_text("x")
    assert manifest.fault(folder) == f"{folder}/deep/er/empty has 1 bytes and not 0"
    (folder / "deep" / "er" / "empty").unlink()
    assert manifest.fault(folder) == f"{folder}/deep/er/empty cannot be read (No such file or directory)"
    (folder / manifest.NAME).unlink()
    assert manifest.fault(folder) == f"{folder}/manifest.json is missing"
    assert not manifest.exists(folder) and manifest.read(folder) is None


@pytest.mark.parametrize("content", ["", "null", "[]", "3", '"x"', "{}", '{"content": {}, "sha256": 1}', "\ud800"])
def test_what_is_not_a_manifest_is_none(folder, content):
    (folder / manifest.NAME).write_bytes(content.encode(errors="surrogatepass"))
    assert manifest.read(folder) is None


def test_a_failed_write_leaves_the_old_manifest(folder, monkeypatch):
    before = (folder / manifest.NAME).read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space"):
        manifest.write(folder, step=13)
    assert (folder / manifest.NAME).read_bytes() == before
