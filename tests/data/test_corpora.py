"""Files of the hub: compared with what the hub says of them, and named with their place where there is no way to it."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from trivium.config import UserError
from trivium.data import corpora
from trivium.data.corpora import KNOWN, hub_sources, say
from trivium.tasks import download

ROWS = b'{"problem": "1+1?", "solution": "$\\\\boxed{2}$", "answer": "2"}\n'
(FILE,) = KNOWN["math500"].files["test"]


@pytest.fixture
def hub(monkeypatch, tmp_path: Path):
    """A hub that has one file, downloads of which land in `tmp_path`; what it says of the file can be changed."""
    import huggingface_hub

    place = tmp_path / FILE
    place.write_bytes(ROWS)
    large = SimpleNamespace(sha256=hashlib.sha256(ROWS).hexdigest())
    told = SimpleNamespace(path=FILE, size=len(ROWS), lfs=large, blob_id=None)
    api = SimpleNamespace(get_paths_info=lambda *_, **__: [told])
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    for module in (corpora, download):
        monkeypatch.setattr(module, "unreachable", lambda: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(place))
    return SimpleNamespace(place=place, told=told, api=api)


def test_a_download_that_is_the_hubs_file_is_taken_and_told(hub):
    (source,) = hub_sources("math500")
    assert (source.path, source.split, source.bytes) == (hub.place, "test", len(ROWS))
    lines = "\n".join(say("math500", [source], "the hub"))
    for told in (f"{len(ROWS):,} bytes", f"SHA-256 {hub.told.lfs.sha256}", "licence: ", "takedown"):
        assert told in lines


def test_a_truncated_download_is_refused(hub):
    hub.place.write_bytes(ROWS[:-9])
    with pytest.raises(UserError, match=rf"has {len(ROWS) - 9} bytes, the hub's file {len(ROWS)}; remove .* again"):
        hub_sources("math500")


def test_a_wrong_checksum_is_refused(hub):
    hub.place.write_bytes(ROWS.replace(b"1+1", b"1+2"))
    with pytest.raises(UserError, match=rf"SHA-256 is [0-9a-f]{{64}}, the hub's is {hub.told.lfs.sha256}; remove"):
        hub_sources("math500")


def test_a_small_file_is_compared_by_gits_name_of_it(hub):
    hub.told.lfs = None
    hub.told.blob_id = hashlib.sha1(b"blob %d\0" % len(ROWS) + ROWS).hexdigest()  # as git hash-object gives it
    assert len(hub_sources("math500")) == 1
    hub.place.write_bytes(ROWS.replace(b"1+1", b"1+2"))
    with pytest.raises(UserError, match="is not the file that the hub has at this revision"):
        hub_sources("math500")


def test_what_is_in_the_cache_is_compared_with_what_was_pinned_or_that_is_said(hub, caplog):
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no way")

    hub.api.get_paths_info = unreachable
    with pytest.raises(UserError, match=f"the hub's is {KNOWN['math500'].sums['test']}"):
        hub_sources("math500")
    with caplog.at_level("INFO", logger="trivium"):
        assert len(hub_sources("wikitext2")) == 3
    assert caplog.text.count("nothing to compare it with") == 3


def test_without_a_network_the_files_to_place_are_named(hub, monkeypatch):
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no way")

    hub.api.get_paths_info = unreachable
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError) as raised:
        hub_sources("gsm8k")
    for told in (
        "no way",
        "main/train-00000-of-00001.parquet, main/test-00000-of-00001.parquet",
        "openai/gsm8k",
        KNOWN["gsm8k"].revision,
        "trivium data prepare gsm8k --from FOLDER",
    ):
        assert told in str(raised.value)
    assert corpora.instead("gsm8k") in str(raised.value)
    assert download.names_repository(KNOWN["gsm8k"].repository)


def test_a_hub_that_does_not_answer_is_asked_once_for_seconds_and_not_again_and_again(monkeypatch):
    import huggingface_hub

    asked: list[object] = []

    class Session:
        def head(self, address: str, timeout: float) -> None:
            asked.append((address, timeout))
            raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("a hub that does not answer was asked"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", only_from_the_cache)
    with pytest.raises(UserError, match=r"does not answer: no route to host\); without a network, place test.jsonl"):
        hub_sources("math500")
    assert {timeout for _, timeout in asked} == {download.PATIENCE}


def only_from_the_cache(*_: object, local_files_only: bool = False, **__: object) -> str:
    assert local_files_only
    raise FileNotFoundError("not in the cache")
